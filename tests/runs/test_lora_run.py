"""``selfie_iter4 +lora``: one adapter through the loop, and a final model that needs no PEFT."""

from __future__ import annotations

import json
import subprocess
import sys

from align_loop.record import read_rows
from runs.conftest import TINY, align, environment, metrics


def test_lora_runs_end_to_end(tmp_path):
    run_dir = tmp_path / "run"
    rates = ["setting.training.seed.learning_rate=3e-3", "setting.training.iteration.learning_rate=3e-3"]
    align("+experiment=selfie_iter4", "+lora", *TINY, *rates, "loop.iterations=2", f"run_dir={run_dir}")
    assert [row["policy"] for row in metrics(run_dir)] == ["sft", "seed", "iteration-1", "iteration-2"]
    for iteration in (1, 2):
        (scores,) = (run_dir / "store").glob(f"iteration-{iteration}-annotate-*/scores.parquet")
        rewards = [row["reward"] for row in read_rows(scores)]
        assert max(map(abs, rewards)) > 1e-3 and len({round(r, 6) for r in rewards}) > len(rewards) // 2
    for name in ("seed", "iteration-1"):
        (manifest,) = (run_dir / "store").glob(f"{name}-train-*/manifest.json")
        facts = json.loads(manifest.read_text())["facts"]
        assert facts["step0_margin"] < 1e-3 and facts["merge_probe"] < 1e-3
    assert (run_dir / "final" / "adapter" / "adapter_config.json").is_file()
    load = (
        "import sys; sys.modules['peft'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(run_dir / 'final')!r}, local_files_only=True)"
    )
    subprocess.run([sys.executable, "-c", load], check=True, env=environment())
