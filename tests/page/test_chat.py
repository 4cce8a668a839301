"""What a person does with the page: send, stop, edit, retry, reload, a wrong key."""

from __future__ import annotations

import pytest
from scripted import WAIT, answer, ask, contents, data, done, in_view_of_end


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
