"""The closing table of a run and its one-sentence verdict, from the metrics rows alone.

The verdict never says more than the 95 % intervals do: two means count as different only where their
intervals don't overlap (stricter than a test of the difference, so an error on the careful side).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from align_loop.report.text import duration

Row = dict[str, Any]
WIDTH = 100


@dataclass(frozen=True)
class Column:
    """One column: where it comes from, its two header lines, how a row is shown, and how soon it may be left out."""

    key: str
    header: tuple[str, str]
    show: Callable[[Row], str]
    keep: int  # when the table is too wide, the column with the highest number goes first


def number(key: str, digits: int) -> Callable[[Row], str]:
    """Shows ``row[key]`` with ``digits`` decimals and thousands separators; empty for null."""
    return lambda row: "" if row.get(key) is None else f"{row[key]:,.{digits}f}"


def percent(key: str) -> Callable[[Row], str]:
    """Shows the share ``row[key]`` in percent; a small share that isn't zero keeps one decimal."""

    def show(row: Row) -> str:
        share = row.get(key)
        if share is None:
            return ""
        return f"{100 * share:.1f}%" if 0 < share < 0.0995 else f"{100 * share:.0f}%"

    return show


def with_interval(key: str, digits: int) -> Callable[[Row], str]:
    """Shows ``row[key]`` followed by its 95 % interval, where there is one."""

    def show(row: Row) -> str:
        value, interval = row.get(key), row.get(f"{key}_ci95")
        if value is None or interval is None:
            return "" if value is None else f"{value:.{digits}f}"
        low, high = (f"{bound:.2f}".removeprefix("0") for bound in interval)
        return f"{value:.{digits}f} [{low}, {high}]"

    return show


def _policy(row: Row) -> str:
    return f"{row['policy']}{'' if row.get('good', True) else ' !'}"


COLUMNS = [
    Column("policy", ("", "policy"), _policy, 0),
    Column("gold_reward", ("gold reward", "[95% interval]"), with_interval("gold_reward", 3), 0),
    Column("win_rate_vs_sft", ("wins", "v sft"), percent("win_rate_vs_sft"), 1),
    Column("win_rate_vs_previous", ("wins", "v prev"), percent("win_rate_vs_previous"), 4),
    Column("judge_accuracy", ("judge", "accuracy"), with_interval("judge_accuracy", 2), 1),
    Column("reward_model_accuracy", ("rm", "accuracy"), percent("reward_model_accuracy"), 2),
    Column("label_accuracy", ("labels", "right"), percent("label_accuracy"), 2),
    Column("flag_share", ("pairs", "flagged"), percent("flag_share"), 5),
    Column("flag_precision", ("flags", "right"), percent("flag_precision"), 8),
    Column("flag_recall", ("wrong", "found"), percent("flag_recall"), 9),
    Column("filter_precision", ("filter", "right"), percent("filter_precision"), 9),
    Column("pairs", ("", "pairs"), number("pairs", 0), 7),
    Column("mean_answer_tokens", ("tokens/", "answer"), number("mean_answer_tokens", 1), 3),
    Column("truncated_share", ("cut", "off"), percent("truncated_share"), 4),
    Column("distinct_2", ("distinct", "2-grams"), percent("distinct_2"), 10),
    Column("implausible_share", ("implau-", "sible"), percent("implausible_share"), 8),
    Column("kl_from_initial", ("KL", "nats"), number("kl_from_initial", 2), 3),
    Column("logp_chosen", ("logp", "chosen"), number("logp_chosen", 1), 11),
    Column("logp_rejected", ("logp", "rejected"), number("logp_rejected", 1), 11),
    Column("tokens", ("", "tokens"), number("tokens", 0), 6),
    Column("seconds", ("", "time"), lambda row: duration(row.get("seconds")), 5),
]


def filled_columns(rows: list[Row]) -> list[Column]:
    """The columns that hold a value in some row."""
    return [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]


def drift_notes(rows: list[Row]) -> list[str]:
    """The sentences of the drift monitor, each with its policy."""
    return [f"{row['policy']}: {row['drift']}" for row in rows if row.get("drift")]


def closing_table(rows: list[Row]) -> str:
    """The rows as an aligned table of at most 100 columns, then a line for each sign of drift.

    Columns without any value are left out; where the rest is too wide, the least telling go first (all of
    them are in ``report.html``), beginning with the judge's interval while there is a gold reward.
    """
    if not rows:
        return "no policy was evaluated"
    columns = filled_columns(rows)
    if any(column.key == "gold_reward" for column in columns):
        plain = Column("judge_accuracy", ("judge", "accuracy"), percent("judge_accuracy"), 1)
        columns = [plain if column.key == "judge_accuracy" else column for column in columns]
    while len(lines := _aligned(columns, rows)) and len(lines[0]) > WIDTH and len(columns) > 2:
        columns.remove(max(columns, key=lambda column: column.keep))
    notes = [f"! drift at {note}" for note in drift_notes(rows)]
    return "\n".join([line.rstrip() for line in lines] + notes)


def _aligned(columns: list[Column], rows: list[Row]) -> list[str]:
    cells = [[column.header[line] for column in columns] for line in (0, 1)]
    cells += [[column.show(row) or "-" for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    cells = [[line[0].ljust(widths[0]), *line[1:]] for line in cells]  # names to the left, numbers to the right
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return [*lines[:2], "─" * len(lines[0]), *lines[2:]]


def verdict(rows: list[Row], summary: dict[str, Any]) -> str:
    """One sentence that says what the run showed, and no more than its intervals allow.

    ``summary["final_policy"]`` names the policy in ``final/``; without it the last good row counts.
    """
    if not rows:
        return "No policy was evaluated."
    first, last = rows[0], _final_row(rows, summary)
    drifted = next((row for row in rows if not row.get("good", True)), None)
    if drifted is None:
        return _capital(_change(rows, first, last)) + "."
    # Drift alone doesn't say that the answers got worse: the gold reward does, where it was measured.
    fell = _relation(last, rows[-1], "gold_reward") == "below"
    head = f"got worse: gold reward fell {_means(last, rows[-1], 'gold_reward')}" if fell else "the loop was stopped"
    reason = f" ({str(drifted['drift']).rstrip('.')})" if drifted.get("drift") else ""
    kept = f"final/ is {last['policy']}" + (", the policy before the drift" if last.get("good", True) else "")
    before = f"; up to there, {_change(rows, first, last)}" if last is not first else ""
    return _capital(f"{head}; drift at {drifted['policy']}{reason}; {kept}{before}.")


def judges(rows: list[Row]) -> str | None:
    """Which judge was the more accurate one on the held-out labels, where both were measured on the same policy."""
    both = [r for r in rows if r.get("reward_model_accuracy") is not None and r.get("judge_accuracy") is not None]
    if not both:
        return None
    row = both[-1]
    shown = [f"{name} {_mean_of(row, key)}" for name, key in JUDGES.items()]
    model, implicit = (row[key] for key in JUDGES.values())
    apart = _apart(row["reward_model_accuracy_ci95"], row["judge_accuracy_ci95"])
    said = f"the {'reward model' if model > implicit else 'implicit reward'} is the more accurate judge"
    said = said if apart else "no measurable difference between the judges (intervals overlap)"
    return f"On the held-out labels, at {row['policy']}: {', '.join(shown)}; {said}."


JUDGES = {"reward model": "reward_model_accuracy", "implicit reward": "judge_accuracy"}


def _apart(one: list[float], two: list[float]) -> bool:
    return one[0] > two[1] or two[0] > one[1]


def _mean_of(row: Row, key: str) -> str:
    low, high = row[f"{key}_ci95"]
    return f"{row[key]:.2f} [{low:.2f}, {high:.2f}]"


def _final_row(rows: list[Row], summary: dict[str, Any]) -> Row:
    named = [row for row in rows if row["policy"] == summary.get("final_policy")]
    good = [row for row in rows if row.get("good", True)]
    return (named or good or rows)[-1]


def _change(rows: list[Row], first: Row, last: Row) -> str:
    """From the first policy to the final one, in gold reward where there is one, else in judge accuracy."""
    gold = [row for row in rows if row.get("gold_reward") is not None]
    if gold and last.get("gold_reward") is not None:
        return _measured_change(gold, gold[0], last)
    unmeasured = "the quality of the answers was not measured (there is no gold reward here)"
    judged = [row for row in rows if row.get("judge_accuracy") is not None]
    if not judged:
        return f"{unmeasured}, nor was the judge: read the answers side by side"
    if judged[0] is judged[-1]:
        return f"{unmeasured}; judge accuracy is {_mean(judged[0], 'judge_accuracy')}"
    return f"{unmeasured}; {_words(judged[0], judged[-1], 'judge_accuracy', 'judge accuracy')}"


def _measured_change(rows: list[Row], first: Row, last: Row) -> str:
    if first is last:
        where = "nothing to compare it with" if len(rows) == 1 else "no later policy was kept"
        return f"gold reward {_mean(first, 'gold_reward')}; {where}"
    words = _words(first, last, "gold_reward", "gold reward")
    if _relation(first, last, "gold_reward") == "below":
        words = f"got worse: {words}"
    seed = next((row for row in rows if row["policy"] == "seed"), None)
    if seed is None or seed is first or seed is last:
        return words
    relation = _relation(seed, last, "gold_reward")
    than = f"the seed policy's {seed['gold_reward']:.2f}"
    phrases = {
        "above": f"above {than} with intervals apart",
        "below": f"below {than} with intervals apart",
        "overlap": f"not measurably different from {than} (intervals overlap)",
        "no interval": f"against {than} (no intervals to compare)",
    }
    return f"{words}, {phrases[relation]}" if relation else words


def _words(first: Row, last: Row, key: str, name: str) -> str:
    """How ``name`` went from ``first`` to ``last``, in words that its intervals allow."""
    means = _means(first, last, key)
    return {
        "above": f"{name} rose {means}",
        "below": f"{name} fell {means}",
        "overlap": f"no measurable change in {name}: {means}, intervals overlap",
        "no interval": f"{name} went {means}; without intervals this may be chance",
    }[_relation(first, last, key)]


def _relation(base: Row, other: Row, key: str) -> str:
    """Where ``other`` lies: "above", "below", "overlap", "no interval", or "" where a mean is missing."""
    if base.get(key) is None or other.get(key) is None:
        return ""
    one, two = base.get(f"{key}_ci95"), other.get(f"{key}_ci95")
    if one is None or two is None:
        return "no interval"
    if two[0] > one[1]:
        return "above"
    return "below" if two[1] < one[0] else "overlap"


def _means(first: Row, last: Row, key: str) -> str:
    return f"from {first[key]:.2f} ({first['policy']}) to {last[key]:.2f} ({last['policy']})"


def _mean(row: Row, key: str) -> str:
    interval = row.get(f"{key}_ci95")
    bounds = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    return f"{row[key]:.2f}{bounds} ({row['policy']})"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
