"""The report's plots as SVG text to be set into the page: same numbers, same bytes.

Colours come from the page: matplotlib draws in stand-in colours that are replaced by CSS variables, so that the
plots follow the page's light or dark scheme. The series colours are Okabe and Ito's, made for all kinds of
colour vision; markers differ too.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
TEXT, GRID = "#010203", "#040506"  # stand-ins for the page's text and line colours
SIZE = (5.2, 2.9)  # inches; 374 points wide, so that 9-point text stays legible on a phone
_STYLE = {
    "svg.hashsalt": "align_loop", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
    "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.6, "lines.markersize": 5,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One plot over the policies: its heading, what it shows, the series (key -> label) and the axis label."""

    name: str
    title: str
    caption: str
    y_label: str
    series: dict[str, str]
    limits: tuple[float | None, float | None] = (None, None)
    reference: float | None = None  # a dashed line, such as one half for win rates


PLOTS = [
    Plot("gold", "Gold reward", "Mean gold reward of the answers to the evaluation prompts, with 95\u00a0% intervals.",
         "gold reward (0 to 1)", {"gold_reward": "gold reward"}),
    Plot("wins", "Win rate", "Share of evaluation prompts on which the policy's answer beats the other policy's. The "
         "dashed line is one half.",
         "win rate", {"win_rate_vs_sft": "against sft", "win_rate_vs_previous": "against the previous policy"},
         (0, 1), 0.5),
    Plot("judge", "Judges and labels", "Implicit reward, reward model: share of held-out pairs that the judge orders "
         "as people did, with 95\u00a0% intervals. Labels: share of the iteration's pairs that are in the gold "
         "reward's order.", "share right",
         {"judge_accuracy": "implicit reward", "reward_model_accuracy": "reward model", "label_accuracy": "labels"},
         (None, None), 0.5),
    Plot("noise", "Noise detector", "Flagged: share of the pairs. Precision: flagged pairs whose label is wrong. "
         "Recall: wrong labels that were flagged.", "share",
         {"flag_share": "pairs flagged", "flag_precision": "precision", "flag_recall": "recall"}, (0, 1)),
    Plot("length", "Answer length", "Mean length of the answers to the evaluation prompts.", "tokens per answer",
         {"mean_answer_tokens": "tokens"}, (0, None)),
    Plot("shape", "Signs of collapse", "Share of answers cut at the token limit, of answers that the initial policy "
         "finds less likely than 99\u00a0% of its own, and of distinct bigrams: a rise of the first two or a fall of "
         "the third is an early sign of collapse.", "share",
         {"truncated_share": "cut off", "implausible_share": "implausible", "distinct_2": "distinct bigrams"}, (0, 1)),
    Plot("kl", "Distance from the initial policy", "KL divergence of the policy from the initial one.",
         "KL (nats per answer)", {"kl_from_initial": "KL"}, (0, None)),
    Plot("logp", "Likelihood of the pairs", "Mean log-probability of the chosen and the rejected answers. Both falling "
         "is common in preference training; chosen falling faster than rejected is not a good sign.",
         "log-probability (nats)", {"logp_chosen": "chosen", "logp_rejected": "rejected"}),
]  # fmt: skip


def policy_plots(rows: list[Row]) -> list[dict[str, str]]:
    """A figure (name, title, caption, svg) for each of ``PLOTS`` that has a value in some row."""
    figures = []
    for plot in PLOTS:
        if any(row.get(key) is not None for row in rows for key in plot.series):
            svg = _svg(plot.name, plot.title, lambda axes, plot=plot: _draw_policies(axes, plot, rows))
            figures.append({"name": plot.name, "title": plot.title, "caption": plot.caption, "svg": svg})
    return figures


def cost_plots(costs: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, str]]:
    """Stacked bars of seconds and of tokens; ``costs``: "seconds"/"tokens" -> kind of stage -> group -> amount."""
    figures = []
    wording = {
        "seconds": ("Time", "Wall-clock time of the stages, as recorded when each one ran."),
        "tokens": ("Tokens", "Tokens generated, scored or trained on."),
    }
    for name, (title, caption) in wording.items():
        kinds = costs.get(name, {})
        if any(amount for groups in kinds.values() for amount in groups.values()):
            svg = _svg(name, title, lambda axes, name=name, kinds=kinds: _draw_costs(axes, name, kinds))
            figures.append({"name": name, "title": title, "caption": caption, "svg": svg})
    return figures


def short_label(policy: str) -> str:
    """``iteration-3`` as 3, any other name as it is (matplotlib's math signs made harmless)."""
    return policy.removeprefix("iteration-").replace("$", r"\$")


def _draw_policies(axes: Axes, plot: Plot, rows: list[Row]) -> None:
    for index, (key, label) in enumerate(plot.series.items()):
        values = [math.nan if row.get(key) is None else row[key] for row in rows]
        if all(math.isnan(value) for value in values):
            continue
        style = {"color": SERIES[index], "marker": MARKERS[index], "label": label, "clip_on": False}
        axes.plot(range(len(rows)), values, **style)
        _draw_intervals(axes, rows, key, values, SERIES[index])
    _mark_drift(axes, rows)
    if plot.reference is not None:
        axes.axhline(plot.reference, color=TEXT, linewidth=0.8, linestyle=(0, (4, 3)))
    low, high = plot.limits
    if low is not None or high is not None:
        axes.set_ylim(low, high)
    axes.margins(x=0.06, y=0.12)
    axes.set_ylabel(plot.y_label)
    _policy_axis(axes, rows)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=1.6, columnspacing=1.2)


def _draw_intervals(axes: Axes, rows: list[Row], key: str, values: list[float], color: str) -> None:
    intervals = [row.get(f"{key}_ci95") or [math.nan, math.nan] for row in rows]
    lows, highs = [low for low, _ in intervals], [high for _, high in intervals]
    if all(math.isnan(low) for low in lows):
        return
    axes.fill_between(range(len(rows)), lows, highs, color=color, alpha=0.18, linewidth=0)
    axes.vlines(range(len(rows)), lows, highs, color=color, linewidth=1.2)


def _mark_drift(axes: Axes, rows: list[Row]) -> None:
    bad = [index for index, row in enumerate(rows) if not row.get("good", True)]
    if bad:
        axes.axvspan(bad[0] - 0.5, len(rows) - 0.5, color=GRID, alpha=0.5, linewidth=0)
        label = {"xycoords": ("data", "axes fraction"), "va": "bottom", "fontsize": 8}
        axes.annotate(" drift", (bad[0] - 0.5, 0.02), **label)


def _policy_axis(axes: Axes, rows: list[Row]) -> None:
    labels = [short_label(row["policy"]) for row in rows]
    step = max(1, math.ceil(len(labels) / 14))
    axes.set_xticks(range(0, len(labels), step), labels[::step])
    axes.set_xlim(-0.5, len(labels) - 0.5)
    numbered = any(label.isdigit() for label in labels)
    axes.set_xlabel("policy (a number is an iteration)" if numbered else "policy")


def _draw_costs(axes: Axes, name: str, kinds: dict[str, dict[str, float]]) -> None:
    groups = list(dict.fromkeys(group for amounts in kinds.values() for group in amounts))
    groups.sort(key=lambda group: (group.isdigit(), int(group) if group.isdigit() else 0))
    totals = [sum(amounts.get(group, 0) for amounts in kinds.values()) for group in groups]
    scale, unit = _unit(name, max(totals))
    bottoms = [0.0] * len(groups)
    for index, (kind, amounts) in enumerate(kinds.items()):
        heights = [amounts.get(group, 0) / scale for group in groups]
        if any(heights):
            bars = axes.bar(range(len(groups)), heights, 0.62, bottom=bottoms, label=kind, color=SERIES[index])
            for bar in bars:  # an empty bar on top of another would take the margin above it
                bar.sticky_edges.y[:] = [0]
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(groups)), [short_label(group) for group in groups])
    axes.set_xlim(-0.7, len(groups) - 0.3)
    axes.set_xlabel("iteration" if any(group.isdigit() for group in groups) else "")
    axes.set_ylabel(unit)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, handlelength=1, columnspacing=1.2)


def _unit(name: str, largest: float) -> tuple[float, str]:
    units = {
        "seconds": [(3 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds")],
        "tokens": [(1e6, 1e6, "million tokens"), (1e3, 1e3, "thousand tokens"), (0, 1, "tokens")],
    }[name]
    return next((scale, unit) for least, scale, unit in units if largest >= least)


def _svg(name: str, title: str, draw: Callable[[Axes], None]) -> str:
    """What ``draw`` puts on fresh axes, as an SVG element with ids of its own and the page's colours."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.add_subplot())
        handle = io.StringIO()
        figure.savefig(handle, format="svg", transparent=True)
    svg = handle.getvalue()
    svg = svg[svg.index("<svg") :]
    # Its date would change the bytes every time.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # its selector * would reach the whole page
    svg = re.sub(r"font-family: [^;]*;", "font-family: system-ui, sans-serif;", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', svg)
    for index, color in enumerate(SERIES):
        svg = svg.replace(color, f"var(--series-{index})")
    return svg.replace(TEXT, "currentColor").replace(GRID, "var(--grid)")
