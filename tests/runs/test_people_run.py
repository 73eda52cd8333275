"""A run that stops for people: its least certain pairs go out, their labels come back, and the run goes on."""

from __future__ import annotations

import json

import pytest

from align_loop.__main__ import main
from align_loop.labels import read_labels
from align_loop.record import read_rows

SMALL = [
    "+experiment=selfie_iter4",
    "setting=embedded_small",
    "setting.model={hidden: 32, layers: 2, heads: 1, intermediate: 64}",
    "setting.demonstrations=100",
    "setting.pairs=160",
    "setting.labelled=40",
    "setting.eval_prompts=8",
    "setting.prompt_sets={2: [12, 12]}",
    "setting.training.iteration.batch_size=4",
    "loop.iterations=2",
    "noise=none",
    "sampler.n=3",
    "sampler.engine=hf",
    "hardware.threads=1",
    "tracking.mode=off",
]


@pytest.mark.run
def test_people_decide_what_the_loop_is_least_sure_of(tmp_path, capsys):
    run_dir, file = tmp_path / "run", tmp_path / "pairs.jsonl"
    given = [*SMALL, f"run_dir={run_dir}"]
    assert main([*given, "loop.until=iteration-1/annotate"]) == 0
    assert main(["export-pairs", str(run_dir), "--iteration", "1", "--number", "4", "--out", str(file)]) == 0
    people = [*given, "annotator=people", f"annotator.file={file}", "annotator.gap=6"]
    capsys.readouterr()
    assert main(people) == 2 and "row 1: better is empty" in capsys.readouterr().err
    rows = [json.loads(line) | {"better": "2"} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(people) == 0
    index = json.loads((run_dir / "index.json").read_text())
    assert index["unfinished"] is None and len(index["iterations"]) == 2
    first, second = (read_rows(entry["scores"]) for entry in index["iterations"])
    reward = {row["sample_id"]: row["reward"] for row in first}
    made = [row for table in ("pairs", "dropped") for row in read_rows(index["iterations"][0][table])]
    for label in read_labels(file):
        assert reward[label.second] - reward[label.first] == pytest.approx(6, abs=1e-3)
        pairs = [row for row in made if row["prompt_id"] == label.prompt_id]
        assert [row["chosen_sample_id"] for row in pairs] == [label.second]  # what is trained on
    assert len(second) == 36 and all(row["logp_reference"] < 0 for row in second)
    done = {stage["name"]: stage for stage in json.loads((run_dir / "summary.json").read_text())["stages"]}
    assert done["iteration-1/annotate"]["facts"]["labels"] == {"of these answers": 4, "of others": 0}
    assert done["iteration-2/annotate"]["facts"]["labels"] == {"of these answers": 0, "of others": 4}
    assert done["iteration-1/sample"]["status"] == "cached"
