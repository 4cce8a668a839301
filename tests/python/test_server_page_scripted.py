"""The chat page against a scripted server: delays, broken streams, hostile text. Needs no model.

`SCREENSHOTS=folder` keeps pictures of both themes and sizes there.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import astrai_rs

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

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


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
    asyncio.set_event_loop(None)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def url(script: Script) -> Iterator[str]:
    handler = type("Scripted", (Handler,), {"script": script})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        script.go_on.set()
        server.shutdown()
        thread.join(5)


@pytest.fixture
def visit(browser, url) -> Iterator[Callable]:
    """Open the page; every console error and policy violation in it fails the test."""
    contexts, faults = [], []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(WAIT * 1000)
        contexts.append(context)
        context.expose_function("reportFault", lambda fault: faults.append(fault))
        context.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => reportFault(e.violatedDirective))"
        )
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: faults.append(m.text) if is_fault(m) else None)
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def is_fault(message) -> bool:
    """Chromium logs each 401 and each broken connection; those are not the page's."""
    return message.type in ("error", "warning") and "Failed to load resource" not in message.text


@pytest.fixture
def page(visit):
    page = visit()
    page.get_by_text("scripted-model").wait_for()
    return page


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


def test_a_stream_is_shown_as_it_comes(page, script):
    script.go_on.clear()
    ask(page)
    answer(page).get_by_text("Hello", exact=True).wait_for()
    assert page.get_by_role("button", name="Send").count() == 0
    assert page.get_by_role("status").inner_text() == "Answering"
    script.go_on.set()
    answer(page).get_by_text("Hello there").wait_for()
    answer(page).get_by_text("4 tokens").wait_for()
    note = answer(page).locator(".foot span").inner_text()
    assert "tokens/s" in note
    assert "first after" in note
    assert page.get_by_role("status").inner_text() == "Answer complete"
    body = script.bodies[-1]
    assert (body["model"], body["stream"], body["stream_options"]) == (
        "scripted-model",
        True,
        {"include_usage": True},
    )


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_keeps_what_came_and_leaves_the_server(page, script, how):
    script.go_on.clear()
    ask(page)
    answer(page).get_by_text("Hello", exact=True).wait_for()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    assert answer(page).locator(".body").inner_text() == "Hello"
    assert script.gone.wait(WAIT)
    assert page.evaluate("document.activeElement.id") == "input"


def test_edit_drops_what_followed(page, script):
    for text in ("First", "Second"):
        ask(page, text)
        page.get_by_text("Hello there").nth(0 if text == "First" else 1).wait_for()
        done(page, 1 if text == "First" else 2)
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit message").press("Escape")
    assert page.get_by_role("article").count() == 4
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit message").fill("Changed")
    page.get_by_label("Edit message").press("Enter")
    done(page)
    assert page.get_by_role("article").count() == 2
    assert contents(script) == ["Changed"]


def test_nothing_else_starts_during_an_answer(page, script):
    ask(page)
    done(page)
    script.go_on.clear()
    ask(page, "More")
    page.get_by_role("button", name="Stop").wait_for()
    assert page.get_by_role("button", name="Edit").first.is_disabled()
    assert page.get_by_role("button", name="Retry").first.is_disabled()
    ask(page, "Too early")
    script.go_on.set()
    done(page, 2)
    assert len(script.bodies) == 2
    assert page.get_by_label("Message", exact=True).input_value() == "Too early"


def test_new_chat_during_an_answer(page, script):
    script.go_on.clear()
    ask(page, "Old")
    answer(page).get_by_text("Hello", exact=True).wait_for()
    page.get_by_role("button", name="New chat").click()
    script.go_on.set()
    ask(page, "New")
    done(page)
    assert contents(script) == ["New"]
    assert page.get_by_role("article").count() == 2


def test_an_error_event_keeps_the_text_and_can_be_retried(page, script):
    script.tail = [data({"error": {"message": "the engine failed", "type": "server_error"}})]
    ask(page)
    page.get_by_role("alert").get_by_text("the engine failed").wait_for()
    assert "Hello there" in answer(page).inner_text()
    script.tail = None
    page.get_by_role("button", name="Retry").click()
    answer(page).get_by_text("4 tokens").wait_for()
    assert page.get_by_role("alert").count() == 0
    assert contents(script) == ["Question"]


def test_a_stream_without_its_end_is_an_error(page, script):
    script.tail = []
    ask(page)
    page.get_by_role("alert").get_by_text("The connection ended before the answer did").wait_for()


def test_a_server_that_is_away(page, url):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page)
    page.get_by_role("alert").get_by_text("The server cannot be reached").wait_for()


def test_the_token_limit_is_named(page, script):
    script.finish = "length"
    ask(page)
    page.get_by_text("ended at the token limit").wait_for()


def test_a_wrong_key_then_the_right_one(visit, script):
    script.key = "right"
    page = visit()
    key = page.get_by_label("API key")
    page.get_by_text("The server wants an API key: wrong API key").wait_for()
    assert page.evaluate("document.activeElement.id") == "key"
    key.fill("wrong")
    ask(page)
    page.get_by_role("alert").get_by_text("wrong API key").wait_for()
    assert page.evaluate("document.activeElement.id") == "key"
    key.fill("right")
    key.press("Enter")
    page.get_by_text("scripted-model").wait_for()
    assert not page.locator("#key-note").is_visible()
    page.get_by_role("button", name="Retry").click()
    answer(page).get_by_text("4 tokens").wait_for()
    assert "right" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    page.get_by_text("scripted-model").wait_for()  # the tab still has the key


def test_conversation_and_settings_survive_a_reload(page, script):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Seed").fill("7")
    ask(page, "Remember")
    done(page)
    page.reload()
    page.get_by_text("scripted-model").wait_for()
    assert page.get_by_role("article").count() == 2
    assert "4 tokens" in answer(page).inner_text()
    ask(page, "More")
    done(page, 2)
    body = script.bodies[-1]
    assert contents(script) == ["Be brief.", "Remember", "Hello there", "More"]
    assert (body["top_p"], body["seed"], body["max_tokens"]) == (0.9, 7, 512)
    assert "temperature" not in body


def test_a_reload_in_the_middle_keeps_what_came(page, script):
    script.go_on.clear()
    ask(page, "Long")
    answer(page).get_by_text("Hello", exact=True).wait_for()
    page.reload()
    page.get_by_text("stopped").wait_for()
    assert page.get_by_role("alert").count() == 0
    assert answer(page).locator(".body").inner_text() == "Hello"
    assert page.get_by_role("article", name="You").get_by_text("Long").count() == 1


def test_spoilt_storage_is_an_empty_chat(page):
    for spoilt in ("{", '"text"', '[null, {"role": "system"}]'):
        page.evaluate("(value) => localStorage.setItem('astrai_rs.messages', value)", spoilt)
        page.reload()
        page.get_by_text("The conversation stays in this browser").wait_for()


def test_reasoning_folds_and_stays_as_the_reader_left_it(page, script):
    script.deltas = [{"reasoning_content": "Let me think"}, {"content": "42"}, {"content": "!"}]
    script.go_on.clear()
    ask(page)
    summary = page.get_by_text("Reasoning", exact=True)
    page.get_by_text("Let me think").wait_for()
    summary.click()
    summary.click()  # the reader wants it open
    script.go_on.set()
    done(page)
    assert page.get_by_text("Let me think").is_visible()
    page.reload()
    page.get_by_text("42!").wait_for()
    assert not page.get_by_text("Let me think").is_visible()
    ask(page, "More")
    done(page, 2)
    assert "Let me think" not in contents(script)


HOSTILE = """\
<script>alert(1)</script> <img src=x onerror=alert(2)> &lt;b&gt;
[x](javascript:alert(3)) [y](data:text/html,z) [z](https://a.example/"onclick="alert(4))
**<svg onload=alert(5)>** `<i>code</i>`

# <iframe src=//evil.example>

```<b>
</code></pre><script>alert(6)</script>
```
"""


def test_model_text_stays_text(page, script):
    script.deltas = [{"reasoning_content": "<img src=x onerror=alert(7)>"}, {"content": HOSTILE}]
    ask(page, "<img src=x onerror=alert(8)>")
    done(page)
    assert page.locator("main :is(script, img, svg, iframe, b, i, [onclick], [onerror])").count() == 0
    text = answer(page).locator(".body").inner_text()
    for piece in ("<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "&lt;b&gt;", "(javascript:"):
        assert piece in text
    links = [link.get_attribute("href") for link in page.locator("main a").all()]
    assert all(link.startswith("https://") for link in links)
    assert all("noopener" in link.get_attribute("rel") for link in page.locator("main a").all())


MARKDOWN = """\
# Head
Some **bold *both*** and *it* and _under_, 2 * 3 * 4, a_b_c, __init__, `x*y*z`.
A [link](https://a.example/b_(c)).
1. one
   ```python
   if x:
       pass
   ```

2. two
   - deep
     more
   - er
* * *
- last
"""


def test_markdown(page, script):
    script.deltas = [{"content": piece} for piece in MARKDOWN.splitlines(keepends=True)]
    ask(page)
    done(page)
    body = answer(page).locator(".body")
    assert body.get_by_role("heading", name="Head").count() == 1
    assert body.locator("strong").inner_text() == "bold both"
    assert body.locator("strong em").inner_text() == "both"
    assert body.locator("p > em").all_inner_texts()[-2:] == ["it", "under"]
    assert "2 * 3 * 4, a_b_c, __init__, x*y*z." in body.inner_text()
    assert body.locator("a").get_attribute("href") == "https://a.example/b_(c)"
    assert body.locator("> ol > li").count() == 2
    assert body.locator("> ol > li pre code").inner_text() == "if x:\n    pass"
    assert body.locator("> ol > li > ul > li").all_inner_texts() == ["deep\nmore", "er"]
    assert body.locator("> hr").count() == 1
    assert body.locator("> ul > li").all_inner_texts() == ["last"]


@pytest.mark.parametrize(
    "piece", ["[", "*", "**a ", "`", "_a ", "- ", "[a](", "    " * 50 + "- x\n", "```\n"]
)
def test_hostile_markdown_takes_no_time(page, script, piece):
    script.deltas = [{"content": (piece * 50_000)[:100_000]}]
    start = time.monotonic()
    ask(page)
    done(page)
    assert time.monotonic() - start < 5
    page.get_by_role("button", name="New chat").click()


def test_lists_in_lists_in_lists(page, script):
    script.deltas = [{"content": "".join(f"{' ' * (2 * depth)}- x\n" for depth in range(500))}]
    ask(page)
    done(page)
    assert page.locator("main li").count() == 500


def test_copy(visit, script):
    script.deltas = [{"content": "See:\n```py\nprint(1)\n```"}]
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "Mine")
    done(page)
    for name, text in (
        ("Copy code", "print(1)"),
        ("Copy answer", "See:\n```py\nprint(1)\n```"),
        ("Copy message", "Mine"),
    ):
        page.get_by_role("button", name=name).click()
        page.get_by_text("Copied").first.wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == text
        page.get_by_text("Copied").first.wait_for(state="detached")
    # Plain http from another machine: there is no clipboard object.
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.get_by_role("button", name="Copy code").click()
    page.get_by_text("Copied").wait_for()


def test_the_page_follows_the_end_until_the_reader_scrolls_up(page, script):
    script.deltas = [{"content": f"line {n}\n\n"} for n in range(60)]
    ask(page)
    done(page)
    assert in_view_of_end(page)
    script.go_on.clear()
    ask(page, "Again")
    page.get_by_role("button", name="Stop").wait_for()
    page.evaluate("messages.scrollTop = 100")
    script.go_on.set()
    done(page, 2)
    assert page.evaluate("messages.scrollTop") == 100


def test_the_theme_follows_the_system_until_it_is_chosen(visit):
    page = visit(color_scheme="dark")
    back = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(back)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(back)
    assert dark != light
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.evaluate(back) == dark
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
    page.reload()
    assert page.evaluate(back) == dark


def test_without_motion_the_sign_of_waiting_stands_still(visit, script):
    script.go_on.clear()
    page = visit(reduced_motion="reduce")
    ask(page)
    answer(page).get_by_text("Hello", exact=True).wait_for()
    style = "getComputedStyle(document.querySelector('.waiting > p'), '::after')"
    assert page.evaluate(f"{style}.content") != "none"
    assert page.evaluate(f"{style}.animationName") == "none"


def test_keyboard_alone(page, script):
    page.keyboard.type("Line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    done(page)
    assert contents(script) == ["Line one\nline two"]
    tab_to(page, "Edit", back=True)
    page.keyboard.press("Enter")
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    done(page)
    assert len(script.bodies) == 2
    tab_to(page, "Settings", back=True)
    page.keyboard.press("Enter")
    assert page.get_by_role("region", name="Settings").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_role("region", name="Settings").is_visible()
    assert focused(page) == "Settings"


def focused(page) -> str:
    return page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent")


def tab_to(page, name: str, back: bool) -> None:
    for _ in range(20):
        page.keyboard.press("Shift+Tab" if back else "Tab")
        style = "getComputedStyle(document.activeElement)"
        assert page.evaluate(f"{style}.outlineStyle !== 'none' || document.activeElement.id === 'input'")
        if focused(page) == name:
            return
    raise AssertionError(f"no way to {name} by keyboard")


def test_names_and_landmarks(page, script):
    script.deltas = [{"reasoning_content": "Hm"}, {"content": "```\nx\n```"}]
    ask(page)
    done(page)
    page.get_by_role("button", name="Settings").click()
    for role, name in (
        ("banner", None),
        ("navigation", "Chat"),
        ("region", "Settings"),
        ("main", "Conversation"),
        ("form", "Your message"),
        ("status", None),
    ):
        assert page.get_by_role(role, **({"name": name} if name else {})).count() == 1, role
    fields = page.locator("input, textarea").all()
    assert all(field.evaluate("(e) => e.labels.length > 0 || e.ariaLabel") for field in fields)
    for each in page.get_by_role("button").all():
        assert each.get_attribute("aria-label") or each.inner_text()


QUESTION = "How do I read a file line by line in Python, and what should I watch out for?"
EXAMPLE = """\
Open it in a `with` block and iterate over the file object:

```python
with open("notes.txt", encoding="utf-8") as file:
    for number, line in enumerate(file, start=1):
        print(number, line.rstrip("\\n"), "a line that is too long for a phone's screen")
```

Two things to **watch out** for:

1. Each line keeps its line break; `rstrip("\\n")` takes it off.
2. Name the encoding, or it depends on the machine. See [the docs](https://docs.python.org/3/).
"""


@pytest.mark.parametrize(("width", "height"), [(360, 640), (390, 844), (1280, 800)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen(visit, script, width, height, scheme):
    script.deltas = [{"reasoning_content": "The user wants an idiom. " * 6}]
    script.deltas += [{"content": piece} for piece in EXAMPLE.splitlines(keepends=True)]
    page = visit(viewport={"width": width, "height": height}, color_scheme=scheme)
    shot(page, f"empty-{scheme}-{width}")
    ask(page, QUESTION)
    done(page)
    fits(page, width)
    shot(page, f"chat-{scheme}-{width}")
    page.get_by_role("button", name="Settings").click()
    fits(page, width)
    shot(page, f"settings-{scheme}-{width}")
    page.get_by_role("button", name="Settings").click()
    script.deltas = [{"content": "W" * 3000}]
    script.tail = [data({"error": {"message": "x" * 1000}})]
    ask(page, "M" * 3000)
    done(page, 2)
    fits(page, width)
    assert in_view_of_end(page)
    shot(page, f"error-{scheme}-{width}")


def fits(page, width: int) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("messages.scrollWidth <= messages.clientWidth")
    assert page.get_by_label("Message", exact=True).is_visible()


def shot(page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_no_text_becomes_html():
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 500
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", " style="):
            assert word not in text, (file.name, word)
