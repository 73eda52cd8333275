"""The study behind the README's figure: how much of 100 % of the labels do 3.3 % replace?

Each of three recipes (``dpo_seed``, ``dpo_full_labels``, ``selfie_iter4``) is tuned on the same grid of learning rate
and epochs with ``--tune-seeds``, and then run with its own best on ``--seeds``, which the tuning has not seen. Selfie's
grid is over the iterations; its seed round is the setting's default (the policy that judges best is not the one that
answers best, so ``dpo_seed`` at its best makes a poor start).

    .venv/bin/python scripts/study.py --dir runs/study              # resumable: start the same command again
    .venv/bin/python scripts/study.py --dir runs/study --report     # only the table and the figure, from what is there

Every run is the ordinary command in a process of its own, ``--jobs`` at a time with one thread each; all share one
store, so the SFT model of a seed is trained once. What a run gave is kept in ``results.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

LEARNING_RATES = (3e-5, 1e-4, 3e-4)
EPOCHS = (1, 2)
# Which of the setting's training blocks a recipe's grid point sets.
BLOCKS = {"dpo_seed": "seed", "dpo_full_labels": "full", "selfie_iter4": "iteration"}
COLOURS = {"selfie_iter4": "#0072B2", "dpo_seed": "#D55E00", "dpo_full_labels": "#009E73"}
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # Student's t, two-sided

Point = tuple[str, float, int]  # recipe, learning rate, epochs
Rows = list[dict[str, Any]]


def main() -> int:
    """Run what is missing, then print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--setting", default="embedded")
    parser.add_argument("--tune-seeds", type=int, nargs="+", default=[101])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    grid = [(recipe, rate, epochs) for recipe in BLOCKS for rate in LEARNING_RATES for epochs in EPOCHS]
    results = run_all([(p, s) for s in options.tune_seeds for p in grid], options)
    best = choose(grid, options.tune_seeds, results)
    results = run_all([(p, s) for s in options.seeds for p in best.values()], options)
    text = table(grid, best, results, options)
    print(text)
    (options.dir / "table.md").write_text(text, encoding="utf-8")
    draw(best, results, options.seeds, options.dir / "curves.png")
    return 0


def run_all(wanted: list[tuple[Point, int]], options: argparse.Namespace) -> dict[tuple[Point, int], Rows]:
    """The metrics of each (grid point, seed), from ``results.jsonl`` or made now."""
    results = read_results(options.dir)
    missing = [item for item in wanted if item not in results]
    if missing and not options.report:
        # One run a seed first: the others then find its data and its SFT model in the store. Then the longest.
        firsts = list({seed: (point, seed) for point, seed in reversed(missing)}.values())
        rest = sorted((m for m in missing if m not in firsts), key=lambda item: -item[0][2])
        for batch in (firsts, rest):
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(lambda item: run_one(*item, options), batch))
        results = read_results(options.dir)
    return results


def run_one(point: Point, seed: int, options: argparse.Namespace) -> None:
    """One run of the command; its metrics are appended to ``results.jsonl``."""
    recipe, rate, epochs = point
    run_dir = options.dir / f"{recipe}-{rate:g}-{epochs}-seed{seed}"
    settings = training(point)
    command = [sys.executable, "-m", "align_loop", f"+experiment={recipe}", f"setting={options.setting}"]
    command += [f"seed={seed}", *settings, f"run_dir={run_dir}", f"store_dir={options.dir / 'store'}"]
    with open(options.dir / f"{run_dir.name}.log", "w", encoding="utf-8") as log:
        quiet = ["tracking.mode=off", "hardware.threads=1"]
        subprocess.run([*command, *quiet], stdout=log, stderr=log, check=True)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    record = {"recipe": recipe, "learning_rate": rate, "epochs": epochs, "seed": seed, "rows": rows}
    with open(options.dir / "results.jsonl", "a", encoding="utf-8") as handle:
        handle.write(json.dumps(record) + "\n")
    print(f"{run_dir.name}: " + " ".join(f"{row['gold_reward']:.3f}" for row in rows), flush=True)


def training(point: Point) -> list[str]:
    """The overrides that set a grid point."""
    recipe, rate, epochs = point
    block = f"setting.training.{BLOCKS[recipe]}"
    return [f"{block}.learning_rate={rate:g}", f"{block}.epochs={epochs}"]


def read_results(folder: Path) -> dict[tuple[Point, int], Rows]:
    """What ``results.jsonl`` holds."""
    file = folder / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines]
    return {((r["recipe"], r["learning_rate"], r["epochs"]), r["seed"]): r["rows"] for r in records}


def final_gold(rows: Rows, guarded: bool = True) -> float:
    """The gold reward of what a run leaves in ``final/``: its last policy before a trip of the drift guard.

    The guard sees no gold. Not ``guarded``: of the last policy, whatever the guard said.
    """
    kept = [row for row in rows if row["good"]] if guarded else rows
    return kept[-1]["gold_reward"]


def choose(grid: list[Point], seeds: list[int], results: dict[tuple[Point, int], Rows]) -> dict[str, Point]:
    """Each recipe's grid point with the highest mean final gold reward over the tuning seeds."""
    done = [p for p in grid if all((p, s) in results for s in seeds)]
    score = {p: fmean(final_gold(results[p, s]) for s in seeds) for p in done}
    recipes = dict.fromkeys(p[0] for p in done)
    return {recipe: max((p for p in done if p[0] == recipe), key=score.__getitem__) for recipe in recipes}


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval by Student's t)."""
    if len(values) < 2:
        return fmean(values), math.nan
    return fmean(values), T95[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def table(
    grid: list[Point], best: dict[str, Point], results: dict[tuple[Point, int], Rows], options: argparse.Namespace
) -> str:
    """The grid and the result as Markdown."""
    lines = [f"Grid (mean final gold reward over tuning seeds {options.tune_seeds}; best in bold):", ""]
    lines += ["| recipe | " + " | ".join(f"{r:g}, {e} ep." for r in LEARNING_RATES for e in EPOCHS) + " |"]
    lines += ["|---|" + "---|" * (len(LEARNING_RATES) * len(EPOCHS))]
    for recipe in BLOCKS:
        cells = []
        for point in (p for p in grid if p[0] == recipe):
            values = [final_gold(results[point, s]) for s in options.tune_seeds if (point, s) in results]
            shown = f"{fmean(values):.3f}" if values else "-"
            cells.append(f"**{shown}**" if best[recipe] == point else shown)
        lines.append(f"| {recipe} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *result_lines(best, results, options.seeds)]) + "\n"


def result_lines(best: dict[str, Point], results: dict[tuple[Point, int], Rows], seeds: list[int]) -> list[str]:
    """Means with intervals over the seeds that every recipe has, and the claim in numbers."""
    common = [s for s in seeds if all((p, s) in results for p in best.values())]
    if not common:
        return ["No result seed is complete yet."]
    finals = {recipe: [final_gold(results[p, s]) for s in common] for recipe, p in best.items()}
    sft = [results[best["dpo_seed"], s][0]["gold_reward"] for s in common]
    lines = [f"Result over seeds {common}:", "", "| policy | gold reward, mean [95 %] |", "|---|---|"]
    for name, values in {"sft": sft, **finals}.items():
        mean, half = interval(values)
        lines.append(f"| {name} | {mean:.3f} [{mean - half:.3f}, {mean + half:.3f}] |")
    gap = fmean(finals["dpo_full_labels"]) - fmean(finals["dpo_seed"])
    last = [final_gold(results[best["selfie_iter4"], s], guarded=False) for s in common]
    tripped = sum(not results[best["selfie_iter4"], s][-1]["good"] for s in common)
    lines += ["", f"The drift guard tripped in {tripped} of {len(common)} runs of selfie_iter4."]
    for what, values in (("final/", finals["selfie_iter4"]), ("last iteration, whatever the guard said,", last)):
        gain, half = interval([a - b for a, b in zip(values, finals["dpo_seed"], strict=True)])
        said = f"selfie_iter4's {what} minus dpo_seed, paired: {gain:+.3f} [{gain - half:+.3f}, {gain + half:+.3f}]"
        lines.append(f"{said}; that is {gain / gap:.0%} of the gap to dpo_full_labels ({gap:+.3f}).")
    return lines


def draw(best: dict[str, Point], results: dict[tuple[Point, int], Rows], seeds: list[int], path: Path) -> None:
    """Gold reward by round of ``selfie_iter4`` and of what it leaves in ``final/``; the baselines as levels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    common = [s for s in seeds if all((p, s) in results for p in best.values())]
    if not common:
        return
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    runs = [results[best["selfie_iter4"], s] for s in common]
    names = [*(row["policy"] for row in runs[0]), "final/"]
    curves = [[*(row["gold_reward"] for row in run), final_gold(run)] for run in runs]
    columns = [interval(list(values)) for values in zip(*curves, strict=True)]
    means = [m for m, _ in columns]
    colour = COLOURS["selfie_iter4"]
    for curve in curves:
        axes.plot(names, curve, color=colour, lw=0.7, alpha=0.5)
    axes.plot(names, means, marker="o", color=colour, label="Selfie, 3.3 % of the labels")
    axes.fill_between(names, [m - h for m, h in columns], [m + h for m, h in columns], color=colour, alpha=0.2, lw=0)
    labels = {"dpo_seed": "DPO on 3.3 % of the labels", "dpo_full_labels": "DPO on 100 % of the labels"}
    for recipe, label in labels.items():
        mean, half = interval([final_gold(results[best[recipe], s]) for s in common])
        axes.axhline(mean, color=COLOURS[recipe], ls="--", label=label)
        axes.axhspan(mean - half, mean + half, color=COLOURS[recipe], alpha=0.12, lw=0)
    axes.set_ylim(top=1.0)
    axes.set_ylabel("gold reward")
    axes.set_title(f"Means of {len(common)} seeds, bands: 95 % intervals; thin: the single runs", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
