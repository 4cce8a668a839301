"""Clients and pages that one does not trust; bodies that cost more than they should."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from pydantic import ValidationError

from astrai_rs import Engine
from astrai_rs.server import ServerSettings, protocol
from astrai_rs.server.chat import ChatRequest
from astrai_rs.server.completions import CompletionRequest
from conftest import GLASS, LIMIT, assert_idle, wait_until
from serving import serving

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(GLASS, max_num_seqs=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine) -> Iterator[httpx.Client]:
    with serving(engine, max_queued=8) as (url, _), httpx.Client(base_url=url, timeout=LIMIT) as client:
        yield client


def test_settings_that_would_open_the_server_are_refused():
    with pytest.raises(ValueError, match="an API key must not be empty"):
        ServerSettings(api_keys=("a", " "))
    with pytest.raises(TypeError, match="api_keys must be a tuple of strings; given: str"):
        ServerSettings(api_keys="secret")


def test_pages_of_other_sites_may_not_ask(engine, client):
    query = "/generate?query=a&max_len=1"
    host = client.base_url.netloc.decode()
    for origin, status in ((None, 200), (f"http://{host}", 200), ("http://evil.example", 403), ("null", 403)):
        answer = client.post(query, headers={"origin": origin} if origin else {})
        assert answer.status_code == status, origin
    with serving(engine, allowed_origins=("http://good.example",)) as (url, _):
        assert httpx.post(url + query, headers={"origin": "http://good.example"}).status_code == 200
    with serving(engine, api_keys=("k",)) as (url, _):  # a page that has the key may come from anywhere
        headers = {"origin": "http://a.example", "x-api-key": "k"}
        assert httpx.post(url + query, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [1] * 9999 + ["x"]}),
        (CompletionRequest, {"prompt": [[1] * 9999, "x"]}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 9999}),
        (ChatRequest, {"messages": [1] * 9999}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 9999}]}),
        (ChatRequest, {"messages": HELLO, "tools": [1] * 9999}),
    ],
)
def test_a_long_list_has_one_fault(kind, body):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 5


def deep(levels: int) -> dict:
    return {"type": "object", "properties": {"a": deep(levels - 1)}} if levels else {}


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("completions", {"prompt": "a", "n": 17}, "a request may ask for 16 samples"),
        ("completions", {"prompt": ["a"] * 9, "n": 2}, "a request may ask for 16 samples"),
        ("completions", {"prompt": "a", "bad_words": ["a"] * 200}, "bad_words may be at most 128"),
        (
            "completions",
            {"prompt": "a", "bad_words": ["a" * 9000]},
            "bad_words may be at most 8192 characters",
        ),
        ("completions", {"prompt": "a", "stop": "a" * 9000}, "stop may be at most 8192 characters"),
        (
            "chat/completions",
            {
                "messages": HELLO,
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "a", "parameters": deep(40)}}],
            },
            "tools.0.function.parameters may be at most 32 levels",
        ),
    ],
)
def test_limits(client, route, body, message):
    answer = client.post(f"/v1/{route}", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_who_does_not_read_loses_the_connection(endless, monkeypatch):
    monkeypatch.setattr(protocol, "WRITE_TIMEOUT_S", 0.2)
    body = {"prompt": "Once", "max_tokens": 30_000, "ignore_eos": True, "stream": True, "logprobs": 20}
    data = json.dumps({**body, "n": 4}).encode()
    with serving(endless) as (url, server), socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        sock.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        state = server._state
        wait_until(lambda: state.num_requests == 1)
        wait_until(lambda: state.num_requests == 0)
    assert_idle(endless)


def test_a_stuck_engine_is_not_healthy_when_its_clients_have_left(engine, monkeypatch):
    with serving(engine) as (url, _):
        stale = {**engine.stats(), "num_requests_running": 3, "uptime_s": 1e6, "heartbeat_s": 1.0}
        monkeypatch.setattr(engine, "stats", lambda: stale)
        wait_until(lambda: httpx.get(url + "/health").status_code == 503)
