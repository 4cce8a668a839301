"""The chat page in a browser, as a person uses it. Needs Playwright and a chromium; skipped without."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from astrai_rs import Engine
from conftest import GLASS
from serving import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

ANSWER = (
    "# Title\n\nSome **bold** text, `code`, <img src=x onerror=alert(1)> and [a link](https://a.example).\n"
)
ANSWER += "\n- one\n- two\n\n```\nprint('hi')\n```\n"


@pytest.fixture(scope="module")
def browser():
    """On a thread of its own: Playwright's loop and pytest-asyncio's do not share one."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
    asyncio.set_event_loop(None)


class Model:
    """What the page's answers are made of, in place of a model that writes sense."""

    def __init__(self) -> None:
        self.pieces = [ANSWER]
        self.go_on = threading.Event()
        self.go_on.set()
        self.bodies: list[dict] = []


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[str, Model]]:
    """The real app; only the text of streamed chat answers is scripted."""
    from astrai_rs.server.chat import ChatReply
    from astrai_rs.server.sse import DONE, event

    model = Model()

    async def scripted(self, generation):
        model.bodies.append(self._body.model_dump())
        generation.close()
        for piece in model.pieces:
            yield event({"choices": [{"index": 0, "delta": {"content": piece}}]})
            while not model.go_on.is_set():
                await asyncio.sleep(0.01)
        yield event({"choices": [], "usage": {"completion_tokens": 12}})
        yield DONE

    with pytest.MonkeyPatch.context() as patch, Engine(GLASS) as engine:
        patch.setattr(ChatReply, "stream", scripted)
        with serving(engine, api_keys=("right",), keep_alive_s=0.1) as (url, _):
            yield url, model


@pytest.fixture
def page(browser, site):
    url, model = site
    model.pieces, model.bodies = [ANSWER], []
    model.go_on.set()
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda m: faults.append(m.text) if m.type == "error" and "Failed to load" not in m.text else None,
    )
    page.goto(url)
    page.get_by_label("API key").fill("right")
    page.get_by_label("API key").press("Enter")
    page.get_by_label("API key").blur()
    page.get_by_text("test", exact=True).wait_for()
    page.get_by_role("button", name="Settings").click()
    yield page
    assert faults == []
    context.close()


def ask(page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def test_an_answer_streams_and_is_text(page, site):
    ask(page, "Hello")
    article = page.get_by_role("article", name="Model")
    article.get_by_text("12 tokens").wait_for()
    assert article.get_by_role("heading", name="Title").count() == 1
    assert article.locator("strong").inner_text() == "bold"
    assert article.locator("li").all_inner_texts() == ["one", "two"]
    assert article.locator("pre code").inner_text() == "print('hi')"
    assert article.get_by_role("link").get_attribute("href") == "https://a.example"
    # What a model writes is never HTML.
    assert article.locator("img").count() == 0
    assert "<img src=x" in article.inner_text()
    assert site[1].bodies[-1]["messages"][-1]["content"] == "Hello"


def test_stop_edit_and_retry(page, site):
    model = site[1]
    model.go_on.clear()
    ask(page, "First")
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("heading", name="Title").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    model.go_on.set()
    page.get_by_role("button", name="Retry").click()
    page.get_by_text("12 tokens").wait_for()
    assert len(model.bodies[-1]["messages"]) == 1
    ask(page, "Second")
    page.get_by_text("12 tokens").nth(1).wait_for()
    assert [m["role"] for m in model.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit message").fill("Changed")
    page.get_by_role("article").first.get_by_role("button", name="Send").click()
    page.get_by_text("12 tokens").wait_for()
    assert [m["content"] for m in model.bodies[-1]["messages"]] == ["Changed"]
    assert page.get_by_role("article").count() == 2


def test_the_conversation_survives_a_reload(page, site):
    ask(page, "Remember")
    page.get_by_text("12 tokens").wait_for()
    page.reload()
    page.get_by_text("Remember").wait_for()
    assert page.get_by_role("article").count() == 2
    page.get_by_role("button", name="New chat").click()
    page.reload()
    page.get_by_text("Ask something. The conversation").wait_for()
    assert page.get_by_role("article").count() == 0


def test_settings_are_sent(page, site):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.2")
    page.get_by_label("Seed").fill("7")
    ask(page, "Hi")
    page.get_by_text("12 tokens").wait_for()
    body = site[1].bodies[-1]
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.2, 7, 512)
    assert body["messages"][0]["content"] == "Be brief."


def test_a_wrong_key_asks_for_another(page):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Settings").click()
    ask(page, "Hello")
    page.get_by_text("The server wants an API key: wrong API key").wait_for()
    page.get_by_label("API key").fill("right")
    page.get_by_role("button", name="Retry").click()
    page.get_by_text("12 tokens").wait_for()


def test_errors_are_shown_in_place(page, site):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Top p").fill("0.5")
    page.get_by_label("Temperature").fill("-1")
    ask(page, "Hello")
    page.get_by_role("alert").get_by_text("temperature must be a finite number").wait_for()
    page.evaluate("document.getElementById('temperature').value = '1'")
    page.get_by_role("button", name="Retry").click()
    page.get_by_text("12 tokens").wait_for()


def test_keyboard_alone(page):
    page.keyboard.press("Tab")
    for _ in range(12):
        if page.evaluate("document.activeElement.id") == "input":
            break
        page.keyboard.press("Tab")
    page.keyboard.type("Line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    page.get_by_text("12 tokens").wait_for()
    assert page.get_by_role("article", name="You").inner_text().startswith("Line one\nline two")
    names = [b.get_attribute("aria-label") or b.inner_text() for b in page.get_by_role("button").all()]
    assert all(names)


@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_screen_in_both_themes(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    ask(page, "Hello " * 30)
    page.get_by_text("12 tokens").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"dark-{width}.png"))
        page.get_by_role("button", name="Switch between light and dark").click()
        page.screenshot(path=str(Path(folder) / f"light-{width}.png"))


def test_the_policy_forbids_foreign_code(site):
    import httpx

    with httpx.Client(base_url=site[0]) as http:
        for path in ("/", "/app.js", "/markdown.js", "/style.css"):
            answer = http.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
        assert "innerHTML" not in http.get("/app.js").text + http.get("/markdown.js").text
        assert json.dumps(http.get("/nothing.js", headers={"x-api-key": "right"}).status_code) == "404"
