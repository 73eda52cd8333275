"""A small real HTTP server that speaks chat completions, with whatever manners a test asks for."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[
    [dict[str, Any], int], Any
]  # (request, number of this request) -> text, or (status, body, headers)


class ChatServer:
    """What it was asked, and how many requests it had under way at once."""

    def __init__(self, behaviour: Behaviour, usage: tuple[int, int] | None = (100, 10)):
        self.behaviour, self.usage = behaviour, usage
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.most_at_once = self._now = 0
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, body: dict[str, Any], key: str | None, path: str) -> tuple[int, bytes, dict[str, str]]:
        with self.lock:
            self.requests.append(body)
            self.keys.append(key)
            self.paths.append(path)
            number = len(self.requests)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            said = self.behaviour(body, number)
        finally:
            with self.lock:
                self._now -= 1
        if isinstance(said, tuple):
            status, text, headers = said
            return status, text.encode(), headers
        usage = {"prompt_tokens": self.usage[0], "completion_tokens": self.usage[1]} if self.usage else None
        reply = {"choices": [{"message": {"role": "assistant", "content": said}}], "usage": usage}
        return 200, json.dumps(reply).encode(), {}


@contextmanager
def serving(behaviour: Behaviour, usage: tuple[int, int] | None = (100, 10)):
    """The server, running on a free port of this machine."""
    chat = ChatServer(behaviour, usage)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text, headers = chat.answer(body, self.headers.get("Authorization"), self.path)
            if status == 0:  # hang up without a word
                return
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
            except BrokenPipeError:  # the other side has given up waiting
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()


def slow(seconds: float, text: str = "A") -> Behaviour:
    """Every reply takes its time."""

    def behave(_request, _number):
        time.sleep(seconds)
        return text

    return behave
