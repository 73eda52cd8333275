"""The store: stages remembered by content, so that resuming is running the same command again.

A stage's key is the digest of its resolved configuration, the digests of what it reads, the digest of its code,
and its seed. Library versions, hardware, git state and times are recorded in the manifest, not keyed. A stage
writes into a folder beside the store's; that folder is flushed, renamed to ``<name>-<key>`` and gets its
``manifest.json`` last, so a folder without one is unfinished and is made again. One lock a key: of two processes
that want the same stage, one makes it and the other waits.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from align_loop import provenance
from align_loop.digest import DigestCache, file_digest, folder_digest, folder_files
from align_loop.durable import flush, flush_tree, write_json
from align_loop.errors import UserError
from align_loop.key import Artifact, Components, Stage, components, differences, not_made
from align_loop.launch.inline import Job, Launcher

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Event:
    """What the store did: ``kind`` is cached, waiting (for another process), running or ran.

    ``seconds``: what making the stage took, now or (cached) then. ``reason``: why it runs.
    """

    kind: str
    stage: str
    seconds: float = 0.0
    rows: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan. ``seconds``: what the stage took when this run last made it, if it did."""

    stage: str
    status: str  # "cached", "stale" or "to run"
    reason: str
    seconds: float | None


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a finished stage's folder; None where there is none, because it is unfinished."""
    try:
        return json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None


class Store:
    """Runs stages through ``launcher`` (job -> report), once each, and plans what would run.

    ``store_dir`` may be shared between runs and machines; ``run_dir`` holds what is this run's own: which key
    each of its stages had last (``stages.json``), and the logs of stages that failed (``failed/<stage>``).
    ``hardware``, ``quiet`` and ``tracking`` are handed to the jobs and not keyed. With ``dry_run`` nothing runs
    and nothing is written: ``run`` adds to ``plan_rows`` and returns what is there.
    """

    def __init__(
        self,
        store_dir: Path,
        run_dir: Path,
        launcher: Launcher,
        *,
        hardware: dict[str, Any] | None = None,
        quiet: bool = False,
        tracking: dict[str, Any] | None = None,
        dry_run: bool = False,
        on_event: Callable[[Event], None] | None = None,
    ):
        self.store_dir, self.run_dir = Path(store_dir).absolute(), Path(run_dir).absolute()
        self.launcher, self.hardware, self.quiet, self.tracking = launcher, hardware or {}, quiet, tracking
        self.dry_run, self.on_event = dry_run, on_event
        self.cache = DigestCache(self.store_dir / "digests.json", read_only=dry_run)
        self.events: list[Event] = []
        self.plan_rows: list[PlanRow] = []
        self._swept = False

    def source(self, path: str | Path) -> Artifact:
        """A data file or model folder of the user's, by content. Raises ``UserError`` if it doesn't exist."""
        found = Path(path).expanduser().absolute()
        if not found.exists():
            raise UserError(f"{path}: no such file or folder; check the path")
        digest = folder_digest(found, self.cache) if found.is_dir() else file_digest(found, self.cache)
        return Artifact(found, digest, str(path))

    def part(self, whole: Artifact, name: str) -> Artifact:
        """One top-level file or folder of a stage's output, by its own content: ``part(trained, "model")``.

        So a stage that reads only the model stays cached when another file of that output changes.
        """
        if whole.path is None:
            return whole
        manifest = read_manifest(whole.path)
        if manifest is None or name not in manifest["entries"]:
            raise ValueError(f"{whole.name}: its output has no {name!r}")
        return Artifact(whole.path / name, manifest["entries"][name], f"{whole.name}:{name}")

    def run(self, stage: Stage) -> Artifact:
        """The output of ``stage``: from the store if it is there, else made now.

        Raises what the stage raises, with the stage's name; nothing of its output is accepted then.
        """
        if self.dry_run:
            return self._plan_row(stage)
        if waits := not_made(stage):
            raise ValueError(f"{stage.name}: its inputs are not made yet: {waits}")
        wanted = components(stage)
        if made := self._find(wanted.key):
            return self._reuse(stage, *made)
        self._sweep()
        with self._lock(stage, wanted.key):
            if made := self._find(wanted.key):
                return self._reuse(stage, *made)
            return self._make(stage, wanted)

    def plan(self, stage: Stage) -> tuple[str, str]:
        """(status, reason) of ``stage`` without running it or writing anything.

        ``cached``; ``stale``: this run made it before, with another key, and the reason says what differs;
        ``to run``: this run has not made it yet. A stage whose inputs are still to be made waits for them, and
        may then turn out cached after all.
        """
        wanted, waits = components(stage), not_made(stage)
        if not waits and self._find(wanted.key):
            return "cached", ""
        record = self._records().get(stage.name)
        before = read_manifest(self.store_dir / record["directory"]) if record else None
        reasons = differences(before, wanted.parts) if before else []
        if before and not waits and before["key"] == wanted.key:
            changed = self._changed_files(self.store_dir / record["directory"], before)
            reasons.append(f"its output was changed on disk: {', '.join(changed[:3])}")
        if record and not before:
            reasons.append("its output is gone")
        if len(reasons) > 3:
            reasons[3:] = [f"and {len(reasons) - 3} more"]
        reasons += [f"waits for {name}" for name in waits]
        return "stale" if before else "to run", "; ".join(reasons)

    def _plan_row(self, stage: Stage) -> Artifact:
        status, reason = self.plan(stage)
        record = self._records().get(stage.name)
        before = read_manifest(self.store_dir / record["directory"]) if record else None
        made = self._find(components(stage).key) if status == "cached" else None
        manifest = made[1] if made else before
        self.plan_rows.append(PlanRow(stage.name, status, reason, manifest["seconds"] if manifest else None))
        return Artifact(made[0], made[1]["digest"], stage.name) if made else Artifact(None, None, stage.name)

    def _find(self, key: str) -> tuple[Path, Manifest] | None:
        """Folder and manifest of the finished, unchanged output with this key, whichever stage's name it bears."""
        for directory in sorted(self.store_dir.glob(f"[!.]*-{key[:12]}")):
            manifest = read_manifest(directory)
            if manifest and manifest["key"] == key and not self._changed_files(directory, manifest):
                return directory, manifest
        return None

    def _changed_files(self, directory: Path, manifest: Manifest) -> list[str]:
        """Files that someone changed, removed or added since the manifest was written.

        Sizes and times are compared first; files are read only if times alone differ (a copied store).
        """
        now, then = _file_stamps(directory), manifest["files"]
        if now == then:
            return []
        same_sizes = {name: size for name, (size, _) in now.items()} == {name: size for name, (size, _) in then.items()}
        if same_sizes and folder_digest(directory, self.cache) == manifest["digest"]:
            return []
        return sorted(name for name in now | then if now.get(name) != then.get(name))

    def _reuse(self, stage: Stage, directory: Path, manifest: Manifest) -> Artifact:
        self._record(stage.name, manifest["key"], directory)
        self._emit(Event("cached", stage.name, manifest["seconds"], manifest["rows"]))
        return Artifact(directory, manifest["digest"], stage.name)

    def _make(self, stage: Stage, wanted: Components) -> Artifact:
        self._remove_leftovers(wanted.key[:12])
        self._emit(Event("running", stage.name, reason=self.plan(stage)[1]))
        scratch = self.store_dir / f".tmp-{wanted.key[:12]}-{os.getpid()}"
        out = scratch / "out"
        out.mkdir(parents=True)
        started = time.monotonic()
        try:
            report = self.launcher(self._job(stage, wanted, out))
            seconds = round(time.monotonic() - started, 3)
            directory, manifest = self._accept(stage, wanted, out, report, seconds)
        except UserError as error:
            self._keep_log(stage, out)
            raise UserError(f"{stage.name}: {error}") from error
        except Exception as error:
            error.add_note(f"In stage {stage.name}; what it logged is in {self._keep_log(stage, out)}")
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._record(stage.name, wanted.key, directory)
        self._emit(Event("ran", stage.name, seconds, manifest["rows"]))
        return Artifact(directory, manifest["digest"], stage.name)

    def _job(self, stage: Stage, wanted: Components, out: Path) -> Job:
        return Job(
            name=stage.name,
            run=stage.run,
            config=wanted.parts["config"],
            inputs={name: str(artifact.path) for name, artifact in stage.inputs.items()},
            out=str(out),
            scratch=str(out.parent),
            key=wanted.key,
            seed=stage.seed,
            hardware=self.hardware,
            quiet=self.quiet,
            code=wanted.parts["code"],
            tracking=self.tracking,
        )

    def _accept(
        self, stage: Stage, wanted: Components, out: Path, report: dict[str, Any], seconds: float
    ) -> tuple[Path, Manifest]:
        """Flush the output, move it to its place and write its manifest, in this order."""
        cache = DigestCache(young_seconds=-1.0)  # nobody else writes here: large files are read once
        manifest = {
            "name": stage.name,
            "key": wanted.key,
            **wanted.parts,
            "input_names": {name: artifact.name for name, artifact in stage.inputs.items()},
            "digest": folder_digest(out, cache),
            "entries": _entry_digests(out, cache),
            "files": _file_stamps(out),
            **report,
            "seconds": seconds,
            "versions": provenance.versions(),
            "hardware": provenance.hardware() | {"settings": self.hardware},
            "git": provenance.git_state(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        flush_tree(out)
        directory = self.store_dir / f"{stage.name.replace('/', '-')}-{wanted.key[:12]}"
        _clear(directory)
        os.rename(out, directory)
        flush(self.store_dir)
        write_json(directory / "manifest.json", manifest)
        return directory, manifest

    def _keep_log(self, stage: Stage, out: Path) -> Path:
        """Keep the training log and the traceback of a stage that is failing now; returns their folder."""
        kept = self.run_dir / "failed" / stage.name
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        (kept / "train_log.jsonl").unlink(missing_ok=True)
        if (out / "train_log.jsonl").exists():
            shutil.copy(out / "train_log.jsonl", kept)
        return kept

    @contextmanager
    def _lock(self, stage: Stage, key: str) -> Iterator[None]:
        lock = self._key_lock(key[:12])
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self._emit(Event("waiting", stage.name, reason="another process is making it"))
            lock.acquire(poll_interval=0.2)
        try:
            yield
        finally:
            lock.release()

    def _key_lock(self, key: str) -> FileLock:
        (self.store_dir / ".locks").mkdir(parents=True, exist_ok=True)
        return FileLock(self.store_dir / ".locks" / f"{key}.lock")

    def _sweep(self) -> None:
        """Once: remove what killed processes left of any stage. Who makes a stage holds its lock while alive."""
        for leftover in [] if self._swept else list(self.store_dir.glob(".tmp-*")):
            key = leftover.name.split("-")[1]
            try:
                with self._key_lock(key).acquire(timeout=0):
                    self._remove_leftovers(key)
            except Timeout:
                continue
        self._swept = True

    def _remove_leftovers(self, key: str) -> None:
        for leftover in self.store_dir.glob(f".tmp-{key}-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _records(self) -> dict[str, dict[str, str]]:
        file = self.run_dir / "stages.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def _record(self, name: str, key: str, directory: Path) -> None:
        """Remember in the run's folder that its stage ``name`` has this key now."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(self.run_dir / ".stages.lock"):
            entry = {"key": key, "directory": directory.name}
            if self._records().get(name) != entry:
                write_json(self.run_dir / "stages.json", self._records() | {name: entry})

    def _emit(self, event: Event) -> None:
        self.events.append(event)
        if self.on_event is not None:
            self.on_event(event)


def _entry_digests(directory: Path, cache: DigestCache) -> dict[str, str]:
    """The digest of each top-level file and folder that is part of a folder's content."""
    names = sorted({name.split("/")[0] for name, _ in folder_files(directory)})
    paths = [directory / name for name in names]
    return {path.name: (folder_digest if path.is_dir() else file_digest)(path, cache) for path in paths}


def _file_stamps(directory: Path) -> dict[str, list[int]]:
    """Relative path -> [size in bytes, mtime in ns] of each file that is part of a folder's content."""
    stats = {name: file.stat() for name, file in folder_files(directory)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _clear(directory: Path) -> None:
    """Make room for a new output: delete an unfinished one; set aside one that somebody has changed since."""
    if read_manifest(directory) is None:
        shutil.rmtree(directory, ignore_errors=True)
        return
    aside = directory.with_name(f"{directory.name}.changed-{time.strftime('%Y%m%d-%H%M%S')}")
    os.rename(directory, aside)
