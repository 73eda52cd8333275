"""Every recipe of the package runs to its end, at a size of seconds, through the command and with real parts.

All share one store, so that the data and the SFT model are made once. What the recipes are worth is measured elsewhere.
"""

from __future__ import annotations

import pytest

from align_loop.compose import conf_dir
from runs.conftest import TINY, align, metrics

RECIPES = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
COVERED = {"sft", "selfie_iter4", "selfie_rm", "rm_bt"}  # by other tests of this folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.mark.full
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in COVERED])
def test_a_recipe_runs_to_its_end(recipe, store, tmp_path):
    done = align(f"+experiment={recipe}", *TINY, f"run_dir={tmp_path / 'run'}", f"store_dir={store}")
    rows = metrics(tmp_path / "run")
    assert rows[0]["policy"] == "sft" and len(rows) >= 2
    assert "stages run" in done.stdout or recipe == "offline_dpo"  # all of it is dpo_full_labels', made before
    assert all(0 <= row["gold_reward"] <= 1 for row in rows)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
