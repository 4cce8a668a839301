"""Themes, screen sizes, keyboard use and names for assistive technology."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scripted import FOLDER, answer, ask, contents, data, done, in_view_of_end


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
