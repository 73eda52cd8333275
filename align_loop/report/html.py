"""The report page of a run: one HTML file with everything in it, for a screen, a phone or paper."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2

from align_loop.report import plots, run_files, samples, table
from align_loop.report.text import duration, visible

Stage = dict[str, Any]
MAX_KINDS = len(plots.SERIES) - 1


def write_report(run_dir: Path) -> Path:
    """Write ``RUN_DIR/report.html`` from the run's files and return its path.

    Parts of a run that don't exist yet are left out. The same files give the same bytes. ``UserError`` where
    ``run_dir`` holds no run or one of its files is broken.
    """
    run_dir = Path(run_dir)
    run_files.require_run(run_dir)
    rows = run_files.read_metrics(run_dir)
    summary = run_files.read_json(run_dir, "summary.json")
    config = run_dir / "config.yaml"
    stages = summary.get("stages") or []
    title = " in ".join(str(summary[key]) for key in ("experiment", "setting") if summary.get(key))
    template = _environment().get_template("report.html.j2")
    page = template.render(
        name=title or run_dir.resolve().name,
        subtitle=_subtitle(summary),
        verdict=table.verdict(rows, summary),
        judges=table.judges(rows),
        reward_models=[_reward_model_line(row) for row in summary.get("reward_models") or []],
        header=[column.header for column in table.filled_columns(rows)],
        rows=_table_rows(rows),
        drift=table.drift_notes(rows) or ([summary["drift"]] if summary.get("drift") else []),
        policy_figures=plots.policy_plots(rows),
        cost_figures=plots.cost_plots(stage_costs(stages)),
        dropped=dropped_rows(rows, stages),
        samples=samples.side_by_side(run_dir, run_files.read_json(run_dir, "index.json")),
        stages=[_stage_line(stage) for stage in stages],
        ran_seconds=duration(sum(s.get("seconds") or 0 for s in stages if s.get("status") == "ran")),
        config=visible(config.read_text(encoding="utf-8")) if config.is_file() else "",
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _reward_model_line(row: dict[str, Any]) -> str:
    """How one reward model did on the held-out labels."""
    if row.get("reward_model_accuracy") is None:
        return f"{row['reward_model']}: no held-out labels to measure it by"
    low, high = row["reward_model_accuracy_ci95"]
    accuracy = f"accuracy {row['reward_model_accuracy']:.3f} [{low:.2f}, {high:.2f}]"
    return f"{row['reward_model']}: {row['pairs']:,} pairs, {accuracy}, calibration error {row['reward_model_ece']:.3f}"


def stage_kind(stage: Stage) -> tuple[str, str]:
    """(kind, group) of a stage for the cost plots: ``iteration-2/sample`` is ("sample", "2"), ``seed/train``
    ("train", "seed"), and ``sft`` ("sft", "setup"). A stage may name its own ``kind`` and ``iteration`` instead.
    """
    name = str(stage["name"])
    found = re.search(r"iter(?:ation)?[-_ ]?(\d+)", name) or re.search(r"^(sft|seed|dpo)(?=[-_/.: ].)", name)
    group = found.group(1) if found else "setup"
    kind = (name.replace(found.group(), "") if found else name).strip("-_/.: ")
    return stage.get("kind") or kind or name, str(stage.get("iteration") or group)


def stage_costs(stages: list[Stage]) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds and tokens of the stages: "seconds"/"tokens" -> kind -> group -> sum.

    Both hold the same kinds in the same order (so the same colours); the quickest become "other".
    """
    totals: dict[str, float] = {}
    for stage in stages:
        kind, _ = stage_kind(stage)
        totals[kind] = totals.get(kind, 0) + (stage.get("seconds") or 0)
    largest = sorted(totals, key=lambda kind: -totals[kind])[:MAX_KINDS]
    kinds = [kind for kind in totals if kind in largest] + (["other"] if len(totals) > MAX_KINDS else [])
    costs: dict[str, dict[str, dict[str, float]]] = {
        what: {kind: {} for kind in kinds} for what in ("seconds", "tokens")
    }
    for stage in stages:
        kind, group = stage_kind(stage)
        for what, amounts in costs.items():
            groups = amounts[kind if kind in largest else "other"]
            groups[group] = groups.get(group, 0) + (stage.get(what) or 0)
    return costs


def dropped_rows(rows: list[dict[str, Any]], stages: list[Stage]) -> list[dict[str, Any]]:
    """Where rows were dropped: where, what, into, out, reason, dropped; by policy where no stage tells."""
    lines = []
    for stage in stages:
        for what, count in (stage.get("rows") or {}).items():
            for reason, dropped in (count.get("dropped") or {}).items():
                fields = {"where": stage["name"], "what": what, "into": count["in"], "out": count["out"]}
                lines.append({**fields, "reason": reason, "dropped": dropped})
    if lines:
        return lines
    per_policy = [(row["policy"], row.get("filter_dropped") or {}) for row in rows]
    fields = {"what": "pairs", "into": None, "out": None}
    return [
        {**fields, "where": policy, "reason": reason, "dropped": count}
        for policy, reasons in per_policy
        for reason, count in reasons.items()
        if count
    ]


def _subtitle(summary: dict[str, Any]) -> str:
    names = {"seed": "seed", "iterations": "iterations:", "engine": "sampling with", "final_policy": "final/ is"}
    return ", ".join(f"{name} {summary[key]}" for key, name in names.items() if summary.get(key) is not None)


def _table_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    columns = table.filled_columns(rows)
    return [
        {"good": row.get("good", True), "cells": [column.show(row).removesuffix(" !") for column in columns]}
        for row in rows
    ]


def _stage_line(stage: Stage) -> dict[str, Any]:
    counts = [(what, count["in"], count["out"]) for what, count in (stage.get("rows") or {}).items()]
    facts = {name: value for name, value in (stage.get("facts") or {}).items() if not isinstance(value, (dict, list))}
    return {
        "name": stage["name"],
        "status": stage.get("status", ""),
        "seconds": duration(stage.get("seconds")),
        "rows": ", ".join(f"{what} {a:,}" if a == b else f"{what} {a:,} to {b:,}" for what, a, b in counts),
        "tokens": stage.get("tokens") or None,
        "facts": ", ".join(f"{name} {_short(value)}" for name, value in facts.items()),
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value))


def _environment() -> jinja2.Environment:
    """Everything is escaped but what the template itself marks safe, which is our own SVG."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=loader, **options)
    environment.filters["grouped"] = lambda number: "" if number is None else f"{number:,}"
    return environment
