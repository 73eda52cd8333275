"""Any endpoint that speaks OpenAI's chat completions (a provider, or ``vllm serve``), through the standard library.

Replies are kept on disk, so nothing is paid for twice: a run that stopped, at the cost cap for one, goes on where it
was. The key is read from an environment variable when a request is sent, and is in no file, log line or message.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align_loop.engines.replies import Account, CapReached, Prices, Reply, ReplyCache, Request, most_tokens
from align_loop.errors import UserError
from align_loop.record import Message

_REFUSED = (400, 413, 422)  # this request is wrong (too long, filtered); others may do
_AGAIN = (408, 409, 425, 429)  # and all 5xx: the same request may do later
_LONGEST_WAIT = 60.0  # seconds between two attempts, unless the endpoint asks for more
_MOST_BYTES = 2**24  # of one reply


@dataclass
class Endpoint:
    """Where a judge answers, and what it may cost.

    ``url``: up to and with ``/v1``; ``model``: its name there; ``key_env``: the NAME of the environment variable that
    holds the key (null: none is sent). ``temperature``, ``max_tokens`` and ``extra`` go into each request; a null in
    ``extra`` takes a key out (some models want ``max_completion_tokens`` instead of ``max_tokens``).
    ``price_in``, ``price_out``: per million tokens. ``cost_cap``: the most that the replies of one table may cost,
    those paid for earlier included; no request is sent that could pass it. ``cache_dir``: where replies are kept.
    ``concurrency``: requests at a time; ``timeout``: seconds for one; ``retries``: further attempts after a timeout, a
    lost connection, 429 or 5xx, the first after about ``backoff`` seconds, then twice as long each time.
    """

    url: str
    model: str
    key_env: str | None = None
    temperature: float = 0.0
    max_tokens: int = 512
    extra: dict[str, Any] = field(default_factory=dict)
    price_in: float = 0.0
    price_out: float = 0.0
    cost_cap: float | None = None
    cache_dir: str = "~/.cache/align_loop/replies"
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0

    def __post_init__(self) -> None:
        key = "annotator.endpoint"
        if not re.match(r"https?://[^/@\s]+(/[^@\s]*)?$", self.url):
            raise ValueError(f"{key}.url must be http(s)://HOST/v1, without user and password")
        if self.key_env is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.key_env):
            raise ValueError(f"{key}.key_env must be the NAME of an environment variable, such as OPENAI_API_KEY")
        for name, low in (("max_tokens", 1), ("concurrency", 1), ("retries", 0), ("temperature", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{key}.{name}={getattr(self, name)} must be at least {low}")
        for name in ("timeout", "backoff"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{key}.{name}={getattr(self, name)} must be positive (seconds)")
        if min(self.price_in, self.price_out) < 0:
            raise ValueError(f"{key}.price_in and price_out must be 0 or more, per million tokens")
        if self.cost_cap is not None and not (self.cost_cap > 0 and self.price_in + self.price_out > 0):
            raise ValueError(f"{key}.cost_cap={self.cost_cap} needs a positive cap, and price_in or price_out")

    def request(self, messages: Sequence[Message]) -> Request:
        """The body of one request."""
        body = {"model": self.model, "messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
        body |= {"temperature": self.temperature, "max_tokens": self.max_tokens} | self.extra
        return {name: value for name, value in body.items() if value is not None}

    def ask(self, conversations: Sequence[Sequence[Message]], on_done: Callable[[int], None] | None = None) -> Asked:
        """The reply to each conversation, in their order; the same conversation is asked once.

        Raises ``UserError`` at the cap, where the endpoint can't be reached or refuses the key, and where it refuses
        every request. Whatever was answered until then is kept.
        """
        requests = [self.request(messages) for messages in conversations]
        cache = ReplyCache(
            Path(self.cache_dir).expanduser(), self.url.rstrip("/"), Prices(self.price_in, self.price_out)
        )
        names = [cache.name(request) for request in requests]
        wanted = dict(zip(names, requests, strict=True))
        replies = {name: reply for name, request in wanted.items() if (reply := cache.get(request)) is not None}
        known = len(replies)
        if on_done is not None:
            on_done(sum(name in replies for name in names))
        if missing := {name: request for name, request in wanted.items() if name not in replies}:
            _Round(self, cache, Account(self.cost_cap, sum(r.cost for r in replies.values()))).send(
                missing, replies, lambda name: on_done(names.count(name)) if on_done else None
            )
        refused = [reply for reply in replies.values() if reply.text is None]
        if refused and len(refused) == len(replies):
            raise UserError(f"{self.url}: the endpoint refuses every request: {refused[0].refusal}")
        times = Counter(names)
        shared = {name: replace(reply, cost=reply.cost / times[name]) for name, reply in replies.items()}
        tokens = sum(reply.tokens_in + reply.tokens_out for reply in replies.values())
        return Asked([shared[name] for name in names], sent=len(missing), known=known, tokens=tokens)


@dataclass(frozen=True)
class Asked:
    """Replies in the order of the conversations; how many different requests were sent now and known before.

    Conversations that are the same share one reply and its cost.
    """

    replies: list[Reply]
    sent: int
    known: int
    tokens: int


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Round:
    """The requests of one table that no cache knows."""

    def __init__(self, endpoint: Endpoint, cache: ReplyCache, account: Account):
        self.endpoint, self.cache, self.account = endpoint, cache, account
        self.opener = urllib.request.build_opener(_NoRedirect)
        self.stop = threading.Event()
        self.key = None
        if endpoint.key_env is not None:
            self.key = os.environ.get(endpoint.key_env, "").strip()
            if not self.key:
                raise UserError(
                    f"annotator.endpoint.key_env={endpoint.key_env}: this environment variable is not set; "
                    "put the endpoint's key into it"
                )

    def send(self, missing: dict[str, Request], replies: dict[str, Reply], on_reply: Callable[[str], None]) -> None:
        """Fill ``replies``; after the first failure the requests under way are still waited for and kept."""
        failure: Exception | None = None
        total = len(replies) + len(missing)
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            futures = {pool.submit(self._one, request): name for name, request in missing.items()}
            try:
                for future in as_completed(futures):
                    error = future.exception()
                    if error is not None:
                        failure = failure or error
                        self.stop.set()
                    elif (reply := future.result()) is not None:
                        replies[futures[future]] = reply
                        on_reply(futures[future])
            finally:
                self.stop.set()  # also when interrupted
                pool.shutdown(cancel_futures=True)
        if isinstance(failure, CapReached):
            raise UserError(self._cap_text(len(replies), total))
        if failure is not None:
            raise failure

    def _one(self, request: Request) -> Reply | None:
        """The reply to one request; None where another one has failed for good in the meantime."""
        most = self.cache.prices.cost(*most_tokens(request))
        self.account.reserve(most)
        paid = 0.0
        try:
            reply = None if self.stop.is_set() else self._attempts(request)
            paid = reply.cost if reply is not None else 0.0
            return reply
        except BaseException:
            self.stop.set()  # here, so that this thread does not take the next request
            raise
        finally:
            self.account.settle(most, paid)

    def _attempts(self, request: Request) -> Reply | None:
        endpoint, trouble = self.endpoint, ""
        for attempt in range(endpoint.retries + 1):
            asked_wait = 0.0
            try:
                text, usage = self._post(request)
                return self.cache.put(request, text, usage)
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code}: {self._said(error)}"
                if error.code in _REFUSED:
                    return Reply(None, refusal=trouble)
                if error.code not in _AGAIN and error.code < 500:
                    raise UserError(f"{endpoint.url}: {trouble}") from None
                asked_wait = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError) as error:  # lost, late, or not a completion
                reason = getattr(error, "reason", None) or error
                trouble = self._hidden(f"{type(reason).__name__}: {reason}")
            wait = min(_LONGEST_WAIT, endpoint.backoff * 2**attempt) * random.uniform(0.75, 1.25)
            if attempt < endpoint.retries and self.stop.wait(max(wait, asked_wait)):
                return None
        raise UserError(f"{endpoint.url}: no reply after {endpoint.retries + 1} attempts; the last: {trouble}")

    def _post(self, request: Request) -> tuple[str, list[int] | None]:
        """(text, [tokens in, tokens out] or None) of one completion."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        url = f"{self.endpoint.url.rstrip('/')}/chat/completions"
        sent = urllib.request.Request(url, json.dumps(request).encode(), headers, method="POST")
        with self.opener.open(sent, timeout=self.endpoint.timeout) as response:
            found = json.loads(response.read(_MOST_BYTES))
        try:
            text = found["choices"][0]["message"].get("content") or ""
            usage = found.get("usage") or {}
            counted = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError("a reply that is no chat completion") from None
        return str(text), counted if all(isinstance(n, int) for n in counted) else None

    def _said(self, error: urllib.error.HTTPError) -> str:
        """What the endpoint said, in one line and without the key."""
        try:
            text = error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        return self._hidden(" ".join(text.split())[:300] or str(error.reason))

    def _hidden(self, text: str) -> str:
        return text.replace(self.key, "(the key)") if self.key else text

    def _cap_text(self, made: int, of: int) -> str:
        endpoint = self.endpoint
        return (
            f"annotator.endpoint.cost_cap={endpoint.cost_cap:g}: {self.account.spent:.6g} spent, and the next reply "
            f"could pass the cap; {made:,} of {of:,} replies are kept in {endpoint.cache_dir}, raise the cap to go on"
        )


def _seconds(text: str | None) -> float:
    """A Retry-After in seconds, at most five minutes; a date or nonsense counts as none."""
    try:
        return min(max(float(text or 0), 0.0), 300.0)
    except ValueError:
        return 0.0
