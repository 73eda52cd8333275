"""The README's page on parts of one's own, done to the letter: its file, its command."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

from align_loop.record import read_rows
from runs.conftest import ROOT, TINY, environment


def test_the_readmes_own_parts_run(tmp_path):
    page = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own part")[1].split("\n## ")[0]
    code, command = re.search(r"```python\n(.*?)```", page, re.S), re.search(r"```\n(python -m .*?)```", page, re.S)
    (tmp_path / "my_parts.py").write_text(code.group(1))
    given = shlex.split(command.group(1).replace("\\\n", " "))[1:]
    line = [sys.executable, *given, *TINY, "loop.iterations=1", "run_dir=run"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    (scores,) = (tmp_path / "run" / "store").glob("iteration-1-annotate-*")
    rewards = {row["reward"] for row in read_rows(scores / "scores.parquet")}
    assert len(rewards) > 1 and all(2 * reward == int(2 * reward) for reward in rewards)
    (pairs,) = (tmp_path / "run" / "store").glob("iteration-1-pairs-*")
    kept, gone = (read_rows(pairs / f"{name}.parquet") for name in ("examples", "dropped"))
    assert all(row["chosen"].endswith(".") for row in kept) and kept
    assert {row["reason"] for row in gone} <= {"another ending"}

    misspelt = [*line, "+annotator.scal=1"]
    refused = subprocess.run(misspelt, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment())
    assert refused.returncode == 2 and "annotator.scal=1: unknown key; did you mean scale?" in refused.stderr

    file = tmp_path / "my_parts.py"
    file.write_text(file.read_text().replace("len(asked", "1 + len(asked"))
    plan = [sys.executable, *given[:2], "plan", *given[2:], *TINY, "loop.iterations=1", "run_dir=run"]
    shown = subprocess.run(plan, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment()).stdout
    status = {text.split()[0]: text.split()[1] for text in shown.splitlines() if "/" in text.split()[0]}
    assert status["sft/train"] == "cached" and status["seed/pairs"] == status["iteration-1/annotate"] == "stale"
