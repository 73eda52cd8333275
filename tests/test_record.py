"""The record: tables that lose nothing and have the same bytes each time; the accounts of a stage."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_loop import record
from align_loop.stage import RowsLost, StageContext

MESSAGES = [{"role": "system", "content": ""}, {"role": "user", "content": "héllo\n😀"}]
EXAMPLE = {"example_id": "e", "prompt_id": "p", "messages": MESSAGES, "chosen_ids": [1, 2], "rejected_ids": []}


def test_a_plain_preference_is_already_a_row_of_examples(tmp_path):
    assert record.write_table(tmp_path / "deep" / "t.parquet", [EXAMPLE], record.EXAMPLES) == 1
    (row,) = record.read_rows(tmp_path / "deep" / "t.parquet")
    assert {k: row[k] for k in EXAMPLE} == EXAMPLE
    assert (row["q"], row["m"], row["w"], row["beta"], row["kind"], row["tag"]) == (1.0, 0.0, 1.0, None, "pair", "")
    assert row["chosen"] is None and row["gold_chosen"] is None


def test_an_explicit_value_is_kept_even_where_it_is_falsy(tmp_path):
    record.write_table(tmp_path / "t", [EXAMPLE | {"q": 0.0, "w": 0.0}], record.EXAMPLES)
    assert [record.read_rows(tmp_path / "t")[0][k] for k in "qw"] == [0.0, 0.0]


def test_an_unknown_column_is_refused_and_not_dropped(tmp_path):
    with pytest.raises(KeyError, match="scor"):
        record.write_table(tmp_path / "t", [EXAMPLE, EXAMPLE | {"scor": 1}], record.EXAMPLES)
    assert not (tmp_path / "t").exists()


def test_no_rows_make_a_table_with_its_columns(tmp_path):
    assert record.write_table(tmp_path / "t", iter([]), record.ANSWERS) == 0
    assert pq.read_schema(tmp_path / "t") == record.ANSWERS and record.read_rows(tmp_path / "t") == []


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = [EXAMPLE | {"example_id": str(i)} for i in range(50)]
    for name in "ab":
        record.write_table(tmp_path / name, rows, record.EXAMPLES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = record.read_rows(tmp_path / "a")
    record.write_table(tmp_path / "c", again, record.EXAMPLES)
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_table_opens_as_a_dataset(tmp_path):
    record.write_table(tmp_path / "t.parquet", [EXAMPLE], record.EXAMPLES)
    opened = record.open_table(tmp_path / "t.parquet")
    assert opened[0]["chosen_ids"] == [1, 2] and opened[0]["messages"] == MESSAGES


def test_a_prompt_is_its_messages_in_their_order():
    one = record.prompt_id(MESSAGES)
    assert one == record.prompt_id([{"content": m["content"], "role": m["role"]} for m in MESSAGES])
    assert one != record.prompt_id(MESSAGES[::-1])
    assert one != record.prompt_id([MESSAGES[0] | {"role": "user"}, MESSAGES[1]])
    assert one != record.prompt_id([MESSAGES[0], MESSAGES[1] | {"content": "héllo\n"}])
    assert record.prompt_id([{"role": "user", "content": "ab"}]) != record.prompt_id(
        [{"role": "usera", "content": "b"}]
    )
    assert (
        len(record.prompt_id([{"role": "user", "content": "\ud800"}])) == 16
    )  # half a surrogate pair, as some data has


@given(st.integers(0, 99), st.integers(0, 9), st.text(max_size=8), st.integers(0, 9))
def test_request_seeds_are_seeds(seed, iteration, prompt, k):
    value = record.request_seed(seed, iteration, prompt, k)
    assert 0 <= value < 2**31 and value == record.request_seed(seed, iteration, prompt, k)


def test_request_seeds_differ_in_each_of_their_four_grounds():
    seeds = {record.request_seed(s, i, p, k) for s in range(5) for i in range(5) for p in "abcde" for k in range(5)}
    assert len(seeds) == 625
    assert record.request_seed(1, 11, "p", 0) != record.request_seed(11, 1, "p", 0)


def test_request_seeds_are_the_same_in_another_process():
    program = "from align_loop.record import request_seed; print(request_seed(1, 2, 'p', 3))"
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(there) == record.request_seed(1, 2, "p", 3) == 38516443


# --- the accounts of a stage ------------------------------------------------------------------------------------


def test_rows_must_add_up(tmp_path):
    context = StageContext("s", tmp_path)
    context.rows("pairs", into=5, out=3, dropped={"a": 2, "b": 0})
    assert context.report["rows"]["pairs"] == {"in": 5, "out": 3, "dropped": {"a": 2}}
    for wrong in ({"into": 5, "out": 3}, {"into": 5, "out": 4, "dropped": {"a": 2}}, {"into": 1, "out": 2}):
        with pytest.raises(RowsLost, match="s: pairs"):
            context.rows("pairs", **wrong)


def test_logs_go_to_the_file_and_to_the_tracker(tmp_path):
    seen = []
    context = StageContext("s", tmp_path, log_sink=seen.append)
    context.log({"step": 1, "loss": 0.5})
    context.log({"step": 2})
    context.tokens(3)
    context.tokens(4)
    context.fact("engine", "hf")
    lines = (tmp_path / "train_log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == seen == [{"step": 1, "loss": 0.5}, {"step": 2}]
    assert context.report["tokens"] == 7 and context.report["facts"] == {"engine": "hf"}


def test_two_contexts_share_no_report(tmp_path):
    StageContext("a", tmp_path).tokens(5)
    assert StageContext("b", tmp_path).report["tokens"] == 0


def test_progress_says_how_far_and_how_long(tmp_path, capsys, monkeypatch):
    with StageContext("s", tmp_path).progress(10, "answers") as progress:
        progress.last_print -= 100
        progress.update(4)
        progress.update(6)  # too soon for another line
    shown = capsys.readouterr().err
    assert "s: 4/10 answers" in shown and shown.count("\n") == 1
    with StageContext("s", tmp_path, quiet=True).progress(10, "answers") as progress:
        progress.last_print -= 100
        progress.update(4)
    assert capsys.readouterr().err == ""
