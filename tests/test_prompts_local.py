"""A user's files become a run's tables: nothing is lost, and nothing of the evaluation is trained on."""

import gzip
import json

import pyarrow.parquet as pq
import pytest

from align_loop import record
from align_loop.errors import UserError
from align_loop.prompts.local import prepare
from align_loop.stage import StageContext

SCHEMAS = {
    "seed": record.PREFERENCES,
    "heldout": record.PREFERENCES,
    "all_labels": record.PREFERENCES,
    "demonstrations": record.DEMONSTRATIONS,
    "eval_prompts": record.PROMPTS,
}


def write_jsonl(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def preference(n, answer="good"):
    return {"prompt": f"question {n}", "chosen": f"{answer} {n}", "rejected": f"bad {n}"}


def run(out, inputs, **config):
    context = StageContext(name="prompts", out=out, quiet=True)
    prepare(config, inputs, context)
    tables = {path.stem: record.read_rows(path) for path in out.glob("*.parquet")}
    for name in tables:
        assert pq.read_schema(out / f"{name}.parquet") == SCHEMAS.get(name, record.PROMPTS)
    return tables, context.report


def question_id(n):
    return record.prompt_id([{"role": "user", "content": f"question {n}"}])


def ids(rows):
    return {row["prompt_id"] for row in rows}


@pytest.fixture
def files(tmp_path):
    """60 preferences (one row twice, one with equal answers), 100 prompts (20 labelled, one twice), 70 demos."""
    rows = [preference(n) for n in range(60)] + [preference(0), {"prompt": "q", "chosen": "a", "rejected": "a"}]
    asked = [{"prompt": f"question {n}"} for n in range(40, 140)] + [{"prompt": "question 139"}]
    demos = [{"prompt": f"question {n}", "answer": f"demo {n}"} for n in range(50, 120)]
    return {
        "preferences": write_jsonl(tmp_path / "prefs.jsonl.gz", rows),
        "prompts": write_jsonl(tmp_path / "prompts.jsonl", asked),
        "demos": write_jsonl(tmp_path / "demos.jsonl", demos),
    }


def test_three_files(tmp_path, files):
    tables, report = run(
        tmp_path / "out", files, heldout_share=0.25, eval_prompts=10, iterations=2, prompt_sets={"3": [20, 30, 40]}
    )
    assert {name: len(rows) for name, rows in tables.items() if name != "demonstrations"} == {
        "seed": 45,
        "heldout": 15,
        "all_labels": 45,
        "eval_prompts": 10,
        "prompts-1": 20,
        "prompts-2": 30,
    }
    assert ids(tables["all_labels"]) == ids(tables["seed"])
    measured = [tables["heldout"], tables["eval_prompts"]]
    trained = [tables["seed"], tables["prompts-1"], tables["prompts-2"]]
    parts = [ids(rows) for rows in measured + trained]
    assert sum(map(len, parts)) == len(set().union(*parts))  # pairwise disjoint
    assert not ids(tables["demonstrations"]) & (parts[0] | parts[1])
    assert report["rows"]["preferences"] == {
        "in": 62,
        "out": 60,
        "dropped": {"duplicate row": 1, "identical answers": 1},
    }
    assert report["rows"]["labels"] == {"in": 60, "out": 60, "dropped": {}}
    assert report["rows"]["all_labels"] == {"in": 60, "out": 45, "dropped": {"held out": 15}}
    left = {"duplicate prompt": 1, "in the labelled seed": 20, "beyond the prompt sets": 20}
    assert report["rows"]["prompts"] == {"in": 101, "out": 60, "dropped": left}
    demos = report["rows"]["demonstrations"]
    asked = {question_id(n) for n in range(50, 120)}
    kept_out = {"held out": len(asked & parts[0]), "evaluation prompt": len(asked & parts[1])}
    assert all(kept_out.values())
    assert demos == {"in": 70, "out": len(tables["demonstrations"]), "dropped": kept_out}
    labels = "60 preferences: 45 seed, 15 held out; prompts: 20, 30 to train on, 10 for evaluation"
    assert report["facts"]["summary"] == f"{labels}; {len(tables['demonstrations'])} demonstrations"
    assert json.loads(tables["seed"][0]["meta"])["file"] == "prefs.jsonl.gz"


def test_preferences_alone_give_their_other_prompts_without_labels(tmp_path):
    path = write_jsonl(tmp_path / "prefs.jsonl", [preference(n, a) for n in range(100) for a in ("good", "fine")])
    tables, report = run(tmp_path / "out", {"preferences": path}, seed_fraction=0.1, heldout_share=0.2, eval_prompts=15)
    assert [len(tables[name]) for name in ("seed", "heldout", "eval_prompts", "prompts-1")] == [16, 4, 15, 75]
    measured = ids(tables["heldout"]) | ids(tables["eval_prompts"])
    assert not ids(tables["all_labels"]) & measured and len(tables["all_labels"]) == 200 - 4 - 30
    assert ids(tables["prompts-1"]) <= ids(tables["all_labels"])
    assert not ids(tables["prompts-1"]) & (ids(tables["seed"]) | measured)
    assert report["rows"]["labels"] == {"in": 200, "out": 20, "dropped": {"used without its label": 180}}
    assert report["rows"]["all_labels"]["dropped"] == {"held out": 4, "evaluation prompt": 30}
    assert report["rows"]["prompts"] == {"in": 180, "out": 90, "dropped": {"duplicate prompt": 90}}
    assert tables["demonstrations"] == []
    assert "180 without their labels" in report["facts"]["summary"]


def test_the_order_of_the_file_does_not_matter(tmp_path):
    rows = [preference(n, a) for n in range(50) for a in ("good", "fine")]
    config = {"seed_fraction": 0.3, "eval_prompts": 5, "iterations": 3}
    results = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / name).mkdir()
        path = write_jsonl(tmp_path / name / "prefs.jsonl", order)
        tables, _ = run(tmp_path / name / "out", {"preferences": path, "demos": path}, **config)
        results.append({key: [{**row, "meta": ""} for row in value] for key, value in tables.items()})
    assert results[0] == results[1]
    assert all(results[0].values())


def test_prompts_alone_and_no_iterations(tmp_path, files):
    tables, _ = run(tmp_path / "out", {"prompts": files["prompts"]}, iterations=1, eval_prompts=3)
    assert [len(tables[name]) for name in ("seed", "heldout", "all_labels", "prompts-1")] == [0, 0, 0, 97]
    tables, report = run(tmp_path / "out2", {"preferences": files["preferences"]}, iterations=0, full_labels=False)
    assert len(tables["seed"]) == 48 and "prompts-1" not in tables and tables["all_labels"] == []
    assert report["rows"]["all_labels"]["dropped"] == {"full_labels is off": 60}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"seed_fraction": 0.001}, "is not one label"),
        ({"seed_fraction": 1.0}, "leaves no preferences to serve as prompts"),
        ({"heldout_share": 1.0}, "leaves no seed"),
        ({"heldout_share": 1.5}, "heldout_share=1.5 must be a number from 0 to 1"),
        ({"heldout_share": float("nan")}, "heldout_share=nan"),
        ({"heldout_share": True}, "heldout_share=True"),
        ({"eval_prompts": -1}, "eval_prompts=-1 must be a whole number"),
        ({"iterations": 2.0}, "iterations=2.0 must be a whole number"),
        ({"iterations": 3, "prompt_sets": {"2": [1, 1]}}, "loop.iterations=3, but prompt_sets"),
        ({"prompt_sets": [5]}, "prompt_sets=[5] must be"),
        ({"eval_prompts": 500}, "500 prompts for evaluation and at least one for each"),
        ({"heldout_shere": 0.1}, "unknown key 'heldout_shere'; did you mean 'heldout_share'?"),
        ({"format": "HH"}, "format='HH' is unknown"),
        ({"bad_rows": "skip"}, "bad_rows='skip' is unknown"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, config, said):
    path = write_jsonl(tmp_path / "prefs.jsonl", [preference(n) for n in range(50)])
    with pytest.raises(UserError) as caught:
        run(tmp_path / "out", {"preferences": path}, **{"seed_fraction": 0.5, **config})
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_bad_row_anywhere_stops_before_anything_is_written(tmp_path, files):
    rows = [preference(n) for n in range(36)] + [{"prompt": "q", "chosen": "a"}] + [preference(37)]
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=r"bad.jsonl: line 37: no key 'rejected'"):
        run(tmp_path / "out", {**files, "preferences": path})
    demos = write_jsonl(tmp_path / "demos2.jsonl", [{"prompt": "q", "answer": "a"}] * 5 + [{"prompt": "q"}])
    with pytest.raises(UserError, match=r"demos2.jsonl: line 6: format not recognised"):
        run(tmp_path / "out", {**files, "demos": demos})
    assert not (tmp_path / "out").exists()
    tables, report = run(tmp_path / "out", {**files, "preferences": path}, bad_rows="drop")
    assert report["rows"]["preferences"]["dropped"] == {"malformed row": 1} and len(tables["seed"]) > 0


def test_no_files_at_all(tmp_path):
    with pytest.raises(UserError, match="no file of preferences and none of prompts"):
        run(tmp_path / "out", {"demos": tmp_path / "d.jsonl"})
