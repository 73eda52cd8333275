"""Two data-parallel processes (gloo) train and flag as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pair_fixtures import change, some_examples, some_pairs, train
from test_trainers_mixed import mixed
from tiny import tiny_llama

from align_loop import record
from align_loop.objectives.noise import NoiseHandling
from align_loop.objectives.objective import Objective
from align_loop.objectives.terms import PointTerm
from align_loop.trainers.config import TrainingConfig

EXAMPLES = 21  # the last batch has 5 pairs: the processes get different numbers and some padding
PAIRS = {"pairs": EXAMPLES, "mixed": 6}
TRAINING = TrainingConfig(learning_rate=2e-3, epochs=2, batch_size=8)
NOISE = NoiseHandling(share=0.25, warmup=0.2)


def run(out: Path, policy: Path, table: str) -> None:
    if table == "pairs":
        train(out, policy, some_pairs(EXAMPLES), micro=2, noise=NOISE, training=TRAINING)
    else:
        terms = {**mixed().terms, "dro": PointTerm(loss="dro", kinds=["point"])}
        rows, objective = some_examples(EXAMPLES), Objective(0.2, terms)
        train(out, policy, rows, micro=2, noise=NOISE, training=TRAINING, objective=objective)


@pytest.mark.full
@pytest.mark.parametrize("table", ["pairs", "mixed"])
def test_two_processes_give_the_weights_flags_and_log_of_one(tmp_path: Path, table: str) -> None:
    policy = tiny_llama(tmp_path / "policy")
    run(tmp_path / "one", policy, table)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, str(tmp_path / "two"), str(policy), table], check=True, timeout=240, env=environment)
    assert change(policy, tmp_path / "two" / "model", tmp_path / "one" / "model") <= 1e-4
    flags = [
        [(r["example_id"], r["step"], r["flagged"]) for r in record.read_rows(tmp_path / name / "flags.parquet")]
        for name in ("one", "two")
    ]
    assert flags[0] == flags[1] and len(flags[0]) == 2 * PAIRS[table] and any(row[2] for row in flags[0])
    logs = [(tmp_path / name / "train_log.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 6  # written once, by the first process
    metrics = [[json.loads(line) for line in log] for log in logs]
    for one, two in zip(*metrics, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
