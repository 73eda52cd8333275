"""``launch/selfie_iter4.sbatch`` as a user submits it, on a real SLURM cluster of two local nodes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from runs.conftest import ROOT, TINY, environment, metrics

pytestmark = pytest.mark.full
SCRIPT = str(ROOT / "launch" / "selfie_iter4.sbatch")
LOCAL_SLURM = str(ROOT / "scripts" / "local_slurm")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which sbatch and squeue find the local cluster."""
    place = {**environment(), "LOCAL_SLURM_DIR": str(tmp_path_factory.mktemp("slurm"))}
    started = subprocess.run([LOCAL_SLURM, "start"], capture_output=True, text=True, env=place)
    if started.returncode != 0:
        pytest.fail(
            f"scripts/local_slurm start: {started.stderr[-2000:]}; is it installed? scripts/local_slurm install"
        )
    key, _, conf = shlex.split(started.stdout)[1].partition("=")
    yield place | {key: conf}
    subprocess.run([LOCAL_SLURM, "stop"], check=True, env=place)


def submit(slurm: dict[str, str], log: Path, *arguments: str, cwd: Path = ROOT) -> tuple[int, str]:
    """(exit status of the job, its log)."""
    line = ["sbatch", "--wait", f"--output={log}", SCRIPT, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, env=slurm, cwd=cwd)
    assert "Submitted batch job" in done.stdout, done.stderr
    return done.returncode, log.read_text()


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like an installed checkout: the environment that runs the tests, as .venv."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    os.chmod(python, 0o755)
    return tmp_path


def test_the_job_gives_what_the_command_gives(slurm, checkout, selfie):
    run_dir = checkout / "run"
    status, log = submit(slurm, checkout / "job.log", *TINY, f"run_dir={run_dir}", cwd=checkout)
    assert status == 0, log
    assert metrics(run_dir) == metrics(selfie[0])
    assert (run_dir / "final" / "model.safetensors").is_file() and "43 stages run" in log
    status, log = submit(slurm, checkout / "again.log", *TINY, f"run_dir={run_dir}", cwd=checkout)
    assert status == 0 and "nothing to run" in log


def test_a_run_that_fails_makes_the_job_fail(slurm, checkout):
    status, log = submit(slurm, checkout / "job.log", "seeed=1", cwd=checkout)
    assert status != 0 and "seeed" in log


def test_a_checkout_that_is_not_installed_is_named(slurm, tmp_path):
    status, log = submit(slurm, tmp_path / "job.log", cwd=tmp_path)
    assert status != 0 and f"no .venv in {tmp_path}" in log and "make install" in log
