"""W&B: one group a run, in it one W&B run for each training stage and one for the loop itself.

Separate runs, because several trainers on one step axis would overlap. Our own files are the truth: W&B gets
copies, ``RUN_DIR/wandb.json`` remembers which, and what is missing there is logged again from the files.
A failing W&B never stops a run: one warning, then silence.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_loop.record import short_digest
from align_loop.tracking.mode import resolve_mode
from align_loop.tracking.secrets import without_secrets

Metrics = dict[str, Any]
INIT_SECONDS = 30  # longest wait for the server at the start of a run
FINISH_SECONDS = 60  # longest wait for the upload at its end
_warned = False


class Tracking:
    """The W&B side of one run. ``mode``: auto, online, offline or off; ``run_dir``/wandb takes the files."""

    def __init__(self, mode: str, project: str, group: str, run_dir: Path, run_id: str | None = None):
        """``UserError`` for an unknown mode, or for "online" without a key. ``run_id`` is for worker processes."""
        self.mode = resolve_mode(mode) if run_id is None else mode
        self.project, self.group, self.run_dir = project, group, Path(run_dir)
        self.run_id = run_id or ("" if self.mode == "off" else self._stored_run_id())
        self._loop: Sink | None = None
        self._loop_digests: list[str] = []

    def to_dict(self) -> dict[str, str]:
        """What a worker process needs to rebuild this object (see ``tracking_from_dict``); JSON-able, no secrets."""
        fields = {"mode": self.mode, "project": self.project, "group": self.group}
        return {**fields, "run_dir": str(self.run_dir), "run_id": self.run_id or "off"}

    def stage(self, name: str, key: str, config: dict[str, Any]) -> Sink:
        """A live sink for the training stage ``name`` with store key ``key``; call it only when the stage runs.

        The sink is called with metrics; their ``step`` is the x axis. Close it when the stage has ended.
        """
        return Sink(self, short_digest(self.run_id, name, key), name, "stage", "step", config)

    def replay(self, name: str, key: str, config: dict[str, Any], train_log: Path) -> bool:
        """Log a finished stage from its ``train_log.jsonl`` unless it was logged; True where it was done now."""
        if self.mode == "off" or not train_log.is_file() or self._logged(short_digest(self.run_id, name, key)):
            return False
        with self.stage(name, key, config) as sink:
            for line in train_log.read_text(encoding="utf-8").splitlines():
                sink(json.loads(line))
        return not sink.failed

    def policies(self, rows: list[Metrics], config: dict[str, Any]) -> None:
        """Bring the loop's W&B run up to date with ``rows``, the metrics rows so far (x axis: ``iteration``).

        Does nothing where these rows are logged already. Call it after each policy, and ``finish`` at the end.
        """
        digests = [short_digest({k: v for k, v in row.items() if k != "seconds"}) for row in rows]
        loop_id = short_digest(self.run_id, "loop")
        if self.mode == "off" or not rows:
            return
        if self._loop is None:
            if self._logged(loop_id)[: len(digests)] == digests:
                return
            self._loop = Sink(self, loop_id, "loop", "loop", "iteration", config)
            self._loop_digests = []
        for index in range(len(self._loop_digests), len(rows)):
            self._loop(_flat(rows[index]) | {"policy_index": index}, step=index)
            self._loop_digests.append(digests[index])

    def finish(self) -> None:
        """Close the loop's W&B run, if one is open."""
        if self._loop is not None:
            self._loop.close(note=self._loop_digests)
            self._loop = None

    def _logged(self, wandb_id: str) -> list[str]:
        """What was logged completely under this id: the rows' digests, or ["all"] for a stage; else []."""
        return _read_state(self.run_dir).get("logged", {}).get(wandb_id, [])

    def _stored_run_id(self) -> str:
        with _state(self.run_dir) as state:
            return state.setdefault("run_id", uuid.uuid4().hex[:12])


class Sink:
    """A callable that logs metrics to one W&B run; it does nothing once W&B has failed, or with mode "off"."""

    def __init__(self, tracking: Tracking, wandb_id: str, name: str, kind: str, axis: str, config: dict[str, Any]):
        self.tracking, self.wandb_id, self.axis = tracking, wandb_id, axis
        self.last_step = -1
        self.run: Any = None  # null: off, failed or closed
        self.failed = False  # W&B lacks something of this run
        if tracking.mode == "off":
            return
        with _state(tracking.run_dir) as state:  # from now on incomplete, until close()
            state.setdefault("logged", {}).pop(wandb_id, None)
        try:
            self._remove_unfinished()
            self.run = _start(tracking, wandb_id, name, kind, without_secrets(config))
            self.run.define_metric("*", step_metric=axis)
        except Exception as error:  # whatever it is: tracking must not stop training
            self._give_up(error)

    def __call__(self, metrics: Metrics, step: int | None = None) -> None:
        """Log one row; ``step`` defaults to ``metrics["step"]``, else counts up. Null values are left out."""
        if self.run is None:
            return
        step = int(metrics.get("step", self.last_step + 1) if step is None else step)
        self.last_step = max(step, self.last_step)
        row = {key: value for key, value in metrics.items() if value is not None}
        try:
            self.run.log({**row, self.axis: row.get(self.axis, step)}, step=step)
        except Exception as error:
            self._give_up(error)

    def close(self, note: list[str] | None = None, failed: bool = False) -> None:
        """End the W&B run and remember it as complete (``note`` says with what), unless the stage ``failed``."""
        if self.run is None:
            return
        try:
            _finish(self.run, exit_code=int(failed))
        except Exception as error:
            self._give_up(error)
            return
        self.run = None
        if not failed:
            with _state(self.tracking.run_dir) as state:
                state.setdefault("logged", {})[self.wandb_id] = note or ["all"]

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(failed=kind is not None)

    def _remove_unfinished(self) -> None:
        """Drop older offline folders of this id, so that syncing sends no row twice; synced ones stay."""
        for folder in (self.tracking.run_dir / "wandb").glob(f"offline-run-*-{self.wandb_id}"):
            if not any(folder.glob("*.synced")):
                shutil.rmtree(folder)

    def _give_up(self, error: Exception) -> None:
        global _warned
        self.run, self.failed = None, True
        if isinstance(error, ConnectionError):  # its service is dead: without this, a traceback at our exit
            with contextlib.suppress(Exception):
                sys.modules["wandb"].teardown()
        if not _warned:
            _warned = True
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            print(
                f"W&B: {reason}; going on without it. The files in {self.tracking.run_dir} are complete: "
                "run the command again to log them, or set the wandb mode to 'offline' or 'off'.",
                file=sys.stderr,
            )


def tracking_from_dict(fields: dict[str, str]) -> Tracking:
    """The tracking that ``Tracking.to_dict`` described, in another process: same runs, same mode, no new look-up."""
    # A service shared with the parent would hold the run open when this process is killed, and refuse it to the next.
    os.environ.pop("WANDB_SERVICE", None)
    return Tracking(**{**fields, "run_dir": Path(fields["run_dir"])})


@contextlib.contextmanager
def stage_sink(job: Any, settings: dict[str, str]) -> Iterator[Sink | None]:
    """The live sink of a training stage, for the process that runs ``job``; None for a stage that trains nothing."""
    if ".trainers." not in job.run:
        yield None
        return
    with tracking_from_dict(settings).stage(job.name, job.key, job.config) as sink:
        yield sink


def _start(tracking: Tracking, wandb_id: str, name: str, kind: str, config: dict[str, Any]) -> Any:
    """Open a W&B run; where the server can't be reached at the first try, go on offline."""
    os.environ.setdefault("WANDB_SILENT", "true")  # read at import, before any settings object exists
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no crash reports to anyone
    import wandb

    # W&B takes another folder when this one is missing.
    (tracking.run_dir / "wandb").mkdir(parents=True, exist_ok=True)
    fields = {"project": tracking.project, "group": tracking.group, "name": name, "id": wandb_id}
    fields |= {"job_type": kind, "dir": str(tracking.run_dir), "config": config, "reinit": "create_new"}
    if tracking.mode == "online":
        try:
            # A run that exists is gone on with; the server keeps what it has of the steps sent again.
            return wandb.init(**fields, resume="allow", settings=_settings("online"))
        except Exception as error:
            if tracking._loop is not None:  # the teardown below would end the loop's run too
                raise
            print(f"W&B: {' '.join(str(error).split())[:200]}; logging offline.", file=sys.stderr)
            tracking.mode = "offline"
            wandb.teardown()  # the service still holds the id
    return wandb.init(**fields, settings=_settings("offline"))


def _settings(mode: str) -> Any:
    """Quiet, and cheap: nothing but our own numbers is collected."""
    import wandb

    return wandb.Settings(
        mode=mode,
        silent=True,
        quiet=True,
        console="off",
        init_timeout=INIT_SECONDS,
        login_timeout=INIT_SECONDS,
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=1.0,  # a killed run keeps its curve on disk
    )


def _finish(run: Any, exit_code: int) -> None:
    """End ``run``, waiting at most ``FINISH_SECONDS``: W&B itself waits for a lost server without end."""
    failures: list[Exception] = []

    def finish() -> None:
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=finish, daemon=True, name="wandb-finish")
    thread.start()
    thread.join(FINISH_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"the upload did not end within {FINISH_SECONDS} s")
    if failures:
        raise failures[0]


def _flat(row: Metrics) -> Metrics:
    """A metrics row with intervals as ``_low``/``_high`` and dictionaries as ``name/key``."""
    flat: Metrics = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": item for name, item in value.items()}
        elif isinstance(value, list) and len(value) == 2:
            flat |= {f"{key}_low": value[0], f"{key}_high": value[1]}
        else:
            flat[key] = value
    return flat


def _read_state(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "wandb.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}  # at worst something is logged again


@contextlib.contextmanager
def _state(run_dir: Path) -> Iterator[dict[str, Any]]:
    """``RUN_DIR/wandb.json`` to be changed, under a lock: the loop and a stage's process both write it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".wandb.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = _read_state(run_dir)
        yield state
        beside = run_dir / "wandb.json.new"
        beside.write_text(json.dumps(state, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(beside, run_dir / "wandb.json")
