"""The chat page in a browser. Needs Playwright and a chromium; skipped without.

`SCREENSHOTS=folder` keeps pictures of both themes and several sizes there.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer

import pytest
from scripted import WAIT, Handler, Script


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
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
