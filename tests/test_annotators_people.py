"""People's labels: out of a run, filled in by hand, and back into it."""

import csv
import json
from pathlib import Path

import pytest
from annotator_fixtures import compared, job, knobs, made, outcome, rewards
from fake_run import fake_run
from planned import planned

from align_loop.__main__ import main
from align_loop.annotators.gold import Gold
from align_loop.annotators.people import People, honouring
from align_loop.compose import load
from align_loop.errors import UserError
from align_loop.groups import Group
from align_loop.labels import COLUMNS, pair_id, read_labels, write_pairs
from align_loop.prompts.files import read_file
from align_loop.prompts.formats import preferences
from align_loop.record import read_rows
from align_loop.report.people import _least_certain


@pytest.fixture
def run(tmp_path):
    return fake_run(tmp_path / "run", iterations=2, prompts=12)


def export(run, out, *more, iteration=1, number=5):
    given = [str(run), "--iteration", str(iteration), "--number", str(number), "--out", str(out), *more]
    return main(["export-pairs", *given])


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def fill(file, better, rows=None):
    rows = rows or rows_of(file)
    filled = [row | {"better": better(row)} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in filled))
    return filled


def tables(run):
    index = json.loads((run / "index.json").read_text())["iterations"][0]
    return {name: read_rows(run / index[name]) for name in ("answers", "scores")}


def test_the_smallest_gaps_are_exported_one_a_prompt(run, tmp_path, capsys):
    assert export(run, tmp_path / "pairs.jsonl", number=5) == 0
    rows, found = rows_of(tmp_path / "pairs.jsonl"), tables(run)
    score = {row["sample_id"]: row["reward"] for row in found["scores"]}
    text = {row["sample_id"]: row["text"] for row in found["answers"]}
    by_prompt = {}
    for row in found["answers"]:
        by_prompt.setdefault(row["prompt_id"], []).append(score[row["sample_id"]])
    best = sorted(min(abs(a - b) for i, a in enumerate(s) for b in s[i + 1 :]) for s in by_prompt.values())[:5]
    gaps = [abs(score[row["sample_id_1"]] - score[row["sample_id_2"]]) for row in rows]
    assert gaps == pytest.approx(best) and len({row["prompt_id"] for row in rows}) == 5
    assert all(text[row["sample_id_1"]] == row["answer_1"] and row["better"] == "" for row in rows)
    assert "5 pairs in" in capsys.readouterr().out
    assert export(run, tmp_path / "all.jsonl", "--per-prompt", "9", number=999) == 0
    every = rows_of(tmp_path / "all.jsonl")
    firsts = [score[row["sample_id_1"]] > score[row["sample_id_2"]] for row in every]
    assert 0.2 < sum(firsts) / len(firsts) < 0.8  # position says nothing
    assert export(run, tmp_path / "again.jsonl") == 0
    assert rows_of(tmp_path / "again.jsonl") == rows


def test_the_pairs_of_one_prompt_are_limited_and_the_same_text_is_no_pair():
    _, answers = made(n=4, count=1)
    answers[3]["text"] = f" {answers[0]['text']}"
    group = Group({}, answers, [{"reward": r} for r in (0.0, 1.0, 1.5, 0.0)])
    found = [(gap, {a["k"], b["k"]}) for gap, _, a, b, _ in _least_certain(group, 3)]
    assert found[0] == (0.5, {1, 2}) and {gap for gap, _ in found[1:]} == {1.0}
    assert len(_least_certain(group, 99)) == 5


def test_a_csv_holds_no_formulas_and_comes_back(run, tmp_path):
    assert export(run, tmp_path / "pairs.csv") == 0 and export(run, tmp_path / "pairs.jsonl") == 0
    with open(tmp_path / "pairs.csv", encoding="utf-8-sig", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == list(COLUMNS)
    assert [r["pair_id"] for r in rows] == [r["pair_id"] for r in rows_of(tmp_path / "pairs.jsonl")]
    with open(tmp_path / "filled.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        writer.writerows([rows[0] | {"better": "1"}, rows[1] | {"better": " 2"}, rows[2] | {"better": "Tie"}])
    assert [label.p_first for label in read_labels(tmp_path / "filled.csv")] == [1, 0, 0.5]
    write_pairs(tmp_path / "evil.csv", [rows[0] | {"answer_1": "=1+1", "answer_2": "fine"}])
    assert "'=1+1" in (tmp_path / "evil.csv").read_text()


def test_what_can_go_wrong_at_export(run, tmp_path, capsys):
    (tmp_path / "old.csv").write_text("x")
    for arguments, said in (
        ({"out": tmp_path / "p.txt"}, "ends in .jsonl or .csv"),
        ({"out": tmp_path / "old.csv"}, "exists and may hold labels"),
        ({"out": tmp_path / "p.csv", "iteration": 7}, "iteration 7 has no scores; iterations with scores: 1, 2"),
        ({"out": tmp_path / "p.csv", "number": 0}, "--number=0 must be at least 1"),
    ):
        assert export(run, **arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert export(tmp_path / "no", tmp_path / "p.csv") == 2 and "no run there" in capsys.readouterr().err


def test_a_stopped_round_can_be_labelled(run, tmp_path):
    index = json.loads((run / "index.json").read_text())
    index["unfinished"] = index["iterations"].pop() | {"pairs": None}
    (run / "index.json").write_text(json.dumps(index))
    assert export(run, tmp_path / "p.csv", iteration=2) == 0


def test_labels_become_preferences(run, tmp_path, capsys):
    export(run, tmp_path / "pairs.jsonl")
    filled = fill(
        tmp_path / "pairs.jsonl",
        lambda row: "tie" if row == rows[0] else "2",
        rows := rows_of(tmp_path / "pairs.jsonl"),
    )
    given = ["import-labels", str(tmp_path / "pairs.jsonl"), "--run", str(run), "--out", str(tmp_path / "prefs.jsonl")]
    assert main(given) == 0
    assert "5 labels, 4 preferences, 1 ties" in capsys.readouterr().out
    found, dropped = preferences(read_file(tmp_path / "prefs.jsonl"))
    assert [(r["chosen"], r["rejected"]) for r in found] == [(r["answer_2"], r["answer_1"]) for r in filled[1:]]
    assert not sum(dropped.values()) and {r["prompt_id"] for r in found} == {r["prompt_id"] for r in filled[1:]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"better": ""}, "row 2: better is empty; fill in 1, 2 or tie, or delete the row"),
        ({"better": "3"}, "row 2: better='3'; fill in"),
        ({"sample_id_1": "gone"}, "has no answer gone; was it exported from another run?"),
        ({"pair_id": "0" * 16}, "row 2: given for other answers than these"),
        ({"prompt_id": "other"}, "row 2: given for other answers than these"),
        ({"sample_id_2": ""}, "row 2: sample_id_2 is missing"),
    ],
)
def test_labels_that_cannot_be_used_are_named_by_file_and_row(run, tmp_path, capsys, change, said):
    export(run, file := tmp_path / "pairs.jsonl")
    rows = fill(file, lambda row: "1")
    fill(file, lambda row: row["better"], [rows[0], rows[1] | change])
    assert main(["import-labels", str(file), "--run", str(run), "--out", str(tmp_path / "o.jsonl")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "o.jsonl").exists()


def test_a_file_that_is_no_labels(tmp_path):
    (tmp_path / "a.jsonl").write_text("[1")
    (tmp_path / "b.jsonl").write_text("\n")
    for name, said in (("a", "line 1: not a JSON object"), ("b", "no labels in it"), ("c", "no such file")):
        with pytest.raises(UserError, match=said):
            read_labels(tmp_path / f"{name}.jsonl")


# --- the annotator ------------------------------------------------------------------------------------------------


def label(first, second, better):
    ids = {"sample_id_1": first["sample_id"], "sample_id_2": second["sample_id"], "prompt_id": first["prompt_id"]}
    return {"pair_id": pair_id(first, second), "better": better, **ids}


def people(tmp_path, labels, tables, gold=None, **fields):
    file = tmp_path / f"labels-{len(labels)}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in labels))
    work = job(tmp_path, tables, {"labels": file}, gold=gold)
    return People(str(file), **fields).annotate(work), work


def test_a_label_sets_its_pair_and_leaves_the_rest_to_the_base(tmp_path):
    prompts, answers = made(n=3, count=3)
    gold = {row["sample_id"]: i / 10 for i, row in enumerate(answers)}
    a, b, c = (row["sample_id"] for row in answers[:3])
    got, work = people(tmp_path, [label(answers[1], answers[0], "2")], (prompts, answers), gold, base=Gold(), gap=4.0)
    scores = rewards(got)
    assert scores[a] == pytest.approx(0.05 + 2, abs=1e-4) and scores[b] == pytest.approx(0.05 - 2, abs=1e-4)
    assert {k: v for k, v in scores.items() if k not in (a, b)} == {k: v for k, v in gold.items() if k not in (a, b)}
    found = compared(got)
    assert found[a, b] == 1.0 and len(got.pairwise) == 3  # every pair of that prompt, none of the others
    assert found[a, c] == pytest.approx(1 / (1 + 2.718281828 ** (gold[c] - gold[a])))
    assert work.context.report["facts"]["labels"] == {"of these answers": 1, "of others": 0}


def test_a_tie_makes_equal_and_people_may_contradict_each_other(tmp_path):
    prompts, answers = made(n=2, count=2)
    gold = {row["sample_id"]: i / 10 for i, row in enumerate(answers)}
    labels = [
        label(answers[0], answers[1], "tie"),
        label(answers[2], answers[3], "1"),
        label(answers[3], answers[2], "1"),
        label(answers[2], answers[3], "1"),
    ]
    got, _ = people(tmp_path, labels, (prompts, answers), gold, base=Gold(), gap=3.0)
    w, x, y, z = (rewards(got)[row["sample_id"]] for row in answers)
    assert w == pytest.approx(x, abs=1e-5) and y - z == pytest.approx(1.0, abs=1e-4)  # (3 - 3 + 3) / 3
    assert sorted(row["p_first"] for row in got.pairwise) == pytest.approx([0.5, 2 / 3])


def test_comparisons_of_the_base_are_kept_where_nobody_decided(tmp_path):
    prompts, answers = made(n=3, count=2)
    gold = {row["sample_id"]: i / 10 for i, row in enumerate(answers)}
    base = Gold(sharpness=1.0)
    alone = compared(base.annotate(job(tmp_path, (prompts, answers), gold=gold)))
    labelled = (answers[0]["sample_id"], answers[2]["sample_id"])
    opposite = "2" if alone[labelled] == 1 else "1"
    got, _ = people(tmp_path, [label(answers[0], answers[2], opposite)], (prompts, answers), gold, base=base)
    found = compared(got)
    assert found[labelled] == 1 - alone[labelled]
    assert {k: v for k, v in found.items() if set(k) != set(labelled)} == {
        k: v for k, v in alone.items() if set(k) != set(labelled)
    }


def test_without_a_base_only_labelled_answers_are_scored(tmp_path):
    prompts, answers = made(n=3, count=2)
    got, _ = people(tmp_path, [label(answers[0], answers[1], "1")], (prompts, answers))
    assert rewards(got) == pytest.approx({answers[0]["sample_id"]: 2.5, answers[1]["sample_id"]: -2.5}, abs=1e-4)


def test_labels_of_other_answers_are_left_alone_or_refused(tmp_path):
    prompts, answers = made(n=2, count=2)
    _, others = made(n=2, count=2, seed=5)
    got, work = people(tmp_path, [label(others[0], others[1], "1")], (prompts, answers))
    assert got.scores == [] and work.context.report["facts"]["labels"]["of others"] == 1
    resampled = [row | {"text": "another text"} for row in answers]
    with pytest.raises(UserError, match="row 1: given for other answers than these"):
        people(tmp_path, [label(answers[0], answers[1], "1")], (prompts, resampled))


def test_every_field_matters_and_wrong_ones_are_named(tmp_path):
    prompts, answers = made(n=3, count=2)
    gold = {row["sample_id"]: i / 10 for i, row in enumerate(answers)}
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for file, better in ((one, "1"), (two, "2")):
        file.write_text(json.dumps(label(answers[0], answers[1], better)))
    part = People(str(one), base=Gold())

    def said(part, rows=answers):
        return outcome(
            part.annotate(job(tmp_path, (prompts, rows), {"labels": Path(part.files()["labels"])}, gold=gold))
        )

    for name, new in knobs(part, file=str(two), base=None, gap=1.0):
        assert said(new) != said(part), name
    scores, pairs = said(part, answers[::-1])
    assert scores == said(part)[0] and pairs == said(part)[1]
    with pytest.raises(ValueError, match="annotator.file=nowhere"):
        People("nowhere")
    with pytest.raises(ValueError, match="annotator.gap=0"):
        People(str(one), gap=0)


def test_the_nearest_scores_that_honour_a_gap():
    assert honouring([0.0, 4.0, 9.0], [(0, 1, 2.0)]) == pytest.approx([3, 1, 9], abs=1e-4)
    assert honouring([1.0, 2.0], []) == [1.0, 2.0]


def test_labels_are_an_input_of_the_stage_by_content(tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text("x\n")
    given = ["+experiment=selfie_iter4", "annotator=people", f"annotator.file={file}"]

    def stage():
        return {s.name: s for s in planned(load(given)[0], tmp_path)}["iteration-1/annotate"]

    first = stage()
    assert set(first.inputs) == {"answers", "prompts", "base.policy", "base.reference", "labels"}
    assert {p.rpartition(".")[2] for p in first.parts} == {"People", "ImplicitReward"}
    file.write_text("y\n")
    assert stage().inputs["labels"].digest != first.inputs["labels"].digest
    with pytest.raises(UserError, match="annotator.file=.*no such file"):
        load([*given[:2], "annotator.file=nowhere.csv"])


def test_gold_needs_a_setting_that_knows_it():
    local = ["+experiment=selfie_iter4", "setting=local", "setting.model=.", "setting.preferences=."]
    with pytest.raises(UserError, match="annotator._target_=Gold reads the true quality.*setting=local"):
        load([*local, "annotator=gold"])
    assert load(["+experiment=selfie_iter4", "annotator=gold", "annotator.budget=7"])[0].annotator.budget == 7
