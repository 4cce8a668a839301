"""The page and the real server together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from scripted import FILES, POLICY, answer, ask, done

from astrai_rs import Engine
from serving import serving

GLASS = Path(__file__).parent.parent / "fixtures/golden/glass-llama"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(GLASS) as engine:
        yield engine


@pytest.fixture
def url(engine: Engine) -> Iterator[str]:
    with serving(engine, api_keys=("right",)) as (url, _):
        yield url


@pytest.fixture
def page(visit):
    page = visit()
    page.get_by_label("API key").fill("right")
    page.get_by_label("API key").press("Enter")
    page.get_by_text("test", exact=True).wait_for()
    return page


def test_the_answer_is_the_servers(page, url):
    for name, value in (("Temperature", "0"), ("Max tokens", "40"), ("System prompt", "A story.")):
        page.get_by_label(name).fill(value)
    ask(page, "Once upon a time")
    done(page)
    messages = [{"role": "system", "content": "A story."}, {"role": "user", "content": "Once upon a time"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 40}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"x-api-key": "right"}).json()
    assert (
        page.evaluate("JSON.parse(localStorage['astrai_rs.messages'])[1].content")
        == (reply["choices"][0]["message"]["content"])
    )
    assert f"{reply['usage']['completion_tokens']} tokens" in answer(page).inner_text()


def test_errors_are_shown_in_place(page):
    page.get_by_label("Temperature").fill("-1")
    ask(page, "Hello")
    page.get_by_role("alert").get_by_text("temperature must be a finite number").wait_for()
    page.get_by_label("Temperature").fill("1")
    page.get_by_role("button", name="Retry").click()
    answer(page).get_by_text("tokens/s").wait_for()


def test_a_wrong_key_is_named(visit):
    page = visit()
    page.get_by_label("API key").fill("wrong")
    page.get_by_label("API key").press("Enter")
    page.get_by_text("The server wants an API key: wrong API key").wait_for()


def test_the_policy_forbids_foreign_code(url):
    with httpx.Client(base_url=url) as http:
        for path in FILES:
            reply = http.get(path)
            assert reply.status_code == 200
            assert reply.headers["content-security-policy"] == POLICY
        assert http.get("/nothing.js", headers={"x-api-key": "right"}).status_code == 404
