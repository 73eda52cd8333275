"""Which evaluation prompts the report shows, and the answers of every policy to each, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from align_loop.report.run_files import table_path
from align_loop.report.text import clip, prompt_text, visible

COUNT = 12  # prompts shown
EXTREMES = 3  # of them with the largest gain, and as many with the largest loss
ANSWER_LIMIT, PROMPT_LIMIT = 2000, 3000  # characters

Answers = dict[str, dict[str, Any]]  # prompt id -> the policy's first answer to it


def side_by_side(run_dir: Path, index: dict[str, Any]) -> list[dict[str, Any]]:
    """For each prompt shown: its text, why it was chosen, its change in gold, and an entry for each policy.

    ``index`` is the run's ``index.json``. Without prompts or answers there the list is empty.
    """
    policies = [entry for entry in index.get("policies") or [] if entry.get("answers")]
    if not policies or not index.get("prompts"):
        return []
    prompts = {row["prompt_id"]: row for row in _read(run_dir, index["prompts"], ["prompt_id", "messages"])}
    answers = [_answers(run_dir, entry) for entry in policies]
    changes = _gold_changes(answers[0], answers[-1]) if len(answers) > 1 else {}
    shown = []
    for prompt_id, reason in choose_prompts(sorted(prompts), changes):
        text = clip(prompt_text(prompts[prompt_id]["messages"]), PROMPT_LIMIT)
        entries = [_entry(policy, known.get(prompt_id)) for policy, known in zip(policies, answers, strict=True)]
        shown.append({"prompt": text, "reason": reason, "change": changes.get(prompt_id), "answers": entries})
    return shown


def choose_prompts(prompt_ids: list[str], changes: dict[str, float], count: int = COUNT) -> list[tuple[str, str]]:
    """``count`` prompts (id, reason): the largest gains and losses in gold, then an even spread over all ids.

    Depends on its arguments alone; ties are broken by id. Ids are digests, so that an even spread over
    the sorted ids is a sample that nobody picked by its contents.
    """
    ranked = sorted((change, prompt_id) for prompt_id, change in changes.items())
    losses = [(p, "largest loss") for change, p in ranked[:EXTREMES] if change < 0]
    gains = [(p, "largest gain") for change, p in ranked[::-1][:EXTREMES] if change > 0]
    chosen = {p for p, _ in gains + losses}
    others = [p for p in prompt_ids if p not in chosen]
    wanted = min(max(count - len(chosen), 0), len(others))
    spread = [others[i * len(others) // wanted] for i in range(wanted)]
    return gains + losses + [(p, "not picked by score") for p in spread]


def _gold_changes(first: Answers, last: Answers) -> dict[str, float]:
    both = {p: (first[p]["gold"], last[p]["gold"]) for p in first if p in last}
    return {p: after - before for p, (before, after) in both.items() if before is not None and after is not None}


def _answers(run_dir: Path, entry: dict[str, Any]) -> Answers:
    """The policy's answer with the lowest ``k`` for each prompt, with its gold score where there is one."""
    gold: dict[str, float] = {}
    if entry.get("gold"):
        gold = {row["sample_id"]: row["gold"] for row in _read(run_dir, entry["gold"], ["sample_id", "gold"])}
    known: Answers = {}
    columns = ["sample_id", "prompt_id", "k", "text", "finish_reason"]
    for row in sorted(_read(run_dir, entry["answers"], columns), key=lambda row: (row["prompt_id"], row["k"])):
        known.setdefault(row["prompt_id"], {**row, "gold": gold.get(row["sample_id"])})
    return known


def _entry(policy: dict[str, Any], answer: dict[str, Any] | None) -> dict[str, Any]:
    if answer is None:
        return {"policy": policy["policy"], "text": None, "gold": None, "cut": False}
    text = clip(visible(answer["text"]), ANSWER_LIMIT)
    cut = answer["finish_reason"] == "length"
    return {"policy": policy["policy"], "text": text, "gold": answer["gold"], "cut": cut}


def _read(run_dir: Path, path: str, columns: list[str]) -> list[dict[str, Any]]:
    return pq.read_table(table_path(run_dir, path), columns=columns).to_pylist()
