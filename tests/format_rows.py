"""Conversations, and rows with a place in a file, for the tests of file formats."""

import pytest

from align_loop.errors import UserError
from align_loop.prompts.files import Origin

TURNS = [
    {"role": "user", "content": "What does 'Assistant: hi' mean?\nAssistant: is a word here."},
    {"role": "assistant", "content": "A label.\n\nNothing more."},
    {"role": "user", "content": "Und auf Ελληνικά? 你好 🙂 <|im_end|></s>[INST]"},
]
GOOD, BAD = "Έτσι: «ετικέτα»\n\n- a list", "No."
SYSTEM = {"role": "system", "content": "Be brief."}


def transcript(turns, answer=None, system=""):
    names = {"user": "Human", "assistant": "Assistant"}
    parts = [f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns]
    return system + "".join(parts) + ("" if answer is None else f"\n\nAssistant: {answer}")


def message(answer):
    return {"role": "assistant", "content": answer}


def placed(*rows):
    return [(Origin("dir/some.jsonl", "some.jsonl", "line", n), row) for n, row in enumerate(rows, 1)]


def one(parse, row, **options):
    rows, dropped = parse(placed(row), **options)
    assert dropped == {} and len(rows) == 1
    return rows[0]


def error_of(parse, row, **options):
    with pytest.raises(UserError) as caught:
        parse(placed({"prompt": "fine", "chosen": "a", "rejected": "b", "messages": [*TURNS, message("c")]}, row)[1:])
    text = str(caught.value)
    assert text.startswith("dir/some.jsonl: line 2: ") and "\n" not in text and len(text) < 600
    return text
