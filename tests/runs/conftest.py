"""Whole runs through the command, at a size of seconds; one undisturbed run is shared by the tests that look at it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = "{hidden: 32, layers: 2, heads: 1, intermediate: 64}"
# The whole recipe, on next to nothing.
TINY = [
    "setting=embedded_small",
    f"setting.model={MODEL}",
    "setting.demonstrations=800",
    "setting.pairs=360",
    "setting.labelled=60",
    "setting.eval_prompts=32",
    "setting.prompt_sets={3: [24, 24, 32], 4: [24, 24, 32, 32]}",
    "sampler.chunk=16",
    "setting.training.iteration.batch_size=4",
    "hardware.threads=1",
    "tracking.mode=off",
]


def command(*arguments: str) -> list[str]:
    """The command line of ``python -m align_loop`` with these arguments."""
    return [sys.executable, "-m", "align_loop", *arguments]


def environment() -> dict[str, str]:
    """This environment, in which the checkout is found from anywhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def align(*arguments: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command as a process; fails the test with its output if it fails."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout, env=environment())
    if check and done.returncode != 0:
        pytest.fail(f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def metrics(run_dir: Path) -> list[dict]:
    """The lines of ``metrics.jsonl`` without their seconds."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="session")
def selfie(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """(run directory, output) of an undisturbed ``selfie_iter4``."""
    run_dir = tmp_path_factory.mktemp("selfie") / "run"
    return run_dir, align("+experiment=selfie_iter4", *TINY, f"run_dir={run_dir}")
