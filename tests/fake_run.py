"""A plausible run's folder, made up in milliseconds: for tests of what a person looks at."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from align_loop.record import ANSWERS, EXAMPLES, FLAGS, GOLD, PROMPTS, SCORES, prompt_id, short_digest, write_table

HOSTILE = [
    "<script>alert('owned')</script><img src=x onerror=alert(1)>",
    "\x1b[2J\x1b[31mred\x07 and \u202eolleh\u202c <|im_end|> </s> [INST]",
    "x" * 400,
    "שלום עולם, זה טקסט מימין לשמאל. مرحبا بالعالم",
    "",
    "{{ 7 * 7 }} {% raw %} ]]> --> </style></svg>",
]
WORDS = "kind letter from the garden to a friend about rain and quiet trains with warm sentences, one joke".split(" ")


def fake_run(
    run_dir: Path,
    iterations: int = 4,
    gold: bool = True,
    drift_at: int | None = None,
    hostile: bool = False,
    prompts: int = 30,
    flags: bool = True,
) -> Path:
    """Write a run's folder and return it; ``drift_at`` is the iteration at which it collapses."""
    rng = random.Random(7)
    messages = [[{"role": "user", "content": f"Write a short note, number {i}, about {rng.choice(WORDS)}."}]
                for i in range(prompts)]  # fmt: skip
    prompt_rows = [{"prompt_id": prompt_id(m), "messages": m} for m in messages]
    write_table(run_dir / "tables/prompts.parquet", prompt_rows, PROMPTS)
    names = ["sft", "seed", *(f"iteration-{i}" for i in range(1, iterations + 1))]
    quality = [_quality(number, drift_at) for number in range(-1, iterations + 1)]
    index = {"prompts": "tables/prompts.parquet", "policies": [], "iterations": []}
    for name, level in zip(names, quality, strict=True):
        index["policies"].append(_policy(run_dir, name, level, prompt_rows, rng, gold, hostile))
    for number in range(1, iterations + 1):
        index["iterations"].append(_iteration(run_dir, number, prompt_rows, rng, gold, flags, hostile))
    rows = [
        _metrics(name, i - 1, level, gold, drift_at) for i, (name, level) in enumerate(zip(names, quality, strict=True))
    ]
    write_metrics(run_dir, rows)
    (run_dir / "index.json").write_text(json.dumps(index))
    (run_dir / "summary.json").write_text(json.dumps(_summary(names, rows, drift_at)))
    (run_dir / "config.yaml").write_text("seed: 1\nrecipe:\n  name: selfie <b>\n  beta: 0.1\n")
    return run_dir


def write_metrics(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """``RUN_DIR/metrics.jsonl`` from ``rows``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _quality(number: int, drift_at: int | None) -> float:
    if drift_at is not None and number >= drift_at:
        return 0.45 - 0.1 * (number - drift_at)
    return 0.63 if number < 0 else 0.71 + 0.17 * (1 - 0.55**number)


def _text(rng: random.Random, level: float, hostile: bool) -> str:
    if hostile:
        return rng.choice(HOSTILE)
    words = [rng.choice(WORDS) for _ in range(rng.randint(12, 60))]
    return " ".join(words).capitalize() + ("." if rng.random() < level else "")


def _answer_rows(name: str, rows: list[dict], rng: random.Random, level: float, hostile: bool, n: int) -> list[dict]:
    answers = []
    for row in rows:
        for k in range(n):
            text = _text(rng, level, hostile)
            answers.append({
                "sample_id": short_digest(name, row["prompt_id"], k), "prompt_id": row["prompt_id"], "k": k,
                "text": text, "token_ids": list(range(len(text.split()) + 1)), "prompt_token_ids": [1, 2],
                "finish_reason": "length" if rng.random() < 0.08 else "stop",
            })  # fmt: skip
    return answers


def _gold_rows(answers: list[dict], rng: random.Random, level: float) -> list[dict]:
    noise = lambda: min(1.0, max(0.0, round(rng.gauss(level, 0.18), 2)))  # noqa: E731
    return [{"sample_id": a["sample_id"], "prompt_id": a["prompt_id"], "gold": noise()} for a in answers]


def _policy(
    run_dir: Path, name: str, level: float, prompts: list[dict], rng: random.Random, gold: bool, hostile: bool
) -> dict:
    answers = _answer_rows(name, prompts, rng, level, hostile, n=1)
    write_table(run_dir / f"tables/{name}-answers.parquet", answers, ANSWERS)
    entry = {"policy": name, "iteration": 0, "answers": f"tables/{name}-answers.parquet", "gold": None}
    if gold:
        entry["gold"] = f"tables/{name}-gold.parquet"
        write_table(run_dir / entry["gold"], _gold_rows(answers, rng, level), GOLD)
    return entry


def _iteration(
    run_dir: Path, number: int, prompts: list[dict], rng: random.Random, gold: bool, flags: bool, hostile: bool
) -> dict:
    paths = {name: f"tables/{number}-{name}.parquet" for name in ("pairs", "flags", "answers", "scores")}
    answers = _answer_rows(f"it{number}", prompts, rng, 0.7, hostile, n=2)
    write_table(run_dir / paths["answers"], answers, ANSWERS)
    scores = [{"sample_id": a["sample_id"], "prompt_id": a["prompt_id"], "reward": rng.gauss(0, 1)} for a in answers]
    write_table(run_dir / paths["scores"], scores, SCORES)
    pairs = []
    for row, one, two in zip(prompts, answers[::2], answers[1::2], strict=True):
        pairs.append({
            "example_id": short_digest("pair", number, row["prompt_id"]), "prompt_id": row["prompt_id"],
            "messages": row["messages"], "chosen": one["text"], "rejected": two["text"], "score_chosen": 0.7,
            "score_rejected": -0.2, "gold_chosen": round(rng.random(), 2) if gold else None,
            "gold_rejected": round(0.6 * rng.random(), 2) if gold else None, "q": 0.9, "tag": "self",
            "chosen_truncated": False, "rejected_truncated": rng.random() < 0.1,
        })  # fmt: skip
    write_table(run_dir / paths["pairs"], pairs, EXAMPLES)
    decisions = [
        {"example_id": p["example_id"], "step": step, "detector_margin": rng.gauss(0.5, 1), "alpha_active": True,
         "flagged": i % 5 == 0} for step in (1, 2) for i, p in enumerate(pairs)]  # fmt: skip
    write_table(run_dir / paths["flags"], decisions, FLAGS)
    return {"iteration": number, **paths, "flags": paths["flags"] if flags else None}


def _metrics(name: str, number: int, level: float, gold: bool, drift_at: int | None) -> dict[str, Any]:
    iteration = max(number, 0)
    looped, judged = number >= 1, number >= 0
    drifted = drift_at is not None and number >= drift_at
    interval = lambda mean, half: [round(mean - half, 3), round(mean + half, 3)]  # noqa: E731
    return {
        "policy": name, "iteration": iteration, "good": not drifted,
        "gold_reward": level if gold else None, "gold_reward_ci95": interval(level, 0.021) if gold else None,
        "win_rate_vs_sft": min(0.97, 0.5 + 1.3 * (level - 0.63)) if gold and judged else None,
        "win_rate_vs_previous": 0.57 - 0.01 * iteration if gold and judged else None,
        "judge_accuracy": 0.76 + 0.02 * iteration if judged else None,
        "judge_accuracy_ci95": interval(0.76 + 0.02 * iteration, 0.04) if judged else None,
        "label_accuracy": 0.79 + 0.01 * iteration if gold and judged else None,
        "flag_share": 0.12 if looped else None, "flag_precision": 0.52 if gold and looped else None,
        "flag_recall": 0.31 if gold and looped else None, "filter_precision": None,
        "filter_dropped": {"tie": 4, "duplicate": 2} if looped else {}, "pairs": 384 if judged else None,
        "mean_answer_tokens": 31.0 + 3.4 * iteration, "truncated_share": 0.01 + 0.012 * iteration,
        "distinct_2": 0.62 - 0.02 * iteration, "implausible_share": 0.01,
        "kl_from_initial": 2.1 * number + 1.4 if judged else 0.0,
        "logp_chosen": -41.0 - 2 * iteration if judged else None,
        "logp_rejected": -48.0 - 4 * iteration if judged else None,
        "tokens": 190000 if looped else 40000, "seconds": 71.2 if looped else 33.0,
        "drift": "answers cut off in 41 % of cases, over the limit of 20 %" if number == drift_at else None,
    }  # fmt: skip


def _summary(names: list[str], rows: list[dict[str, Any]], drift_at: int | None) -> dict[str, Any]:
    stages = [_stage("sft", 58.3, 400_000, {"demonstrations": _rows(3000)}, status="cached")]
    for name in names[1:]:
        stages += [
            _stage(f"{name}/sample", 9.0, 90_000, {"answers": _rows(780)}),
            _stage(f"{name}/annotate", 7.5, 95_000, {"answers": _rows(780)}),
            _stage(f"{name}/build", 0.4, 0, {"pairs": _rows(390, {"tie": 4, "duplicate": 2})}),
            _stage(f"{name}/train", 31.0, 180_000, {}, {"engine": "vllm", "flag_rate": 0.1171875}),
        ]
    good = [row["policy"] for row in rows if row["good"]]
    return {
        "experiment": "selfie_iter4", "setting": "embedded", "seed": 1, "iterations": len(names) - 2,
        "engine": "vllm", "stages": stages, "final_policy": good[-1], "drift": None,
    }  # fmt: skip


def _stage(
    name: str, seconds: float, tokens: int, rows: dict, facts: dict | None = None, status: str = "ran"
) -> dict[str, Any]:
    return {"name": name, "status": status, "seconds": seconds, "tokens": tokens, "rows": rows, "facts": facts or {}}


def _rows(count: int, dropped: dict[str, int] | None = None) -> dict[str, Any]:
    return {"in": count, "out": count - sum((dropped or {}).values()), "dropped": dropped or {}}
