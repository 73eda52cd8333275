"""Paging through pairs and answers: what a block says, which page it is on, and what is refused."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from fake_run import fake_run

from align_loop.errors import UserError
from align_loop.record import read_rows
from align_loop.report.show import show

PRINT = (
    "import sys; from align_loop.report.show import print_blocks\n"
    "print_blocks(f'block {i}' for i in range(int(sys.argv[1])))"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("run"), iterations=2, prompts=12)


def test_pairs_show_what_was_trained_on(run):
    heading, first, *rest = show(run, "pairs", iteration=1, limit=5)
    assert heading == "iteration 1: pairs 1 to 5 of 12 (page 1 of 3)" and len(rest) == 4
    row = read_rows(run / "tables/1-pairs.parquet")[0]
    assert row["example_id"] in first and "q 0.9 | m 0 | w 1" in first and "FLAGGED in 2 of 2 passes" in first
    assert row["messages"][0]["content"] in first
    assert f"chosen (score 0.700, gold {row['gold_chosen']:.3f})" in first
    assert first.index(row["chosen"][:20]) < first.index("rejected (score") < first.index(row["rejected"][:20])


def test_a_wrong_label_is_named_exactly_where_gold_disagrees(run):
    rows = {row["example_id"]: row for row in read_rows(run / "tables/2-pairs.parquet")}
    blocks = list(show(run, "pairs", limit=100))[1:]
    named = {example_id for example_id in rows for block in blocks if example_id in block and "WRONG LABEL" in block}
    assert named == {i for i, row in rows.items() if row["gold_chosen"] < row["gold_rejected"]} != set()


def test_the_last_iteration_is_the_default_and_pages_join_up(run):
    pages = [list(show(run, "pairs", limit=5, page=page)) for page in (1, 2, 3)]
    assert pages[2][0] == "iteration 2: pairs 11 to 12 of 12 (page 3 of 3)"
    ids = [row["example_id"] for row in read_rows(run / "tables/2-pairs.parquet")]
    assert [next(i for i in ids if i in block) for page in pages for block in page[1:]] == ids


def test_flagged_pairs_only(run):
    heading, *blocks = show(run, "pairs", flagged=True)
    assert heading == "iteration 2: flagged pairs 1 to 3 of 3 (page 1 of 1)" and len(blocks) == 3
    assert all("FLAGGED" in block for block in blocks)


def test_answers_with_prompt_reason_tokens_and_reward(run):
    heading, *blocks = show(run, "answers", iteration=1, limit=2, page=2)
    assert heading == "iteration 1: prompts 3 to 4 of 12 (page 2 of 6)" and len(blocks) == 2
    row = read_rows(run / "tables/1-answers.parquet")[5]
    reward = next(s["reward"] for s in read_rows(run / "tables/1-scores.parquet") if s["sample_id"] == row["sample_id"])
    expected = f"answer 1 ({row['finish_reason']}, {len(row['token_ids'])} tokens, reward {reward:.3f})"
    assert expected in blocks[0] and "note, number 2" in blocks[0] and "answer 0 (" in blocks[0]


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    run = fake_run(tmp_path, iterations=1, prompts=12, hostile=True)
    text = "\n".join([*show(run, "pairs", limit=50), *show(run, "answers", limit=50)])
    assert "\x1b" not in text and "\u202e" not in text and "␛[2J" in text and "(empty)" in text
    assert "x" * 400 in text  # a long word is not cut up


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"what": "pears"}, "choose 'pairs' or 'answers'"),
        ({"what": "pairs", "iteration": 7}, "iteration 7 has no pairs .*; there are 1, 2"),
        ({"what": "pairs", "page": 4, "limit": 5}, "page 4 does not exist; 12 pairs make 3 pages of 5"),
        ({"what": "pairs", "limit": 0}, "at least 1"),
        ({"what": "answers", "flagged": True}, "only pairs are flagged"),
    ],
)
def test_what_does_not_exist_is_refused_at_once(run, arguments, message):
    with pytest.raises(UserError, match=message):
        show(run, **arguments)  # without reading a block


def test_no_run_no_iteration_no_flags(tmp_path):
    with pytest.raises(UserError, match="no run there"):
        show(tmp_path / "nothing", "pairs")
    with pytest.raises(UserError, match="no answers made yet"):
        show(fake_run(tmp_path / "young", iterations=0), "answers")
    plain = fake_run(tmp_path / "plain", iterations=1, flags=False, gold=False)
    with pytest.raises(UserError, match="iteration 1 has no flags"):
        show(plain, "pairs", flagged=True)
    assert "gold" not in "".join(show(plain, "pairs")) and "WRONG" not in "".join(show(plain, "pairs"))


def test_a_closed_pipe_ends_quietly():
    command = f'"{sys.executable}" -c "{PRINT}" 200000 | head -1'
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("block 0\n", "")


def test_on_a_terminal_the_pager_reads_it():
    parent, child = pty.openpty()
    environment = {**os.environ, "PAGER": "sed s/block/paged/"}
    subprocess.run([sys.executable, "-c", PRINT, "2"], stdout=child, env=environment, timeout=60, check=True)
    os.close(child)
    assert os.read(parent, 1000).split() == [b"paged", b"0", b"paged", b"1"]
    os.close(parent)
