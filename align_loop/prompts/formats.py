"""What people's rows mean: the layouts of preferences, demonstrations and prompts, as tables of the record.

Layouts (``format``; "auto" recognises each row by its keys and types):

- ``hh``: transcripts, "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic hh-rlhf);
- ``messages``: lists of {"role", "content"}, whole conversations or continuations of ``prompt``
  (UltraFeedback-binarized, UltraChat, TRL's conversational form);
- ``prompt``: ``prompt`` (text or messages) beside answers as text; also ``instruction`` with an ``input``.

An optional ``system`` column becomes the system turn. All other columns, scores too, are left behind.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any

from align_loop.errors import UserError
from align_loop.prompts.files import Origin, one_line
from align_loop.prompts.turns import (
    BadRow,
    check_prompt,
    check_text,
    cut_answer,
    is_transcript,
    join,
    read_messages,
    shown,
    split_answer,
    split_transcript,
    starts_as_transcript,
)
from align_loop.record import Message, Row, prompt_id, short_digest

FORMATS = ("auto", "hh", "messages", "prompt")
BAD_ROWS = ("stop", "drop")

IDENTICAL, EMPTY = "identical answers", "empty answer"
DUPLICATE_ROW, DUPLICATE_PROMPT, MALFORMED = "duplicate row", "duplicate prompt", "malformed row"

Source = Iterable[tuple[Origin, dict[str, Any]]]
Table = tuple[list[Row], dict[str, int]]  # the rows kept, and how many were dropped for which reason

_ANSWER_KEYS = ("answer", "completion", "response", "output", "chosen")
_SUPPORTED = {
    "preferences": "chosen and rejected as hh transcripts, as message lists, or as text beside 'prompt'",
    "demonstrations": "'messages', 'prompt' with 'answer' (or completion, response, chosen), or an hh transcript "
    "under 'text' or 'chosen'",
    "prompts": "'prompt', 'messages', 'instruction', or an hh transcript under 'text' or 'chosen'",
}


def preferences(rows: Source, format: str = "auto", bad_rows: str = "stop") -> Table:
    """Rows of ``record.PREFERENCES``, and the counts of rows dropped by reason.

    Dropped: identical answers, an empty answer, a repetition of the same prompt with the same two answers.
    The first row that cannot be used raises ``UserError`` naming its file and line; with ``bad_rows="drop"``
    (public data that the user can't mend) it is counted as malformed instead.
    """

    def parse(row: Row, origin: Origin) -> Row | str:
        messages, chosen, rejected = _preference(row, format)
        if not chosen.strip() or not rejected.strip():
            return EMPTY
        if chosen.strip() == rejected.strip():
            return IDENTICAL
        prompt = prompt_id(messages)
        answers = {"chosen": chosen, "rejected": rejected, "gold_chosen": None, "gold_rejected": None}
        example = short_digest(prompt, chosen, rejected)
        return {"example_id": example, "prompt_id": prompt, "messages": messages, **answers, "meta": origin.meta()}

    return _collect(rows, parse, lambda row: row["example_id"], DUPLICATE_ROW, format, bad_rows)


def demonstrations(rows: Source, format: str = "auto", bad_rows: str = "stop") -> Table:
    """Rows of ``record.DEMONSTRATIONS`` (the answer is the last assistant turn), and the counts dropped.

    Dropped: an empty answer, a repetition of the same prompt with the same answer. Errors as ``preferences``.
    """

    def parse(row: Row, origin: Origin) -> Row | str:
        turns, answer = split_answer(_conversation(row, format, "demonstrations"), "the conversation")
        messages = check_prompt(turns, _system(row))
        if not answer.strip():
            return EMPTY
        return {"prompt_id": prompt_id(messages), "messages": messages, "answer": answer, "meta": origin.meta()}

    return _collect(rows, parse, lambda row: (row["prompt_id"], row["answer"]), DUPLICATE_ROW, format, bad_rows)


def prompts(rows: Source, format: str = "auto", bad_rows: str = "stop") -> Table:
    """Rows of ``record.PROMPTS``, and the counts dropped; a last assistant turn is cut off.

    Dropped: a repetition of the same prompt. A row of preferences is read as one, so that its prompt has the
    same id in both roles, but ``format="prompt"`` takes the prompt column alone. Errors as ``preferences``.
    """

    def parse(row: Row, origin: Origin) -> Row | str:
        if format != "prompt" and row.get("chosen") is not None and row.get("rejected") is not None:
            messages = _preference(row, format)[0]
        else:
            messages = check_prompt(cut_answer(_conversation(row, format, "prompts")), _system(row))
        return {"prompt_id": prompt_id(messages), "messages": messages, "meta": origin.meta()}

    return _collect(rows, parse, lambda row: row["prompt_id"], DUPLICATE_PROMPT, format, bad_rows)


def prompts_of(rows: Iterable[Row]) -> Table:
    """The prompts of rows of preferences, as rows of ``record.PROMPTS``, each prompt once."""
    kept: dict[str, Row] = {}
    count = 0
    for row in rows:
        count += 1
        kept.setdefault(row["prompt_id"], {key: row[key] for key in ("prompt_id", "messages", "meta")})
    return list(kept.values()), {DUPLICATE_PROMPT: count - len(kept)}


def _collect(
    rows: Source,
    parse: Callable[[Row, Origin], Row | str],
    identity: Callable[[Row], Any],
    repeated: str,
    format: str,
    bad_rows: str,
) -> Table:
    """Run ``parse`` (which gives a row, or the reason to drop it) over ``rows`` and keep one row an ``identity``."""
    _check_choice("format", format, FORMATS)
    _check_choice("bad_rows", bad_rows, BAD_ROWS)
    kept: dict[Any, Row] = {}
    dropped: Counter[str] = Counter()
    for origin, row in rows:
        try:
            parsed = parse(row, origin)
        except BadRow as bad:
            if bad_rows == "stop":
                raise UserError(one_line(f"{origin}: {bad}")) from None
            parsed = MALFORMED
        if isinstance(parsed, str):
            dropped[parsed] += 1
        elif identity(parsed) in kept:
            dropped[repeated] += 1
        else:
            kept[identity(parsed)] = parsed
    return list(kept.values()), dict(dropped)


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(one_line(f"{key}={value!r} is unknown; use one of {', '.join(choices)}"))


def _preference(row: Row, format: str) -> tuple[list[Message], str, str]:
    """(prompt, chosen, rejected) of one row of preferences."""
    for key in ("chosen", "rejected"):
        _require(row, key, "preferences")
    layout = _layout(row, ("chosen", "rejected"), format, "preferences")
    prompt = _prompt(row, format)
    before, chosen = split_answer(join(prompt, _turns(row, "chosen", layout), "'chosen'"), "'chosen'")
    other, rejected = split_answer(join(prompt, _turns(row, "rejected", layout), "'rejected'"), "'rejected'")
    if before != other:
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, other, strict=False)))
        remedy = "all turns but the last must be the same in both"
        raise BadRow(f"the prompts of 'chosen' and 'rejected' disagree from turn {same + 1} on; {remedy}")
    return check_prompt(before, _system(row)), chosen, rejected


def _conversation(row: Row, format: str, kind: str) -> list[Message]:
    """All turns of a row of demonstrations or prompts, the answer (if any) last."""
    key = _conversation_key(row, format, kind)
    if key in ("prompt", "instruction"):
        return _prompt(row, format) or []
    layout = {"messages": "messages", "text": "hh"}.get(key) or _layout(row, (key,), format, kind)
    return join(_prompt(row, format), _turns(row, key, layout), f"'{key}'")


def _conversation_key(row: Row, format: str, kind: str) -> str:
    """The key that holds the conversation (or its answer, or for prompts its prompt) in this row."""
    answers = _ANSWER_KEYS if kind == "demonstrations" else ("prompt", "instruction")
    candidates = {
        "auto": ("messages", *answers, "text", "chosen"),
        "hh": ("text", "chosen") if kind == "demonstrations" else ("text", "chosen", "prompt"),
        "messages": ("messages", *answers),
        "prompt": answers,
    }[format]
    for key in candidates:
        if row.get(key) is not None:
            return key
    if format == "auto":
        raise _unrecognised(row, kind)
    raise BadRow(f"no {' or '.join(map(repr, candidates))} in it for format={format}{_nearest(row, candidates[0])}")


def _layout(row: Row, keys: tuple[str, ...], format: str, kind: str) -> str:
    """The layout of the values under ``keys``: ``format``, or recognised from their types and beginnings."""
    if format != "auto":
        return format
    values = [row[key] for key in keys]
    if all(isinstance(value, list) for value in values):
        return "messages"
    if not all(isinstance(value, str) for value in values):
        raise _unrecognised(row, kind)
    has_prompt = row.get("prompt") is not None or row.get("instruction") is not None
    if all(starts_as_transcript(value) if has_prompt else is_transcript(value) for value in values):
        return "hh"
    if has_prompt:
        return "prompt"
    raise _unrecognised(row, kind)


def _turns(row: Row, key: str, layout: str) -> list[Message]:
    """The turns under ``key``: a whole conversation, or the answer alone."""
    if layout == "hh":
        return split_transcript(row[key], f"'{key}'")
    if layout == "messages":
        return read_messages(row[key], f"'{key}'")
    return [{"role": "assistant", "content": check_text(row[key], f"'{key}'")}]


def _prompt(row: Row, format: str) -> list[Message] | None:
    """The turns of the row's own prompt column, or None where there is none.

    A prompt that is itself a transcript left open for the assistant's turn is split, unless ``format`` is
    "prompt": then text is text.
    """
    value = row.get("prompt")
    if value is None:
        return _instruction(row)
    if isinstance(value, list):
        return read_messages(value, "'prompt'")
    text = check_text(value, "'prompt'")
    if not text.strip():
        raise BadRow("'prompt' is empty; fill it in or remove the row")
    if format == "hh" or (format == "auto" and starts_as_transcript(text) and text.rstrip().endswith("Assistant:")):
        turns = split_transcript(text, "'prompt'")
        return turns if turns[-1]["content"] else turns[:-1]
    return [{"role": "user", "content": text}]


def _instruction(row: Row) -> list[Message] | None:
    """An instruction and, below an empty line, its input (the layout of Alpaca)."""
    if row.get("instruction") is None:
        return None
    parts = [check_text(row[key], f"'{key}'") for key in ("instruction", "input") if row.get(key) is not None]
    if not parts[0].strip():
        raise BadRow("'instruction' is empty; fill it in or remove the row")
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]


def _system(row: Row) -> str | None:
    value = row.get("system")
    return None if value is None else check_text(value, "'system'")


def _require(row: Row, key: str, kind: str) -> None:
    if key not in row:
        raise BadRow(f"no key '{key}'{_nearest(row, key)}; {kind} can be {_SUPPORTED[kind]}")
    if row[key] is None:
        raise BadRow(f"'{key}' is null; fill it in or remove the row")


def _nearest(row: Row, key: str) -> str:
    """For an error: the key of ``row`` most like ``key``, or those that there are."""
    close = difflib.get_close_matches(key, [name for name in row if name != key], n=1)
    return f" (did you mean {shown(close[0])}?)" if close else f" (the row has {_keys(row)})"


def _keys(row: Row) -> str:
    names = [shown(name, 30) for name in row]
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "no keys"


def _unrecognised(row: Row, kind: str) -> BadRow:
    seen = ", ".join(f"{shown(name, 30)}: {type(value).__name__}" for name, value in list(row.items())[:8])
    return BadRow(f"format not recognised (seen: {seen or 'no keys'}); {kind} can be {_SUPPORTED[kind]}")
