"""A server that answers as a test says: late, broken, hostile. And the steps of a person at the page."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import astrai_rs

FOLDER = Path(astrai_rs.__file__).parent / "server/page"
FILES = {"/": "index.html", "/app.js": "app.js", "/markdown.js": "markdown.js", "/style.css": "style.css"}
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
WAIT = 10
"""Seconds until a stream that a test holds back goes on by itself."""


class Script:
    """What the fake server says next."""

    def __init__(self) -> None:
        self.key: str | None = None
        self.deltas: list[dict] = [{"content": "Hello"}, {"content": " there"}]
        self.finish = "stop"
        self.tail: list[str] | None = None  # in place of usage and [DONE]
        self.go_on = threading.Event()
        self.go_on.set()
        self.gone = threading.Event()
        self.bodies: list[dict] = []

    def events(self) -> Iterator[str]:
        """A comment, the deltas (held back after the first one while `go_on` is not set), and the end."""
        yield ": keep-alive\n\n"
        for delta in self.deltas:
            yield data({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            time.sleep(0.01)
            deadline = time.monotonic() + WAIT
            while not self.go_on.wait(0.02) and time.monotonic() < deadline:
                yield ": keep-alive\n\n"
        if self.tail is not None:
            yield from self.tail
            return
        yield data({"choices": [{"index": 0, "delta": {}, "finish_reason": self.finish}]})
        yield data({"choices": [], "usage": {"completion_tokens": 2 * len(self.deltas)}})
        yield "data: [DONE]\n\n"


def data(value: object) -> str:
    return f"data: {json.dumps(value)}\n\n"


class Handler(BaseHTTPRequestHandler):
    script: Script

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._guarded(lambda: self._json(200, {"object": "list", "data": [{"id": "scripted-model"}]}))
        elif self.path in FILES:
            path = FOLDER / FILES[self.path]
            self._answer(200, TYPES[path.suffix], path.read_bytes())
        else:
            self._json(404, {"error": {"message": "no such page", "type": "invalid_request_error"}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.script.bodies.append(json.loads(body))
        self._guarded(self._stream)

    def _guarded(self, reply: Callable[[], None]) -> None:
        if self.script.key and self.headers.get("authorization") != f"Bearer {self.script.key}":
            error = {"message": "wrong API key", "type": "invalid_request_error", "code": "invalid_api_key"}
            self._json(401, {"error": error})
        else:
            reply()

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            for event in self.script.events():
                self.wfile.write(event.encode())
                self.wfile.flush()
        except OSError:
            self.script.gone.set()

    def _json(self, status: int, value: object) -> None:
        self._answer(status, "application/json", json.dumps(value).encode())

    def _answer(self, status: int, media_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", media_type)
        self.send_header("content-length", str(len(body)))
        self.send_header("content-security-policy", POLICY)
        self.end_headers()
        self.wfile.write(body)


def ask(page, text: str = "Question") -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def done(page, count: int = 1) -> None:
    page.get_by_role("button", name="Retry").nth(count - 1).wait_for()


def answer(page):
    return page.get_by_role("article", name="Model").last


def contents(script: Script) -> list[str]:
    return [message["content"] for message in script.bodies[-1]["messages"]]


def in_view_of_end(page) -> bool:
    return page.evaluate("(({scrollHeight: h, scrollTop: t, clientHeight: c}) => h - t - c < 5)(messages)")
