"""The report page: complete, self-contained, the same bytes each time, and harmless whatever a model wrote."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from fake_run import fake_run, write_metrics

from align_loop.errors import UserError
from align_loop.report.html import dropped_rows, stage_costs, stage_kind, write_report
from align_loop.report.samples import choose_prompts
from align_loop.report.text import clip, duration, prompt_text, visible


class Page(HTMLParser):
    """The elements, links and visible text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = fake_run(tmp_path_factory.mktemp("run"), iterations=2)
    write_report(path)
    return path


def test_report_holds_every_section_and_needs_nothing_from_outside(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    sections = ["Noise detector", "Rows dropped, and why", "Costs", "Answer length", "seed/sample", "largest gain"]
    for words in ["selfie_iter4 in embedded", "Gold reward rose from 0.63 (sft)", "duplicate", "recipe:", *sections]:
        assert words in page.text
    assert page.tags.count("svg") == 10 and "script" not in page.tags
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert links and all(value.startswith("#") for value in links)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))  # or one plot would be clipped by another's frame
    assert set(re.findall(r"url\((.*?)\)", text)) == {f"#{i}" for i in ids if f"url(#{i})" in text}


def test_same_files_same_bytes(run):
    first = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == first


def test_hostile_answers_are_shown_and_do_nothing(tmp_path):
    text = write_report(fake_run(tmp_path, iterations=1, hostile=True)).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "img" not in page.tags and "b" in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<script>alert('owned')</script>" in page.text and "{{ 7 * 7 }}" in page.text
    assert "שלום עולם" in page.text and "\u202e" not in text and "⟨U+202E⟩" in page.text
    assert "\x1b" not in text and "␛[31mred␇" in page.text and "empty answer" in page.text


def test_one_policy_nulls_and_missing_files_make_a_page(tmp_path):
    write_metrics(tmp_path, [{"policy": "sft", "gold_reward": None}])
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "not measured" in page.text and "svg" not in page.tags and tmp_path.name in page.text
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No policy was evaluated." in write_report(tmp_path).read_text(encoding="utf-8")


def test_drift_is_marked(tmp_path):
    page = Page(write_report(fake_run(tmp_path, iterations=3, drift_at=3)).read_text(encoding="utf-8"))
    assert "Drift: iteration-3: answers cut off in 41 %" in page.text
    assert ("class", "bad") in page.attributes and " drift" in page.text and "!" not in page.text


def test_no_run_is_an_error_that_names_the_runs_beside_it(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/index.json").write_text("{}")
    with pytest.raises(UserError, match=r"other: no run there; runs in .*: mine"):
        write_report(tmp_path / "other")


def test_a_missing_table_is_named(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"prompts": "p.parquet", "policies": [{"answers": "a.parquet"}]}))
    with pytest.raises(UserError, match=r"p.parquet: named in .*index.json but missing"):
        write_report(tmp_path)


def test_prompts_shown_include_the_largest_changes_both_ways_and_repeat():
    ids = [f"{i:03d}" for i in range(50)]
    changes = {"007": 0.9, "011": -0.8, "012": 0.1, "013": 0.0}
    chosen = choose_prompts(ids, changes)
    assert chosen[:3] == [("007", "largest gain"), ("012", "largest gain"), ("011", "largest loss")]
    assert len(chosen) == 12 and len({p for p, _ in chosen}) == 12
    assert chosen == choose_prompts(ids, dict(reversed(changes.items())))
    assert [p for p, _ in chosen[3:]] == sorted(p for p, _ in chosen[3:])
    assert chosen[-1][0] > "040"  # spread over all of them, not the first twelve
    assert [p for p, _ in choose_prompts(["a", "b"], {})] == ["a", "b"]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"name": "iteration-2/sample"}, ("sample", "2")), ({"name": "seed/train"}, ("train", "seed")),
        ({"name": "annotate-iter3"}, ("annotate", "3")), ({"name": "sft"}, ("sft", "setup")),
        ({"name": "x", "kind": "train", "iteration": 4}, ("train", "4")),
    ],
)  # fmt: skip
def test_stage_kind(stage, expected):
    assert stage_kind(stage) == expected


def test_costs_add_up_and_small_kinds_become_other():
    stages = [{"name": f"iteration-1/kind{i}", "seconds": 10 - i, "tokens": 0} for i in range(9)]
    stages.append({"name": "iteration-2/kind0", "seconds": 5.0, "tokens": 7})
    costs = stage_costs(stages)
    assert sum(sum(groups.values()) for groups in costs["seconds"].values()) == sum(s["seconds"] for s in stages)
    assert costs["seconds"]["kind0"] == {"1": 10, "2": 5.0} and costs["seconds"]["other"] == {"1": 4 + 3 + 2}
    assert list(costs["tokens"]) == list(costs["seconds"])  # the same colours
    assert costs["tokens"]["kind0"] == {"1": 0, "2": 7}


def test_dropped_rows_come_from_stages_else_from_the_metrics():
    stages = [{"name": "build", "rows": {"pairs": {"in": 9, "out": 7, "dropped": {"tie": 2}}}}]
    metrics = [{"policy": "seed", "filter_dropped": {"low margin": 3}}, {"policy": "sft", "filter_dropped": None}]
    (line,) = dropped_rows(metrics, stages)
    assert (line["where"], line["into"], line["out"], line["reason"], line["dropped"]) == ("build", 9, 7, "tie", 2)
    (line,) = dropped_rows(metrics, [])
    assert (line["where"], line["reason"], line["dropped"]) == ("seed", "low margin", 3)


def test_text_helpers():
    assert visible("a\tb\nc\x00\x7f\x9b\u2066é") == "a\tb\nc␀␡⟨U+009B⟩⟨U+2066⟩é"
    assert clip("abcdef", 4) == "abcd … (2 more characters)" and clip("abcd", 4) == "abcd"
    system = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert prompt_text(system) == "[system] S\n[user] U" and prompt_text(system[1:]) == "U"
    assert [duration(s) for s in (None, 8.12, 59.96, 125, 11220)] == [
        "",
        "8.1 s",
        "1 min 00 s",
        "2 min 05 s",
        "3 h 07 min",
    ]
