"""The process that runs one stage: ``python -m align_loop.launch.worker JOB.json REPORT.json LIFELINE_FD``.

Started by ``launch.process`` only. Live metrics: if the job's ``tracking`` is
``{"target": "module:function", "settings": {...}}``, that function is called with (stage name, settings) and
must return a context manager that gives the log sink, a callable taking one dictionary of metrics.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from contextlib import AbstractContextManager
from pathlib import Path

from align_loop.errors import UserError
from align_loop.launch import inline


def main(job_path: str, report_path: str, lifeline: str) -> int:
    """Run the job and write its report, or its error; returns the exit status."""
    guard(int(lifeline))
    job = inline.Job(**json.loads(Path(job_path).read_text(encoding="utf-8")))
    try:
        with log_sink(job) as sink:
            report = inline.run(job, sink)
    except UserError as error:
        report = {"error": {"user": True, "message": str(error)}}
    except Exception as error:  # noqa: BLE001  (whatever it is, the parent raises it)
        message = f"{type(error).__name__}: {error}"
        report = {"error": {"user": False, "message": message, "traceback": traceback.format_exc()}}
    beside = Path(report_path + ".tmp")
    beside.write_text(json.dumps(report), encoding="utf-8")
    os.replace(beside, report_path)
    return 1 if "error" in report else 0


def guard(lifeline: int) -> None:
    """Start a process that kills this whole process group as soon as the other end of ``lifeline`` closes.

    It is a process rather than a thread because a stage may hold Python's global lock for long.
    """
    if os.getpgrp() != os.getpid():
        raise RuntimeError("a worker must lead its own process group; start it through align_loop.launch.process")
    if os.fork():
        os.close(lifeline)
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def log_sink(job: inline.Job) -> AbstractContextManager[inline.LogSink | None]:
    """The live tracker that the job asks for, or none."""
    if job.tracking is None:
        return contextlib.nullcontext()
    return inline.load(job.tracking["target"])(job, job.tracking["settings"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
