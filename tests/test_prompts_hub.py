"""Hub data sets go through the same rows; the hub itself is never reached here, only the library's cache."""

import json
import shutil

import datasets
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet

from align_loop import record
from align_loop.errors import UserError
from align_loop.prompts import hub
from align_loop.stage import StageContext

COMMIT = "a" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and no way to the hub."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def parquet(tmp_path):
    """UltraFeedback-binarized rows in a Parquet file."""

    def turns(n, answer):
        return [{"content": f"q {n}", "role": "user"}, {"content": answer, "role": "assistant"}]

    rows = [
        {"prompt": f"q {n}", "chosen": turns(n, "yes"), "rejected": turns(n, "no"), "score_chosen": 8.0}
        for n in range(40)
    ]
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def run(out, **config):
    context = StageContext(name="prompts", out=out, quiet=True)
    hub.prepare(config, {}, context)
    return {path.stem: record.read_rows(path) for path in out.glob("*.parquet")}, context.report


def put_into_cache(cache, path, commit):
    """What ``datasets`` leaves in its cache after loading org/thing at ``commit``."""
    builder = Parquet(cache_dir=str(cache), dataset_name="thing", hash=commit, data_files={"train": [path]})
    builder.download_and_prepare()
    folder = cache / "org___thing" / "default" / "0.0.0" / commit
    folder.parent.mkdir(parents=True)
    shutil.move(builder.cache_dir, folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "config_name": "default"}))


def test_rows_of_a_builder_become_the_same_tables(tmp_path, cache, parquet):
    source = {"builder": "parquet", "data_files": parquet, "split": "train"}
    tables, report = run(tmp_path / "out", preferences=source, demos=source, seed_fraction=0.5, eval_prompts=4)
    assert [len(tables[n]) for n in ("seed", "heldout", "eval_prompts", "prompts-1")] == [16, 4, 4, 16]
    assert {(row["chosen"], row["rejected"]) for row in tables["seed"]} == {("yes", "no")}
    assert len(tables["demonstrations"]) == 32 and tables["demonstrations"][0]["answer"] == "yes"
    assert json.loads(tables["seed"][0]["meta"]).keys() == {"file", "row"}
    assert report["rows"]["preferences"] == {"in": 40, "out": 40, "dropped": {}}


def test_a_bad_row_is_named_by_data_set_and_row(tmp_path, cache):
    path = tmp_path / "bad.parquet"
    rows = [{"prompt": "q", "chosen": "a", "rejected": str(n)} for n in range(10)]
    datasets.Dataset.from_list([*rows, {"prompt": "", "chosen": "a", "rejected": "b"}]).to_parquet(str(path))
    with pytest.raises(UserError, match=r"^parquet \[train\]: row 11: 'prompt' is empty"):
        run(tmp_path / "out", preferences={"builder": "parquet", "data_files": str(path), "split": "train"})


def test_a_cached_data_set_is_used_offline_at_its_revision_only(tmp_path, cache, parquet):
    put_into_cache(cache, parquet, COMMIT)
    source = {"name": "org/thing", "revision": COMMIT, "split": "train"}
    tables, report = run(tmp_path / "out", prompts=source)
    assert len(tables["prompts-1"]) == 40
    assert report["facts"]["prompts data set"] == COMMIT
    with pytest.raises(UserError, match=f"prompts: org/thing is cached at {COMMIT}, not at revision=bbbb"):
        run(tmp_path / "out2", prompts={**source, "revision": "b" * 40})


def test_what_is_neither_reachable_nor_cached_says_what_to_do(tmp_path, cache):
    source = {"name": "org/thing", "revision": COMMIT, "split": "train"}
    with pytest.raises(UserError) as caught:
        run(tmp_path / "out", preferences=source)
    text = str(caught.value)
    assert text.startswith("preferences: org/thing can't be loaded") and "\n" not in text
    assert "HF_HOME" in text and "setting=local" in text


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"name": "org/thing", "split": "train"}, "preferences.revision is missing for org/thing"),
        ({"name": "org/thing", "revision": COMMIT}, "preferences.split is missing"),
        ({"split": "train"}, "name a hub data set"),
        ({"name": "a/b", "builder": "json", "split": "train"}, "and not both"),
        ({"name": "a/b", "revison": COMMIT, "split": "train"}, "preferences.revison is unknown"),
        ("org/thing", "preferences='org/thing' must name a data set"),
        (None, "no data set of preferences and none of prompts"),
        ({"builder": "parquet", "data_files": "/none.parquet", "split": "train"}, "can't be loaded"),
    ],
)
def test_an_incomplete_data_set_is_refused(tmp_path, cache, source, said):
    with pytest.raises(UserError) as caught:
        run(tmp_path / "out", preferences=source)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_split_is_refused(tmp_path, cache, parquet):
    with pytest.raises(UserError, match="Unknown split"):
        run(tmp_path / "out", preferences={"builder": "parquet", "data_files": parquet, "split": "tset"})
