"""The store: a stage runs once for one content, again for another, and survives being killed anywhere."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from store_fixtures import STAGES, calls, kinds, new_store, stage, tree

from align_loop.errors import UserError
from align_loop.launch import inline, process
from align_loop.stage import RowsLost
from align_loop.store import Artifact, Stage, Store, read_manifest


def test_a_stage_runs_once_and_the_same_command_again_runs_nothing(module, tmp_path, store):
    made = store.run(stage(module))
    assert (made.path / "data.txt").read_text() == "x"
    again = new_store(tmp_path)
    assert again.run(stage(module)) == made
    assert calls(module) == ["iteration-1/sample"]
    assert kinds(store) == ["running", "ran"] and kinds(again) == ["cached"]
    assert again.events[0].rows == {"answers": {"in": 3, "out": 2, "dropped": {"empty": 1}}}
    assert again.events[0].seconds == store.events[1].seconds


def test_every_component_of_the_key_counts_and_the_name_does_not(module, tmp_path, store):
    data, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    data.write_text("1")
    other.write_text("2")
    base = stage(module, inputs={"data": store.source(data)})
    variants = [
        base,
        dataclasses.replace(base, config={"text": "x", "training": {"learning_rate": 1e-4}}),
        dataclasses.replace(base, config=base.config | {"more": None}),
        dataclasses.replace(base, inputs={"data": store.source(other)}),
        dataclasses.replace(base, inputs={"others": store.source(data)}),
        dataclasses.replace(base, seed=1),
        dataclasses.replace(base, seed=None),
        dataclasses.replace(base, run=f"{module.stem}:length"),
        dataclasses.replace(base, parts=["align_loop.record.write_table"]),
    ]
    assert len({store.run(variant).path for variant in variants}) == len(variants)
    count = len(calls(module))
    renamed = dataclasses.replace(base, name="warm-up/sample")
    assert store.run(renamed).path == store.run(base).path
    assert len(calls(module)) == count


def test_edited_code_runs_again_and_an_edited_comment_does_not(module, tmp_path):
    first = new_store(tmp_path, launcher=process.run)
    before = first.run(stage(module))
    module.write_text("# a comment\n" + STAGES)
    assert first.plan(stage(module))[0] == "cached"
    module.write_text(STAGES.replace("FACTOR = 2", "FACTOR = 3"))
    assert first.plan(stage(module)) == ("stale", f"code changed: {module.name}")
    after = new_store(tmp_path, launcher=process.run).run(stage(module))
    assert after.path != before.path and after.digest == before.digest


def save_model(folder: Path, value: float) -> None:
    folder.mkdir(exist_ok=True)
    save_file({"a": np.full((4,), value, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def test_a_model_overwritten_in_place_is_another_and_a_moved_one_is_not(module, tmp_path, store):
    save_model(tmp_path / "model", 1.0)

    def wanted(name: str) -> Stage:
        return stage(module, inputs={"policy": store.source(tmp_path / name)})

    store.run(wanted("model"))
    (tmp_path / "model").rename(tmp_path / "renamed")
    assert store.plan(wanted("renamed")) == ("cached", "")
    save_model(tmp_path / "renamed", 2.0)
    assert store.plan(wanted("renamed")) == ("stale", "input policy changed")
    store.run(wanted("renamed"))
    assert len(calls(module)) == 2


def test_an_output_changed_in_the_store_is_made_again_and_set_aside(module, tmp_path, store):
    made = store.run(stage(module))
    stat = os.stat(made.path / "data.txt")
    (made.path / "data.txt").write_text("y")  # the same size
    os.utime(made.path / "data.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert store.plan(stage(module)) == ("stale", "its output was changed on disk: data.txt")
    assert store.run(stage(module)) == made
    assert (made.path / "data.txt").read_text() == "x"
    [aside] = (tmp_path / "store").glob("*.changed-*")
    assert (aside / "data.txt").read_text() == "y"
    (made.path / "data.txt").unlink()
    assert store.plan(stage(module))[0] == "stale"


def test_a_copied_store_is_as_good_as_the_first(module, tmp_path, store):
    made = store.run(stage(module))
    shutil.copytree(tmp_path / "store", tmp_path / "copy", copy_function=shutil.copyfile)
    other = Store(tmp_path / "copy", tmp_path / "other_run", inline.run)
    found = other.run(stage(module))
    assert found.digest == made.digest and found.path.parent == tmp_path / "copy"
    assert kinds(other) == ["cached"]


def test_early_cutoff(module, store):
    """Upstream runs again with an equal output: what depends on it stays cached."""
    for text in ("ab", "cd"):  # both of length 2
        data = store.run(stage(module, "a", config={"text": text}))
        middle = store.run(stage(module, "b", "length", config={}, inputs={"data": data}))
        store.run(stage(module, "c", config={"text": ""}, inputs={"data": middle}))
    assert [event.stage for event in store.events if event.kind == "ran"] == ["a", "b", "c", "a", "b"]
    assert store.events[-1].kind == "cached"


def test_a_part_of_an_output_counts_by_itself(module, store):
    for text in ("a", "b"):
        trained = store.run(stage(module, "train", "train", config={"text": text}))
        model = store.part(trained, "model")
        assert model.path == trained.path / "model" and (model.path / "data.txt").exists()
        store.run(stage(module, "sample", inputs={"policy": model}))
        store.run(stage(module, "report", inputs={"flags": store.part(trained, "flags.txt")}))
    ran = [event.stage for event in store.events if event.kind == "ran"]
    assert ran == ["train", "sample", "report", "train", "report"]
    assert store.source(model.path).digest == model.digest
    with pytest.raises(ValueError, match="train: its output has no 'train_log.jsonl'"):
        store.part(trained, "train_log.jsonl")


def test_the_manifest_is_complete(module, tmp_path):
    store = new_store(tmp_path, hardware={"gpus": 0})
    data = tmp_path / "a.jsonl"
    data.write_text("1")
    source = store.source(data)
    made = store.run(stage(module, inputs={"data": source}, parts=["align_loop.record.write_table"]))
    manifest = read_manifest(made.path)
    assert made.path.name == f"iteration-1-sample-{manifest['key'][:12]}"
    expected = {
        "name": "iteration-1/sample",
        "run": f"{module.stem}:make",
        "config": {"text": "x", "training": {"learning_rate": 3e-5}},
        "inputs": {"data": source.digest},
        "input_names": {"data": str(data)},
        "seed": 0,
        "digest": made.digest,
        "rows": {"answers": {"in": 3, "out": 2, "dropped": {"empty": 1}}},
        "tokens": 7,
        "facts": {"engine": "none"},
    }
    assert {name: manifest[name] for name in expected} == expected
    assert set(manifest["code"]) == {module.name, "align_loop/record.py"}
    assert {"python", "torch", "transformers", "trl", "peft", "datasets", "align_loop"} <= set(manifest["versions"])
    assert manifest["hardware"]["settings"] == {"gpus": 0} and manifest["hardware"]["cpu_count"] >= 1
    assert {"threads", "gpus"} <= set(manifest["hardware"])
    assert manifest["git"] is None or (
        len(manifest["git"]["commit"]) == 40 and manifest["git"]["dirty"] in (True, False)
    )
    assert manifest["seconds"] >= 0 and manifest["created"].startswith("20")
    assert list(manifest["files"]) == ["data.txt"]


@pytest.mark.parametrize(("error", "kind"), [("value", ValueError), ("user", UserError), ("rows", RowsLost)])
def test_a_failing_stage_leaves_its_log_and_nothing_else(module, tmp_path, store, error, kind):
    failing = stage(module, "iteration-1/train", "fails", config={"error": error})
    with pytest.raises(kind) as caught:
        store.run(failing)
    assert "iteration-1/train" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert not [name for name in tree(tmp_path / "store") if not name.startswith(".locks")]
    failed = tmp_path / "run" / "failed" / "iteration-1" / "train"
    assert json.loads((failed / "train_log.jsonl").read_text()) == {"loss": 1.0}
    assert kind.__name__ in (failed / "error.txt").read_text()
    assert store.plan(failing) == ("to run", "")


def test_what_a_worker_says_of_its_failure_is_kept(module, tmp_path):
    store = new_store(tmp_path, launcher=process.run)
    with pytest.raises(process.StageFailed, match="ValueError: shapes differ"):
        store.run(stage(module, "train", "fails", config={"error": "value"}))
    assert "in fails" in (tmp_path / "run" / "failed" / "train" / "error.txt").read_text()


def test_an_output_without_a_manifest_is_made_again(module, tmp_path, store):
    """What a crash between the rename and the manifest leaves."""
    made = store.run(stage(module))
    (made.path / "manifest.json").unlink()
    (made.path / "stray.txt").write_text("half")
    assert store.plan(stage(module))[0] == "to run"
    assert store.run(stage(module)) == made
    assert len(calls(module)) == 2 and "stray.txt" not in os.listdir(made.path)


def test_a_folder_of_this_name_with_another_full_key_does_not_count(module, store):
    made = store.run(stage(module))
    manifest = read_manifest(made.path)
    (made.path / "manifest.json").write_text(json.dumps(manifest | {"key": manifest["key"][:12] + "0" * 52}))
    assert store.plan(stage(module))[0] == "stale"


def test_pickled_weights_as_output_are_refused(module, tmp_path, store):
    module.write_text(STAGES.replace("context.tokens(7)", '(context.out / "pytorch_model.bin").write_text("x")'))
    with pytest.raises(UserError, match="iteration-1/sample: .*safetensors"):
        store.run(stage(module))


def test_a_missing_source_is_a_users_error(store):
    with pytest.raises(UserError, match="nowhere.jsonl: no such file or folder"):
        store.source("nowhere.jsonl")


# Planning


def test_the_plan_names_what_changed(module, tmp_path, store):
    base = stage(module, inputs={"policy": Artifact(tmp_path, "d1", "train")})
    base.config["count"] = 1
    assert store.plan(base) == ("to run", "")
    store.run(base)
    assert store.plan(base) == ("cached", "")
    config = base.config | {"training": {"learning_rate": 1e-4}}
    later = {
        "config.training.learning_rate 3e-05 -> 0.0001": {"config": config},
        "config.new (unset) -> [1, 2]": {"config": base.config | {"new": [1, 2]}},
        "config.text x -> 1": {"config": base.config | {"text": 1}},
        "config.count 1 -> 1.0": {"config": base.config | {"count": 1.0}},
        "config.count 1 -> true": {"config": base.config | {"count": True}},
        "seed 0 -> 1": {"seed": 1},
        "input policy changed": {"inputs": {"policy": Artifact(tmp_path, "d2")}},
        "input judge added": {"inputs": base.inputs | {"judge": Artifact(tmp_path, "d2")}},
        "input policy removed": {"inputs": {}},
        f"run {module.stem}:make -> {module.stem}:length": {"run": f"{module.stem}:length"},
        "code added: align_loop/record.py": {"parts": ["align_loop.record"]},
        "waits for iteration-1/train": {"inputs": {"policy": Artifact(None, None, "iteration-1/train")}},
        "seed 0 -> 1; waits for a": {"inputs": {"policy": Artifact(None, None, "a")}, "seed": 1},
        "config.a (unset) -> 1; config.b (unset) -> 1; config.c (unset) -> 1; and 2 more": {
            "config": base.config | dict.fromkeys("abcd", 1),
            "seed": 1,
        },
    }
    for reason, change in later.items():
        assert store.plan(dataclasses.replace(base, **change)) == ("stale", reason)
    unmade = dataclasses.replace(base, name="other", inputs={"policy": Artifact(None, None, "iteration-1/train")})
    assert store.plan(unmade) == ("to run", "waits for iteration-1/train")


def test_a_stage_says_why_it_runs_again(module, store):
    store.run(stage(module))
    store.run(stage(module, seed=1))
    assert [event.reason for event in store.events if event.kind == "running"] == ["", "seed 0 -> 1"]


def walk(store: Store, module: Path, data: Path, text: str = "x") -> Artifact:
    """A small loop of stages, as a command would run it."""
    first = store.run(stage(module, "sample", config={"text": text}, inputs={"data": store.source(data)}))
    return store.run(stage(module, "train", inputs={"data": first}))


def test_planning_creates_nothing(module, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(bytes(2 << 20))  # large enough to be remembered
    before = tree(tmp_path)
    plan = new_store(tmp_path, dry_run=True)
    plan.cache.young_seconds = -1.0  # or old enough
    assert walk(plan, module, data) == Artifact(None, None, "train")
    assert plan.part(Artifact(None, None, "train"), "model") == Artifact(None, None, "train")
    assert [(row.stage, row.status, row.reason) for row in plan.plan_rows] == [
        ("sample", "to run", ""),
        ("train", "to run", "waits for sample"),
    ]
    assert tree(tmp_path) == before and calls(module) == []

    made = walk(new_store(tmp_path), module, data)
    before = tree(tmp_path)
    plan = new_store(tmp_path, dry_run=True)
    assert walk(plan, module, data) == made
    assert [row.status for row in plan.plan_rows] == ["cached", "cached"]
    assert all(row.seconds is not None for row in plan.plan_rows)
    walk(changed := new_store(tmp_path, dry_run=True), module, data, text="y")
    assert [(row.status, row.reason) for row in changed.plan_rows] == [
        ("stale", "config.text x -> y"),
        ("stale", "waits for sample"),
    ]
    assert tree(tmp_path) == before and len(calls(module)) == 2
