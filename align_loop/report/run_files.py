"""Reading a run's folder: metrics, summary, index and tables, with errors that say what is missing.

``RUN_DIR/metrics.jsonl`` holds one JSON object a line for each policy evaluated, in order;
``summary.json`` the stages and facts of the run; ``index.json`` where its tables lie.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from align_loop.errors import UserError


def require_run(run_dir: Path) -> None:
    """Raise ``UserError`` unless ``run_dir`` is the folder of a run; it lists the runs found beside it."""
    if any((run_dir / name).is_file() for name in ("metrics.jsonl", "index.json", "summary.json", "config.yaml")):
        return
    parent = run_dir.parent
    near = sorted(p.parent.name for p in parent.glob("*/index.json")) if parent.is_dir() else []
    found = f"runs in {parent}: {', '.join(near[:10])}" if near else "give the folder that a run wrote (run_dir)"
    raise UserError(f"{run_dir}: no run there; {found}")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics rows in order, NaN and infinities as None; a broken line raises ``UserError`` naming it."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append({key: _finite(value) for key, value in json.loads(line).items()})
        except (json.JSONDecodeError, AttributeError) as error:
            raise UserError(f"{path}: line {number} is not a JSON object ({error}); delete that line") from error
    return rows


def read_json(run_dir: Path, name: str) -> dict[str, Any]:
    """The JSON object ``RUN_DIR/name``, or an empty one where the run has not written it yet."""
    path = run_dir / name
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run the command again to rewrite it") from error


def table_path(run_dir: Path, path: str) -> Path:
    """A path of ``index.json``, which may be absolute or relative to the run's folder."""
    full = run_dir / path  # an absolute right-hand side wins
    if not full.is_file():
        raise UserError(f"{full}: named in {run_dir / 'index.json'} but missing; run the command again to remake it")
    return full


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        values = [_finite(item) for item in value]
        return None if any(item is None for item in values) else values  # half an interval is no interval
    return value
