"""What was paid for is kept: replies of an endpoint on disk by content, and the account that stops before its cap."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_loop.digest import config_digest
from align_loop.durable import write_text

Request = dict[str, Any]  # the JSON body of one chat completion


@dataclass(frozen=True)
class Reply:
    """One reply. ``text`` None: the endpoint refused the request, ``refusal`` says why. ``cost`` in its currency."""

    text: str | None
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    refusal: str = ""


@dataclass(frozen=True)
class Prices:
    """Per million tokens, in the currency of the endpoint."""

    tokens_in: float
    tokens_out: float

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


def most_tokens(request: Request) -> tuple[int, int]:
    """Upper bounds of the tokens of a request and its reply: no token is shorter than a byte; the reply's own limit.

    For each message and once more, 64 tokens are added for what the chat template writes.
    """
    messages = request["messages"]
    read = sum(len(m["content"].encode("utf-8", "surrogatepass")) for m in messages) + 64 * (len(messages) + 1)
    limits = [request.get(name) for name in ("max_tokens", "max_completion_tokens")]
    return read, max((limit for limit in limits if isinstance(limit, int)), default=0)


class ReplyCache:
    """One file a reply under ``folder``, named by the digest of (url, request). Holds no key and no header."""

    def __init__(self, folder: Path, url: str, prices: Prices):
        self.folder, self.url, self.prices = folder, url, prices

    def name(self, request: Request) -> str:
        """The identity of a request: what it asks, of which endpoint."""
        return config_digest({"url": self.url, "request": request})

    def get(self, request: Request) -> Reply | None:
        """The reply that is kept for this very request, or None; a broken file counts as none."""
        try:
            found = json.loads(self._file(request).read_text(encoding="utf-8"))
            same = found["url"] == self.url and found["request"] == json.loads(json.dumps(request))
            return self.priced(request, found["text"], found["usage"]) if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, request: Request, text: str, usage: list[int] | None) -> Reply:
        """Keep a reply; ``usage`` [tokens in, tokens out], None where the endpoint did not say."""
        file = self._file(request)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"url": self.url, "request": request, "text": text, "usage": usage}))
        return self.priced(request, text, usage)

    def priced(self, request: Request, text: str, usage: list[int] | None) -> Reply:
        """A reply with its cost; without usage the upper bound is what counts."""
        read, written = usage or most_tokens(request)
        return Reply(text, read, written, self.prices.cost(read, written))

    def _file(self, request: Request) -> Path:
        name = self.name(request)
        return self.folder / name[:2] / f"{name}.json"


class CapReached(Exception):
    """The next request could cost more than is left."""


class Account:
    """What was spent, and what the requests under way could cost; safe to use from several threads.

    ``reserve`` waits while the most that is under way leaves too little, and raises ``CapReached`` where that would
    still be so without anything under way; so the cap is never passed, as long as the bounds of ``most_tokens`` hold.
    """

    def __init__(self, cap: float | None, spent: float):
        self.cap, self.spent, self.reserved = cap, spent, 0.0
        self._under_way = 0
        self._changed = threading.Condition()

    def reserve(self, most: float) -> None:
        with self._changed:
            while self.cap is not None and self.spent + self.reserved + most > self.cap:
                if not self._under_way:
                    raise CapReached
                self._changed.wait()
            self.reserved += most
            self._under_way += 1

    def settle(self, most: float, paid: float) -> None:
        """The request that reserved ``most`` is over and has cost ``paid``."""
        with self._changed:
            self._under_way -= 1
            self.reserved = self.reserved - most if self._under_way else 0.0  # no rounding is carried on
            self.spent += paid
            self._changed.notify_all()
