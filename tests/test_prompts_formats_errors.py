"""A row that cannot be used is named and explained in one line."""

import re

import pytest
from format_rows import SYSTEM, error_of, placed, transcript

from align_loop.errors import UserError
from align_loop.prompts import formats

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
MISSHAPEN_MESSAGES = [
    ([], "empty list"),
    ([USER, "text"], "message 2"),
    ([{"from": "human", "value": "q"}, BOT], "'role' and 'content'"),
    ([{"role": "human", "content": "q"}, BOT], "unknown role 'human'"),
    ([{"role": None, "content": "q"}, BOT], "unknown role None"),
    ([{"role": ["user"], "content": "q"}, BOT], "unknown role"),
    ([{"role": "user", "content": None}, BOT], "content of message 1"),
    ([{"role": "user", "content": [{"type": "text", "text": "q"}]}, BOT], "must be text"),
    ([{"role": "user", "content": " "}, BOT], "prompt is empty in turn 1"),
    ([{"role": "user", "content": "\ud800"}, BOT], "surrogate"),
    ([USER, SYSTEM, USER, BOT], "system turn stands after"),
    ([SYSTEM, BOT], "prompt is empty"),
    ([USER, BOT, BOT], "begin and end with a user turn"),
]
BAD_PREFERENCES = [
    ({}, "no key 'chosen' (the row has no keys)"),
    ({"prompt": "q", "choosen": "a", "rejected": "b"}, "no key 'chosen' (did you mean 'choosen'?)"),
    ({"prompt": "q", "chosen": "a", "Rejected": "b"}, "no key 'rejected' (did you mean 'Rejected'?)"),
    ({"prompt": "q", "chosen": "a", "rejected": None}, "'rejected' is null"),
    ({"prompt": "q", "chosen": 1, "rejected": "b"}, "format not recognised (seen: 'prompt': str, 'chosen': int"),
    ({"prompt": "q", "chosen": "a", "rejected": [BOT]}, "'rejected': list"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is 3 (int); it must be text"),
    ({"prompt": {"a": 1}, "chosen": "a", "rejected": "b"}, "(dict)"),
    ({"prompt": " \n", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, "'prompt' is an empty list"),
    ({"prompt": [BOT, USER], "chosen": "a", "rejected": "b"}, "begin and end with a user turn"),
    ({"prompt": [USER, BOT], "chosen": "a", "rejected": "b"}, "begin and end with a user turn"),
    ({"prompt": "q\udc00", "chosen": "a", "rejected": "b"}, "'prompt' holds half of a surrogate pair"),
    ({"prompt": "q", "chosen": "a\ud83d", "rejected": "b"}, "'chosen' holds half of a surrogate pair"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "system": 1}, "'system' is 1 (int)"),
    ({"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b", "system": "Be long."}, "'system' differs"),
    ({"instruction": " ", "chosen": "a", "rejected": "b"}, "'instruction' is empty"),
    ({"chosen": "a", "rejected": "b"}, "format not recognised (seen: 'chosen': str, 'rejected': str)"),
    ({"chosen": [BOT], "rejected": [BOT]}, "there is no 'prompt'"),
    ({"prompt": "else", "chosen": [USER, BOT], "rejected": [USER, BOT]}, "'prompt' ('else') is not in 'chosen'"),
    ({"chosen": [USER, BOT], "rejected": [{**USER, "content": "p"}, BOT]}, "disagree from turn 1"),
    ({"chosen": [USER, BOT], "rejected": [USER, BOT, USER, BOT]}, "disagree from turn 2"),
    ({"chosen": [USER], "rejected": [USER, BOT]}, "'chosen' ends with a turn of role user"),
    ({"chosen": [USER, BOT], "rejected": [USER]}, "'rejected' ends with a turn of role user"),
    (
        {"chosen": transcript([USER], "a"), "rejected": transcript([{**USER, "content": "p"}], "b")},
        "disagree from turn 1",
    ),
    ({"chosen": transcript([USER], "a"), "rejected": transcript([USER, BOT, USER])}, "'rejected' ends with a turn"),
    (
        {"chosen": transcript([{**USER, "content": ""}], "a"), "rejected": "\n\nHuman: \n\nAssistant: b"},
        "prompt is empty",
    ),
    ({"chosen": "\n\nAssistant: a\n\nHuman: q", "rejected": "\n\nAssistant: a\n\nHuman: q"}, "no 'prompt'"),
    ({"prompt": "multi\nline\n" * 50, "chosen": [USER, BOT], "rejected": [USER, BOT]}, "is not in 'chosen'"),
    *(({"chosen": messages, "rejected": messages}, said) for messages, said in MISSHAPEN_MESSAGES),
]
BAD_DEMONSTRATIONS = [
    ({"prompt": "q", "anwser": "a"}, "format not recognised"),
    ({"text": "no transcript"}, "'text' is no transcript"),
    ({"text": 5}, "'text' is 5 (int)"),
    ({"messages": "text"}, "'messages' is 'text' (str)"),
    ({"messages": [USER]}, "ends with a turn of role user"),
    ({"answer": "a"}, "format not recognised"),
    ({"prompt": "q", "answer": 4}, "format not recognised"),
    *(({"messages": messages}, said) for messages, said in MISSHAPEN_MESSAGES),
]
BAD_PROMPTS = [
    ({"question": "q"}, "format not recognised (seen: 'question': str)"),
    ({"prompt": ""}, "'prompt' is empty"),
    ({"prompt": True}, "'prompt' is True (bool)"),
    ({"prompt": ["q"]}, "message 1 of 'prompt'"),
    ({"instruction": 1}, "'instruction' is 1"),
    ({"messages": [BOT]}, "there is no 'prompt'"),
    ({"chosen": "a"}, "format not recognised"),
    *(({"messages": messages}, said) for messages, said in MISSHAPEN_MESSAGES[:-1]),
]


@pytest.mark.parametrize(("row", "said"), BAD_PREFERENCES)
def test_bad_preferences_are_explained(row, said):
    assert said in error_of(formats.preferences, row)


@pytest.mark.parametrize(("row", "said"), BAD_DEMONSTRATIONS)
def test_bad_demonstrations_are_explained(row, said):
    assert said in error_of(formats.demonstrations, row)


@pytest.mark.parametrize(("row", "said"), BAD_PROMPTS)
def test_bad_prompts_are_explained(row, said):
    assert said in error_of(formats.prompts, row)


def test_an_unrecognised_row_names_what_is_supported():
    text = error_of(formats.preferences, {"chosen": "a", "rejected": "b"})
    assert "hh transcripts" in text and "message lists" in text and "'prompt'" in text


@pytest.mark.parametrize(
    ("format", "row", "said"),
    [
        ("hh", {"chosen": [USER, BOT], "rejected": [USER, BOT]}, "must be text"),
        ("hh", {"chosen": "a", "rejected": "b"}, "'chosen' is no transcript"),
        ("messages", {"prompt": "q", "chosen": "a", "rejected": "b"}, "must be a list of messages"),
        ("prompt", {"prompt": "q", "chosen": [BOT], "rejected": [BOT]}, "must be text"),
        ("prompt", {"chosen": "a", "rejected": "b"}, "there is no 'prompt'"),
    ],
)
def test_a_named_format_is_held_to(format, row, said):
    with pytest.raises(UserError, match=re.escape(said)):
        formats.preferences(placed(row), format=format)
