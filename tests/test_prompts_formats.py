"""Every layout gives the same record rows, and whatever a row holds, it is a row, a drop or an error of one line."""

import json
import re

import pyarrow.parquet as pq
import pytest
from format_rows import BAD, GOOD, SYSTEM, TURNS, message, one, placed, transcript
from hypothesis import given, settings
from hypothesis import strategies as st

from align_loop import record
from align_loop.errors import UserError
from align_loop.prompts import formats

PREFERENCE_LAYOUTS = {
    "hh": ("hh", {"chosen": transcript(TURNS, GOOD), "rejected": transcript(TURNS, BAD + " \n")}),
    "hh, open prompt beside": (
        "hh",
        {
            "prompt": transcript(TURNS) + "\n\nAssistant:",
            "chosen": transcript(TURNS, GOOD),
            "rejected": transcript(TURNS, BAD),
        },
    ),
    "hh prompt, plain answers": (
        None,
        {"prompt": transcript(TURNS) + "\n\nAssistant:", "chosen": GOOD, "rejected": BAD},
    ),
    "messages": (
        "messages",
        {"chosen": [*TURNS, message(GOOD)], "rejected": [*TURNS, message(BAD)], "score_chosen": 3},
    ),
    "ultrafeedback": (
        "messages",
        {
            "prompt": TURNS[-1]["content"] + "\n",
            "chosen": [*TURNS, message(GOOD)],
            "rejected": [*TURNS, message(BAD)],
            "messages": [*TURNS, message(GOOD)],
        },
    ),
    "trl conversational": ("messages", {"prompt": TURNS, "chosen": [message(GOOD)], "rejected": [message(BAD)]}),
    "trl, later turns too": (
        "messages",
        {"prompt": TURNS[:1], "chosen": [*TURNS[1:], message(GOOD)], "rejected": [*TURNS[1:], message(BAD)]},
    ),
    "prompt list, answers as text": ("prompt", {"prompt": TURNS, "chosen": GOOD, "rejected": BAD, "system": None}),
}


@pytest.mark.parametrize("name", PREFERENCE_LAYOUTS)
@pytest.mark.parametrize("system", [False, True])
def test_all_preference_layouts_give_the_same_row(name, system):
    format, row = PREFERENCE_LAYOUTS[name]
    row = {**row, "system": SYSTEM["content"]} if system else row
    expected = [SYSTEM, *TURNS] if system else TURNS
    for choice in {"auto", format or "auto"}:
        got = one(formats.preferences, row, format=choice)
        assert (got["messages"], got["chosen"], got["rejected"]) == (expected, GOOD, BAD)
        assert got["prompt_id"] == record.prompt_id(expected)
        assert got["example_id"] == record.short_digest(got["prompt_id"], GOOD, BAD)
        assert json.loads(got["meta"]) == {"file": "some.jsonl", "line": 1}
        assert set(got) == set(record.PREFERENCES.names)


def test_a_system_text_before_the_first_speaker():
    with_text = one(
        formats.preferences,
        {"chosen": transcript(TURNS, GOOD, "Be brief."), "rejected": transcript(TURNS, BAD, "Be brief.")},
    )
    assert with_text["messages"] == [SYSTEM, *TURNS]
    blank = one(formats.preferences, {"chosen": transcript(TURNS, GOOD, " \n"), "rejected": transcript(TURNS, BAD)})
    assert blank["messages"] == TURNS


def test_a_blank_system_message_is_no_system_message():
    row = {"chosen": [{"role": "system", "content": ""}, *TURNS, message(GOOD)], "rejected": [*TURNS, message(BAD)]}
    with pytest.raises(UserError, match="disagree from turn 1"):
        formats.preferences(placed(row))
    row["rejected"] = [{"role": "system", "content": ""}, *row["rejected"]]
    assert one(formats.preferences, row)["messages"] == TURNS
    row["chosen"][0]["content"] = row["rejected"][0]["content"] = " \n"
    assert one(formats.preferences, row)["messages"] == TURNS
    assert one(formats.preferences, {**row, "system": "Be brief."})["messages"] == [SYSTEM, *TURNS]


def test_a_prompt_list_may_leave_out_the_system_turn_of_the_conversation():
    row = {"prompt": TURNS, "chosen": [SYSTEM, *TURNS, message(GOOD)], "rejected": [SYSTEM, *TURNS, message(BAD)]}
    assert one(formats.preferences, row)["messages"] == [SYSTEM, *TURNS]


def test_text_stays_text_where_the_format_says_so():
    row = {"prompt": "Human: hi\n\nAssistant:", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": " <|system|> "}
    got = one(formats.preferences, row, format="prompt")
    assert got["messages"] == [{"role": "user", "content": row["prompt"]}]
    assert (got["chosen"], got["rejected"]) == (row["chosen"], row["rejected"])


def test_an_answer_that_goes_on_as_a_dialogue_stays_one_answer_beside_a_prompt():
    answer = "Sure.\n\nHuman: thanks\n\nAssistant: welcome"
    got = one(formats.preferences, {"prompt": "Write a dialogue.", "chosen": answer, "rejected": answer + "!"})
    assert (got["chosen"], got["rejected"]) == (answer, answer + "!")


DEMONSTRATION_ROWS = [
    {"messages": [*TURNS, message(GOOD)]},
    {"messages": [*TURNS, message(GOOD)], "prompt": TURNS[0]["content"], "prompt_id": "x"},  # UltraChat
    *({"prompt": TURNS, key: GOOD} for key in ("answer", "completion", "response", "output", "chosen")),
    {"prompt": TURNS, "completion": [message(GOOD)]},
    {"text": transcript(TURNS, GOOD)},
    {"chosen": transcript(TURNS, GOOD), "rejected": transcript(TURNS, BAD)},
    {"chosen": [*TURNS, message(GOOD)]},
]


@pytest.mark.parametrize("row", DEMONSTRATION_ROWS)
def test_all_demonstration_layouts_give_the_same_row(row):
    got = one(formats.demonstrations, row)
    assert (got["messages"], got["answer"], got["prompt_id"]) == (TURNS, GOOD, record.prompt_id(TURNS))
    assert set(got) == set(record.DEMONSTRATIONS.names)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS},
        {"prompt": TURNS, "answer": GOOD},
        {"prompt": [*TURNS, message(GOOD)]},
        {"messages": TURNS},
        {"messages": [*TURNS, message(GOOD)]},
        {"text": transcript(TURNS, GOOD)},
        {"text": transcript(TURNS)},
        {"prompt": transcript(TURNS) + "\n\nAssistant:"},
        {"chosen": transcript(TURNS, GOOD)},
        *(row for _, row in PREFERENCE_LAYOUTS.values()),
    ],
)
def test_all_prompt_layouts_give_the_same_row(row):
    got = one(formats.prompts, row)
    assert (got["messages"], got["prompt_id"]) == (TURNS, record.prompt_id(TURNS))
    assert set(got) == set(record.PROMPTS.names)


def test_instructions_with_and_without_input():
    def user(text):
        return [{"role": "user", "content": text}]

    assert one(formats.prompts, {"instruction": "Add.", "input": "1 2"})["messages"] == user("Add.\n\n1 2")
    assert one(formats.prompts, {"instruction": "Add.", "input": ""})["messages"] == user("Add.")
    assert one(formats.demonstrations, {"instruction": "Add.", "output": "3"})["answer"] == "3"


def test_format_prompt_takes_the_prompt_column_of_a_preference_file():
    row = {"prompt": TURNS[0]["content"], "chosen": [*TURNS, message(GOOD)], "rejected": [*TURNS, message(BAD)]}
    assert one(formats.prompts, row)["messages"] == TURNS
    assert one(formats.prompts, row, format="prompt")["messages"] == TURNS[:1]


def test_repetitions_and_useless_rows_are_dropped_and_counted():
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    swapped = {"prompt": "q", "chosen": "b", "rejected": "a"}  # a contradicting label is a label
    useless = [{**row, "rejected": "a "}, {**row, "rejected": " "}, {**row, "chosen": "", "rejected": ""}]
    rows, dropped = formats.preferences(placed(row, swapped, {**row, "score": 2}, *useless))
    assert [(r["chosen"], r["rejected"], json.loads(r["meta"])["line"]) for r in rows] == [("a", "b", 1), ("b", "a", 2)]
    assert dropped == {"duplicate row": 1, "identical answers": 1, "empty answer": 2}

    rows, dropped = formats.demonstrations(
        placed(
            {"prompt": "q", "answer": "a"},
            {"prompt": "q", "answer": "b"},
            {"prompt": "q", "answer": "a"},
            {"prompt": "q", "answer": "\n"},
        )
    )
    assert len(rows) == 2 and dropped == {"duplicate row": 1, "empty answer": 1}

    rows, dropped = formats.prompts(
        placed({"prompt": "q"}, {"prompt": "p"}, {"messages": [{"role": "user", "content": "q"}]})
    )
    assert len(rows) == 2 and dropped == {"duplicate prompt": 1}

    prompts, dropped = formats.prompts_of(formats.preferences(placed(row, swapped))[0])
    assert [p["prompt_id"] for p in prompts] == [record.prompt_id([{"role": "user", "content": "q"}])]
    assert dropped == {"duplicate prompt": 1} and set(prompts[0]) == set(record.PROMPTS.names)


def test_bad_rows_can_be_dropped_instead():
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows, dropped = formats.preferences(placed({"prompt": "x"}, good, {"chosen": 1, "rejected": 2}), bad_rows="drop")
    assert len(rows) == 1 and dropped == {"malformed row": 2}
    with pytest.raises(UserError, match="bad_rows='skip' is unknown"):
        formats.preferences(placed(good), bad_rows="skip")
    with pytest.raises(UserError, match="format='alpaca' is unknown; use one of auto, hh, messages, prompt"):
        formats.preferences(placed(good), format="alpaca")


# Text out of the pieces that could be taken for layout.
_PIECES = ["Human:", "Assistant", ":", "\n", "\n\n", " ", "a", "é", "🙂", "\u2028", "<|im_end|>", "\x1c"]
_TEXT = st.lists(st.sampled_from(_PIECES), max_size=8).map("".join)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | _TEXT | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content"]), inner | st.sampled_from(["user", "assistant"]), max_size=2
        )
    ),
    max_leaves=6,
)
_KEYS = ["prompt", "chosen", "rejected", "messages", "text", "answer", "instruction", "input", "system", "scores"]


_MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": _TEXT})
_VALUE = _TEXT | _JSON | st.lists(_MESSAGE, max_size=4)
_ROW = st.builds(
    lambda whole, change: {**whole, **change},  # a usable row with a few of its values exchanged
    st.sampled_from([{}, *DEMONSTRATION_ROWS, *(row for _, row in PREFERENCE_LAYOUTS.values())]),
    st.dictionaries(st.sampled_from(_KEYS), _VALUE, max_size=3),
)


@settings(deadline=None)
@given(_ROW, st.sampled_from(formats.FORMATS))
def test_whatever_a_row_holds_it_is_a_row_a_drop_or_one_line(tmp_path_factory, row, format):
    schemas = {
        formats.preferences: record.PREFERENCES,
        formats.demonstrations: record.DEMONSTRATIONS,
        formats.prompts: record.PROMPTS,
    }
    for parse, schema in schemas.items():
        try:
            rows, dropped = parse(placed(row), format=format)
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith("dir/some.jsonl: line 1: ")
            continue
        assert len(rows) + sum(dropped.values()) == 1
        path = tmp_path_factory.getbasetemp() / "row.parquet"
        record.write_table(path, rows, schema)  # what is accepted can be stored
        assert pq.read_table(path).to_pylist() == rows


_CONTENT = _TEXT.map(str.strip).filter(lambda text: text and not re.search(r"\n\n(Human|Assistant):", text))


@settings(deadline=None)
@given(st.lists(st.tuples(_CONTENT, _CONTENT), max_size=2), _CONTENT, _CONTENT, _CONTENT)
def test_any_conversation_survives_the_transcript_form(history, last, good, bad):
    turns = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    turns.append({"role": "user", "content": last})
    row = {"chosen": transcript(turns, good), "rejected": transcript(turns, bad)}
    rows, dropped = formats.preferences(placed(row))
    if good == bad:
        assert (rows, dropped) == ([], {"identical answers": 1})
    else:
        assert (rows[0]["messages"], rows[0]["chosen"], rows[0]["rejected"]) == (turns, good, bad)
