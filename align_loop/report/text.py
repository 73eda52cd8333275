"""Answers as harmless, readable text: what a model wrote must not steer a terminal or reorder a page."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Everything but newline and tab: C0, DEL and C1 controls, bidirectional overrides and isolates, separators.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")


def visible(text: str | None) -> str:
    """``text`` with control characters replaced by visible stand-ins; letters of any script stay as they are."""
    return _UNSAFE.sub(_stand_in, text or "")


def clip(text: str, limit: int) -> str:
    """At most ``limit`` characters of ``text``, saying how many were left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def prompt_text(messages: Sequence[dict[str, str]] | None) -> str:
    """A prompt's messages as text; a single user message stands alone, others carry their role."""
    messages = messages or []
    if len(messages) == 1 and messages[0]["role"] == "user":
        return visible(messages[0]["content"])
    return "\n".join(f"[{visible(m['role'])}] {visible(m['content'])}" for m in messages)


def duration(seconds: float | None) -> str:
    """``seconds`` for people: 8.1 s, 2 min 05 s, 3 h 07 min; empty for None."""
    if seconds is None:
        return ""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _stand_in(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)  # the Unicode control pictures
    return "\u2421" if code == 0x7F else f"⟨U+{code:04X}⟩"
