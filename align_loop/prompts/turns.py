"""Conversations as lists of turns: splitting transcripts, checking messages, joining prompt and answer.

The functions know nothing of files. What is wrong with a row they say with ``BadRow``; the caller
adds the file and the line.
"""

from __future__ import annotations

import re
from typing import Any

from align_loop.record import Message

ROLES = ("system", "user", "assistant")

_SPEAKER = {"Human": "user", "Assistant": "assistant"}
# A speaker is named at the start of the text or after an empty line; "Assistant:" within a sentence is text.
_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRow(ValueError):
    """A row that cannot be used: the message says what is wrong with it and what to do, without its place."""


def shown(value: Any, width: int = 60) -> str:
    """``value`` for an error message: its ``repr``, cut at ``width`` characters."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def check_text(value: Any, what: str) -> str:
    """``value`` if it is text that can be stored as UTF-8; else ``BadRow`` naming ``what``."""
    if not isinstance(value, str):
        raise BadRow(f"{what} is {shown(value)} ({type(value).__name__}); it must be text")
    if _SURROGATE.search(value):
        raise BadRow(f"{what} holds half of a surrogate pair, which is no Unicode text; replace that character")
    return value


def starts_as_transcript(text: str) -> bool:
    """Whether ``text`` opens with "Human:" and has an "Assistant:" turn after it."""
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def is_transcript(text: str) -> bool:
    """Whether ``text`` has a turn of each speaker, maybe after a system text."""
    return {mark[1] for mark in _MARK.finditer(text)} == set(_SPEAKER)


def split_transcript(text: Any, what: str) -> list[Message]:
    """The turns of a transcript in the form of Anthropic's hh-rlhf ("\\n\\nHuman: ...\\n\\nAssistant: ...").

    White space around a turn is layout and goes. Text before the first speaker becomes a system turn.
    Raises ``BadRow`` where ``text`` is no such transcript. (Format: Bai et al. 2022, arXiv 2204.05862.)
    """
    text = check_text(text, what)
    marks = list(_MARK.finditer(text))
    if not marks:
        raise BadRow(f"{what} is no transcript ({shown(text)}); write '\\n\\nHuman: ...\\n\\nAssistant: ...'")
    turns = [{"role": "system", "content": text[: marks[0].start()].strip()}]
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=True):
        turns.append({"role": _SPEAKER[mark[1]], "content": text[mark.end() : end].strip()})
    return turns if turns[0]["content"] else turns[1:]


def read_messages(value: Any, what: str) -> list[Message]:
    """``value`` checked to be a non-empty list of {"role", "content"}; other keys of a message are left behind."""
    if not isinstance(value, list):
        raise BadRow(f"{what} is {shown(value)} ({type(value).__name__}); it must be a list of messages")
    if not value:
        raise BadRow(f"{what} is an empty list; it needs at least one message")
    return [_read_message(message, f"message {n} of {what}") for n, message in enumerate(value, 1)]


def _read_message(message: Any, what: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise BadRow(f"{what} is {shown(message)}; it must be an object with 'role' and 'content'")
    if message["role"] not in ROLES:
        raise BadRow(f"{what} has the unknown role {shown(message['role'])}; use system, user or assistant")
    return {"role": message["role"], "content": check_text(message["content"], f"the content of {what}")}


def join(prompt: list[Message] | None, turns: list[Message], what: str) -> list[Message]:
    """The whole conversation: ``turns``, after ``prompt`` where they are only its continuation.

    Turns that open with the assistant continue the prompt. Otherwise they are the conversation already, and
    a prompt given beside them has to agree: as its beginning, or (one turn) as one of its user turns, which
    is what the ``prompt`` column of many public data sets holds. Raises ``BadRow`` where it doesn't.
    """
    if turns[0]["role"] == "assistant":
        if prompt is None:
            raise BadRow(f"{what} opens with an assistant turn and there is no 'prompt'; add the prompt")
        return prompt + turns
    if prompt is not None and not _agrees(prompt, turns):
        raise BadRow(f"'prompt' ({shown(prompt[-1]['content'])}) is not in {what}; make them agree or remove one")
    return turns


def _agrees(prompt: list[Message], turns: list[Message]) -> bool:
    spoken = [turn for turn in turns if turn["role"] != "system"]
    if prompt in (turns[: len(prompt)], spoken[: len(prompt)]):
        return True
    text = prompt[0]["content"].strip()
    return len(prompt) == 1 and any(turn["role"] == "user" and turn["content"].strip() == text for turn in spoken)


def split_answer(turns: list[Message], what: str) -> tuple[list[Message], str]:
    """(the turns before, the text of) the last assistant turn, which has to be the last turn."""
    if turns[-1]["role"] != "assistant":
        raise BadRow(
            f"{what} ends with a turn of role {turns[-1]['role']}; the last turn must be the assistant's answer"
        )
    return turns[:-1], turns[-1]["content"]


def cut_answer(turns: list[Message]) -> list[Message]:
    """``turns`` without a last assistant turn."""
    return turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns


def check_prompt(turns: list[Message], system: str | None = None) -> list[Message]:
    """``turns`` as a prompt: maybe a system turn, then turns with text, from a user turn to a user turn.

    ``system`` (the row's own column) becomes the system turn; a blank system turn is the same as none.
    Raises ``BadRow`` for anything else.
    """
    own = turns[0]["content"] if turns and turns[0]["role"] == "system" else None
    spoken = turns if own is None else turns[1:]
    if own and own.strip() and system and system.strip() and own != system:
        raise BadRow("'system' differs from the conversation's own system turn; keep one of them")
    if not spoken:
        raise BadRow("the prompt is empty; add a user turn or remove the row")
    for number, turn in enumerate(spoken, 1):
        if turn["role"] == "system":
            raise BadRow("a system turn stands after other turns; only the first turn may be the system's")
        if not turn["content"].strip():
            raise BadRow(f"the prompt is empty in turn {number} ({turn['role']}); fill it in or remove the row")
    if spoken[0]["role"] != "user" or spoken[-1]["role"] != "user":
        order = ", ".join(turn["role"] for turn in spoken[:8])
        raise BadRow(f"the prompt's turns are {order}; it must begin and end with a user turn")
    text = own if own and own.strip() else system
    return [{"role": "system", "content": text}, *spoken] if text and text.strip() else spoken
