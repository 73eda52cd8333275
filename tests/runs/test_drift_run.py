"""A loop that goes wrong: the drift guard sees it without gold, and the policy before it is what remains."""

from __future__ import annotations

import json

import pytest

from align_loop.digest import DigestCache, folder_digest
from runs.conftest import align, metrics

pytestmark = pytest.mark.full


def test_three_times_the_learning_rate_trips_the_guard(tmp_path):
    """Seed 2 of the small language, where 4.5e-4 instead of 1.5e-4 leads out of it in the third iteration."""
    run_dir = tmp_path / "run"
    rate = "setting.training.iteration.learning_rate=4.5e-4"
    small = ["setting=embedded_small", "seed=2", "tracking.mode=off", "hardware.threads=1"]
    done = align("+experiment=selfie_iter4", *small, rate, f"run_dir={run_dir}", timeout=900)
    rows = metrics(run_dir)
    kept = [row for row in rows if row["good"]]
    assert 2 <= len(kept) < len(rows) and "hardly give" in rows[len(kept)]["drift"]
    assert kept[-1]["gold_reward"] > rows[-1]["gold_reward"] + 0.1  # and it was right
    assert "! drift at" in done.stdout and "the policy before the drift" in done.stdout
    assert json.loads((run_dir / "summary.json").read_text())["final_policy"] == kept[-1]["policy"]
    (folder,) = (run_dir / "store").glob(f"{kept[-1]['policy']}-train-*")
    cache = DigestCache()
    assert folder_digest(run_dir / "final", cache) == folder_digest(folder / "model", cache)

    stopped = tmp_path / "stopped"
    shared = [f"run_dir={stopped}", f"store_dir={run_dir / 'store'}", "loop.stop_on_drift=true"]
    align("+experiment=selfie_iter4", *small, rate, *shared, timeout=900)
    assert metrics(stopped) == rows[: len(kept) + 1]
