"""Evaluation of one policy: its answers to held-out prompts, and its judgement of held-out labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from align_loop.durable import write_json
from align_loop.evaluators.statistics import distinct_n, mean_interval, wilson_interval, win_rate
from align_loop.parts import part
from align_loop.record import Row, read_rows
from align_loop.render import Renderer
from align_loop.stage import StageContext


@dataclass
class PolicyEvaluator:
    """How policies are evaluated: one answer to each held-out prompt at ``temperature`` (null: the sampler's)."""

    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"evaluator.temperature={self.temperature} must be 0 (greedy) or more")


def evaluate(config: dict[str, Any], inputs: dict[str, Path], context: StageContext) -> None:
    """The stage: writes ``evaluation.json`` (see ``measure``).

    ``config`` {evaluator, dtype}; inputs ``policy``, ``initial``, ``answers`` (its answers to the held-out prompts),
    ``heldout`` (labelled preferences), and where gold is known ``gold``, ``gold_initial``, ``gold_previous``.
    """
    part(config["evaluator"], "evaluator")
    answers = read_rows(inputs["answers"] / "answers.parquet")
    heldout = read_rows(inputs["heldout"])
    sequences = [(row["prompt_token_ids"], row["token_ids"]) for row in answers] + _sides(heldout, inputs["initial"])
    with context.progress(2 * len(sequences), "answers") as progress:
        logps = {
            name: _score(inputs[name], sequences, config["dtype"], context, progress.update)
            for name in ("policy", "initial")
        }
    gold = {name: _gold(inputs[name]) for name in ("gold", "gold_initial", "gold_previous") if name in inputs}
    context.rows("answers", into=len(answers), out=len(answers))
    context.rows("held-out labels", into=len(heldout), out=len(heldout))
    context.tokens(2 * sum(len(p) + len(a) for p, a in sequences))
    write_json(context.out / "evaluation.json", measure(answers, heldout, logps, gold))


def measure(
    answers: list[Row], heldout: list[Row], logps: dict[str, list[float]], gold: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """The metrics of one policy.

    ``logps``: for ``policy`` and ``initial`` the log-probs (nats) of the answers, then of the held-out labels' chosen
    and rejected sides in turn. ``gold``: prompt id -> gold reward in [0, 1], for this policy and those it is held
    against. Judge accuracy: how often the implicit reward prefers the chosen side (Selfie, equation 7); null for the
    initial policy, whose rewards are all 0. ``initial_logps``: prompt id -> the answer's mean log-prob per token under
    the initial policy (see ``drift.implausible_share``).
    """
    n = len(answers)
    rewards = [p - i for p, i in zip(logps["policy"], logps["initial"], strict=True)]
    agreed = {
        row["example_id"]: float(chosen > rejected)
        for row, chosen, rejected in zip(heldout, rewards[n::2], rewards[n + 1 :: 2], strict=True)
    }
    judged = agreed if any(rewards) else {}
    right = int(sum(judged.values()))
    ours = gold.get("gold")
    mean, interval = mean_interval(list(ours.values())) if ours else (None, None)
    return {
        "gold_reward": mean,
        "gold_reward_ci95": interval,
        "win_rate_vs_sft": win_rate(ours, gold["gold_initial"]) if ours and "gold_initial" in gold else None,
        "win_rate_vs_previous": win_rate(ours, gold["gold_previous"]) if ours and "gold_previous" in gold else None,
        "judge_accuracy": right / len(judged) if judged else None,
        "judge_accuracy_ci95": wilson_interval(right, len(judged)) if judged else None,
        "mean_answer_tokens": fmean(len(row["token_ids"]) for row in answers) if answers else None,
        "truncated_share": fmean(row["finish_reason"] == "length" for row in answers) if answers else None,
        "distinct_2": distinct_n([row["token_ids"] for row in answers]),
        "kl_from_initial": fmean(rewards[:n]) if n else None,
        "logp_chosen": fmean(logps["policy"][n::2]) if heldout else None,
        "logp_rejected": fmean(logps["policy"][n + 1 :: 2]) if heldout else None,
        "heldout": judged,
        "answers": n,
        "initial_logps": {
            row["prompt_id"]: logp / len(row["token_ids"])
            for row, logp in zip(answers, logps["initial"][:n], strict=True)
            if row["token_ids"]
        },
    }


def read_evaluation(stage: Path) -> dict[str, Any]:
    """What ``evaluate`` wrote."""
    return json.loads((stage / "evaluation.json").read_text(encoding="utf-8"))


def _sides(heldout: list[Row], tokenizer: Path) -> list[tuple[list[int], list[int]]]:
    """The held-out labels as sequences: chosen and rejected of each row in turn."""
    renderer = Renderer(tokenizer)
    return [
        (renderer.prompt_ids(row["messages"]), renderer.answer_ids(row[side]))
        for row in heldout
        for side in ("chosen", "rejected")
    ]


def _score(model: Path, sequences: list, dtype: str, context: StageContext, on_done) -> list[float]:
    from align_loop.engines.scoring import load_scorer, sum_logprobs, token_logprobs  # imports torch

    device = context.hardware.get("device") or "cpu"
    return sum_logprobs(
        token_logprobs(
            load_scorer(model, dtype, device),
            sequences,
            pad_id=Renderer(model).pad_id,
            token_budget=context.hardware.get("score_token_budget") or 16384,
            device=device,
            on_done=on_done,
        )
    )


def _gold(stage: Path) -> dict[str, float]:
    return {row["prompt_id"]: row["gold"] for row in read_rows(stage / "gold.parquet")}
