"""Two data-parallel processes (gloo) train a reward model as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reward_fixtures import CPU, change, toy_pairs, train, weights
from tiny import tiny_llama

from align_loop.trainers.config import TrainingConfig
from align_loop.trainers.reward import load_start
from align_loop.trainers.reward_config import RewardModel

TRAINING = TrainingConfig(learning_rate=2e-3, epochs=2, batch_size=8)
KIND = RewardModel(members=2, centring=0.1)


def run(out: Path, base: Path) -> None:
    examples = toy_pairs(21)  # the last batch has 5 pairs: the processes get different numbers and some padding
    train(out, base, examples, training=TRAINING, reward_model=KIND, hardware={**CPU, "micro_batch_size": 2})


@pytest.mark.full
def test_two_processes_give_the_weights_and_log_of_one(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    run(tmp_path / "one", base)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, str(tmp_path / "two"), str(base)], check=True, timeout=240, env=environment)
    load_start(base, 1, 5, CPU).save_pretrained(tmp_path / "start")
    start = weights(tmp_path / "start")
    for member in ("member-1", "member-2"):
        assert change(start, tmp_path / "two" / member, tmp_path / "one" / member) <= 1e-4
    logs = [(tmp_path / name / "train_log.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 12  # written once, by the first process
    for one, two in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert (tmp_path / "two" / "reward_model.json").read_bytes() == (
        tmp_path / "one" / "reward_model.json"
    ).read_bytes()


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
