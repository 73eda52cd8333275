"""Run a stage in a process of its own, so that all its memory, GPU memory included, goes back when it ends.

The worker leads its own session. Its whole process group ends with the stage, and also when this process dies
in any way, SIGKILL included: a guard in the group notices that the pipe between the two has closed
(see ``launch.worker``). That covers the worker's children as well, which Linux's parent-death signal doesn't.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from align_loop.errors import UserError
from align_loop.launch.inline import Job, Report


class StageFailed(RuntimeError):
    """A worker process ended without finishing its stage; a note holds the worker's traceback if there was one."""


def run(job: Job) -> Report:
    """Run ``job`` through ``python -m align_loop.launch.worker`` and return what it reported.

    stdout and stderr pass through. Raises ``UserError`` for the worker's own, and ``StageFailed`` with the exit
    status or the signal's name for any other end.
    """
    job_file, report_file = Path(job.scratch) / "job.json", Path(job.scratch) / "report.json"
    job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    status = _run_group([sys.executable, "-m", "align_loop.launch.worker", str(job_file), str(report_file)])
    if not report_file.exists():
        raise StageFailed(f"the worker process {_describe(status)} without a report")
    report = json.loads(report_file.read_text(encoding="utf-8"))
    if status == 0:
        return report
    error = report["error"]
    if error["user"]:
        raise UserError(error["message"])
    failure = StageFailed(f"the worker process {_describe(status)}: {error['message']}")
    failure.add_note(error["traceback"])
    raise failure


def _run_group(command: list[str]) -> int:
    """Run ``command`` as a session of its own and wait; nothing of its process group is left afterwards."""
    lifeline, held_open = os.pipe()
    # The worker must find what this process finds: align_loop itself and users' own parts.
    search = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    worker = subprocess.Popen(
        [*command, str(lifeline)],
        env={**os.environ, "PYTHONPATH": search},
        start_new_session=True,
        pass_fds=[lifeline],
    )
    try:
        return worker.wait()
    finally:  # also on Ctrl-C, which reaches only this process
        os.close(held_open)  # the guard ends the group now
        os.close(lifeline)
        worker.kill()  # should the guard itself have been killed
        worker.wait()


def _describe(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    name = signal.Signals(-status).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
