"""The server among clients that leave, push, lie and wait, and at its own end."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from astrai_rs import Engine
from astrai_rs.server import create_app
from conftest import LIMIT, assert_idle, wait_until
from serving import serving

FOREVER = {"prompt": "Once", "max_tokens": 30_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(endless_folder) -> Iterator[Engine]:
    with Engine(endless_folder, kv_cache_tokens=2**16) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with serving(engine, max_queued=64) as (url, _):
        yield url
    assert_idle(engine)


def running(engine: Engine) -> int:
    stats = engine.stats()
    return int(stats["num_requests_running"] + stats["num_requests_waiting"])


def raw(url: str, data: bytes, *, wait: float = LIMIT) -> bytes:
    """Send bytes as they are, and read until the server hangs up."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=wait) as sock:
        sock.sendall(data)
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
            if b"\r\n\r\n" in answer and b"connection: close" not in answer.lower():
                return answer
        return answer


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_cancels(url, engine, stream):
    body = json.dumps({**FOREVER, "n": 3, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json"
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as sock:
        sock.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: running(engine) == 3)
    steps = engine.stats()["steps"]
    wait_until(lambda: running(engine) == 0)
    assert engine.stats()["steps"] - steps < 500  # the endless request would take 30,000


def test_a_full_queue_is_429(engine):
    with serving(engine, max_queued=0) as (url, _), httpx.Client(base_url=url, timeout=LIMIT) as http:
        crowd = {**FOREVER, "n": 128, "stream": True}
        with (
            http.stream("POST", "/v1/completions", json=crowd),
            http.stream("POST", "/v1/completions", json=crowd),
        ):
            wait_until(lambda: running(engine) == 256)
            answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "queue_full"
        wait_until(lambda: running(engine) == 0)
        assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_keep_alives_while_nothing_comes(engine):
    """A stop string that never completes holds everything back."""
    with serving(engine, keep_alive_s=0.05) as (url, _), httpx.Client(base_url=url, timeout=LIMIT) as http:
        body = {**FOREVER, "stream": True, "n": 128, "max_tokens": 3000}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            lines = answer.iter_lines()
            assert next(lines).startswith(("data: {", ": keep-alive"))
    wait_until(lambda: running(engine) == 0)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic one"}, 401),
        ({"Authorization": "Bearer one"}, 200),
        ({"Authorization": "bearer two"}, 200),
        ({"x-api-key": "two"}, 200),
        ({"Authorization": "Bearer é".encode()}, 401),
    ],
)
def test_keys(engine, headers, status):
    with serving(engine, api_keys=("one", "two")) as (url, _), httpx.Client(base_url=url) as http:
        for route in ("/v1/models", "/metrics", "/version", "/stats", "/openapi.json", "/nowhere"):
            answer = http.get(route, headers=headers)
            expected = 404 if (status, route) == (200, "/nowhere") else status
            assert answer.status_code == expected
        assert http.get("/health").status_code == 200
        if status == 401:
            assert http.get("/v1/models", headers=headers).json()["error"]["code"] == "invalid_api_key"


def test_other_hosts_and_origins(engine):
    hosts = {"allowed_hosts": ("127.0.0.1", "::1"), "allowed_origins": ("https://page.example",)}
    with serving(engine, **hosts) as (url, _), httpx.Client(base_url=url) as http:
        assert http.get("/health", headers={"Host": "rebound.example"}).status_code == 421
        assert http.get("/health", headers={"Host": "[::1]:8000"}).status_code == 200
        ask = {"Access-Control-Request-Method": "POST", "Origin": "https://page.example"}
        answer = http.options("/v1/models", headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        answer = http.options("/v1/models", headers={**ask, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_closed_to_other_pages(url):
    with httpx.Client(base_url=url) as http:
        answer = http.get("/v1/models", headers={"Origin": "https://page.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]
        # A form of a foreign page can send this much without asking.
        plain = http.post(
            "/v1/completions", content=json.dumps(FOREVER), headers={"content-type": "text/plain"}
        )
        assert plain.status_code == 400
        assert "Content-Type: application/json" in plain.json()["error"]["message"]


def test_request_ids(url):
    with httpx.Client(base_url=url) as http:
        first, second = (http.get("/health").headers["x-request-id"] for _ in range(2))
        assert first != second
        assert http.get("/health", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
        assert http.get("/health", headers={"x-request-id": "a" * 200}).headers["x-request-id"] != "a" * 200


def test_bodies_that_are_too_large_or_too_slow(engine):
    limits = {"max_body_bytes": 1000, "body_timeout_s": 0.2}
    with serving(engine, **limits) as (url, _):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        assert b"413" in raw(url, head + b"Content-Length: 1001\r\n\r\n").split(b"\r\n")[0]
        chunked = head + b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"a" * 1001 + b"\r\n"
        assert b"413" in raw(url, chunked).split(b"\r\n")[0]
        slow = raw(url, head + b'Content-Length: 20\r\n\r\n{"prompt"')
        assert b"408" in slow.split(b"\r\n")[0]
        assert b'"code":"body_timeout"' in slow


def test_a_client_that_sends_far_too_much_reads_why(url):
    with httpx.Client(base_url=url, timeout=30) as http:
        for _ in range(3):
            answer = http.post("/v1/completions", content=b"x" * (20 << 20))
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"


def test_heads_that_are_no_http_or_too_large(url, monkeypatch):
    assert b'"invalid_http"' in raw(url, b"HELLO\r\n\r\n")
    assert b" 431 " in raw(url, b"GET /health HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n")
    assert b" 431 " in raw(url, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")
    monkeypatch.setattr("astrai_rs.server.protocol.HEAD_TIMEOUT_S", 0.1)
    assert b'"headers_timeout"' in raw(url, b"GET /health HTTP/1.1\r\nX: a")
    assert b'"headers_timeout"' in raw(url, b"")


def test_health_of_a_stuck_and_of_a_dead_engine(endless_folder, monkeypatch):
    with (
        Engine(endless_folder, kv_cache_tokens=2**16) as engine,
        serving(engine, stuck_after_s=0.3) as (url, _),
        httpx.Client(base_url=url, timeout=LIMIT) as http,
    ):
        assert http.get("/health").json() == {"status": "ok", "model_loaded": True, "engine_ready": True}
        with http.stream("POST", "/v1/completions", json={**FOREVER, "stream": True}):
            assert http.get("/health").status_code == 200
            stale = engine.stats()
            with monkeypatch.context() as patch:  # a loop that has stopped where it was
                later = lambda: {**stale, "uptime_s": time.monotonic()}  # noqa: E731
                patch.setattr(engine, "stats", later)
                time.sleep(0.35)
                answer = http.get("/health")
                assert (answer.status_code, answer.json()["status"]) == (503, "error")
                assert "has not finished a step" in answer.json()["message"]
            assert http.get("/health").status_code == 200
        engine.close()
        wait_until(lambda: http.get("/health").status_code == 503)
        answer = http.post("/v1/completions", json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_closed")


DEEP = "[" * 5000 + "]" * 5000
DEEP_SCHEMA = '{"items":' * 60 + "{}" + "}" * 60
CHAT = '{"messages": [{"role": "user", "content": "a"}], '
REGEX_BOMBS = ["(a{1,999}){1,999}" * 300, "(" * 1000, "[a-z" * 900, "(?=a)"]
HOSTILE = [
    "",
    "{",
    "[]",
    "null",
    "3",
    '"a"',
    "{}",
    DEEP,
    '{"prompt": ' + DEEP + "}",
    "\xff\xfe",
    "{'a': 1}",
    '{"prompt": "a", "prompt": 3}',
    '{"prompt": NaN}',
    '{"prompt": "a", "temperature": NaN}',
    '{"prompt": "a", "temperature": 1e999}',
    '{"prompt": "a", "n": 1e9}',
    '{"prompt": "a", "n": 99999999999999999999}',
    '{"prompt": "a", "n": -1}',
    '{"prompt": "a", "max_tokens": -5}',
    '{"prompt": "a", "max_tokens": "x"}',
    '{"prompt": [[]]}',
    '{"prompt": []}',
    '{"prompt": ""}',
    '{"prompt": [-1]}',
    '{"prompt": [99999999]}',
    '{"prompt": [1.5]}',
    '{"prompt": [-1, 2], "echo": true}',
    '{"prompt": [[1, 123456789012345678901234567890]], "echo": true}',
    '{"prompt": [true]}',
    '{"prompt": {"a": 1}}',
    '{"prompt": "\\ud800"}',
    '{"prompt": "' + "word " * 40_000 + '"}',
    '{"prompt": ' + json.dumps(["a"] * 1000) + "}",
    '{"prompt": "a", "stop": ' + json.dumps(["a"] * 100) + "}",
    '{"prompt": "a", "stop": [""]}',
    '{"prompt": "a", "logprobs": 1000000}',
    '{"prompt": "a", "logit_bias": {"a": 1}}',
    '{"prompt": "a", "logit_bias": {"1": 1000}}',
    '{"prompt": "a", "logit_bias": {"999999999": 1}}',
    '{"prompt": "a", "top_p": 0}',
    '{"prompt": "a", "top_k": -7}',
    '{"prompt": "a", "min_p": 2}',
    '{"prompt": "a", "seed": 1.5}',
    '{"prompt": "a", "best_of": 5}',
    '{"prompt": "a", "__proto__": {}}',
    '{"prompt": "a", "allowed_token_ids": []}',
    '{"prompt": "a", "min_tokens": 999}',
    '{"prompt": "a", "structured_outputs": {"json": ' + DEEP_SCHEMA + "}}",
    '{"prompt": "a", "structured_outputs": {"json": "' + "x" * 70_000 + '"}}',
    '{"prompt": "a", "structured_outputs": {"json": {"$ref": "http://127.0.0.1/x"}}}',
    '{"prompt": "a", "structured_outputs": {"regex": "a", "choice": ["b"]}}',
    *('{"prompt": "a", "structured_outputs": {"regex": ' + json.dumps(bomb) + "}}" for bomb in REGEX_BOMBS),
    '{"prompt": "a", "response_format": {"type": "yaml"}}',
    '{"prompt": "a", "response_format": {"type": "json_schema"}}',
    CHAT + '"n": 100000}',
    CHAT + '"tools": 3}',
    CHAT + '"tool_choice": "required"}',
    CHAT + '"user": {}}',
    CHAT + '"tools": ' + json.dumps([{"type": "function", "function": {"name": "a b"}}]) + "}",
    CHAT + '"chat_template": "{{ 1 }}"}',
    CHAT + '"stream_options": []}',
    CHAT + '"store": true}',
    '{"messages": ' + json.dumps([{"role": "user", "content": "a"}] * 3000) + "}",
    '{"messages": [{"role": "user"}]}',
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    '{"messages": [{"role": "root", "content": "a"}]}',
    '{"messages": "a"}',
    '{"tokens": [1e99]}',
    '{"tokens": [-1]}',
    '{"query": 3}',
    '{"query": "a", "history": [["a"]]}',
    '{"query": "a", "temperature": -1}',
]


async def test_hostile_bodies(engine):
    """Every one is answered with 4xx in OpenAI's shape within a second, and the engine goes on."""
    routes = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/generate"]
    transport = httpx.ASGITransport(create_app(engine))
    slowest = 0.0
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=LIMIT) as client:

        async def send(route: str, body: str) -> None:
            nonlocal slowest
            start = time.perf_counter()
            data = body.encode("latin-1") if "\xff" in body else body.encode()
            answer = await client.post(route, content=data, headers={"content-type": "application/json"})
            slowest = max(slowest, time.perf_counter() - start)
            if answer.status_code != 200 or not accepted(route, body):
                assert 400 <= answer.status_code < 500, (route, body[:200], answer.text[:300])
                error = answer.json()["error"]
                assert error.keys() == {"message", "type", "param", "code"}
                assert error["message"]

        for route in routes:
            for body in HOSTILE:
                await send(route, body)
    assert slowest < LIMIT
    assert_idle(engine)


def accepted(route: str, body: str) -> bool:
    """What is a fine request, if an odd one: a tokenizer takes any text."""
    return (route == "/tokenize" and '"prompt": "' in body) or body == '{"prompt": "a", "prompt": 3}'
