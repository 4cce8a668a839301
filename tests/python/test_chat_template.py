"""ChatTemplate against what transformers rendered, and its refusals."""

from __future__ import annotations

import dataclasses
import enum
import json

import jinja2
import pytest

from astrai_rs import ChatTemplate
from astrai_rs.chat_template import plain
from conftest import FIXTURES
from make_chat_fixtures import CONVERSATIONS, OPTIONS, SPECIAL, TEMPLATES

CASES = json.loads((FIXTURES / "chat_templates.json").read_text(encoding="utf-8"))
USER = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("template", TEMPLATES)
def test_as_transformers(template):
    chat_template = ChatTemplate(TEMPLATES[template], SPECIAL)
    checked = 0
    for case in (case for case in CASES if case["template"] == template):
        arguments = CONVERSATIONS[case["conversation"]], OPTIONS[case["option"]]
        if "error" in case:
            with pytest.raises((jinja2.TemplateError, ValueError, TypeError)):
                chat_template.render(arguments[0], **arguments[1])
        else:
            assert chat_template.render(arguments[0], **arguments[1]) == case["text"], case
        checked += 1
    assert checked == len(CONVERSATIONS) * len(OPTIONS)


def test_messages_of_the_caller_stay_as_they_are():
    messages = [
        {"role": "assistant", "content": [{"type": "text", "text": "x"}], "reasoning": "r", "name": None}
    ]
    before = json.dumps(messages)
    template = ChatTemplate("{% for p in messages[0].content %}{{ p.text }}{% endfor %}")
    assert template.render(messages, continue_final_message=True) == "x"
    assert json.dumps(messages) == before


def test_plain_data():
    class Color(str, enum.Enum):  # noqa: UP042  what clients write
        RED = "red"

    @dataclasses.dataclass
    class Point:
        x: int
        inner: object

    class Model:
        def model_dump(self):
            return {"role": "user", "content": Color.RED}

    class Evil:
        def write(self): ...

    assert plain(Model()) == {"role": "user", "content": "red"}
    assert type(plain(Color.RED)) is str
    assert plain(Point(True, (1, Evil()))) == {"x": True, "inner": (1, "<Evil>")}
    assert plain({"a": [1.5, None, {2: "b"}]}) == {"a": [1.5, None, {2: "b"}]}
    import numpy

    assert plain(numpy.float32(0.5)) == 0.5
    assert plain(numpy.bool_(False)) is False
    assert plain(numpy.zeros(2)) == "<ndarray>"
    assert ChatTemplate("{{ messages[0].content }}").render([Model()]) == "red"


def test_astrai_templates_are_plain_jinja():
    source = "{% for m in messages %}\n{{ m.content }}\n{% endfor %}\n"
    assert ChatTemplate(source, trim=False).render(USER) == "\nHi\n"
    assert ChatTemplate(source).render(USER) == "Hi\n"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.render([]), ValueError, "messages is empty"),
        (lambda t: t.render("Hi"), TypeError, "list of dicts, not str"),
        (lambda t: t.render({"role": "user"}), TypeError, "list of dicts, not dict"),
        (lambda t: t.render(["Hi"]), TypeError, "each message must be a dict.*'Hi'"),
        (lambda t: t.render(USER, tools=["f"]), TypeError, "each of tools must be a dict, not str"),
        (lambda t: t.render(USER, tools={"f": 1}), TypeError, "tools must be a list of dicts, not dict"),
        (lambda t: t.render(USER, documents=[1]), TypeError, "each of documents must be a dict, not int"),
        (
            lambda t: t.render(USER, continue_final_message=True, add_generation_prompt=True),
            ValueError,
            "exclude each other",
        ),
        (lambda t: t.render([{"role": "user"}], continue_final_message=True), ValueError, "has no 'content'"),
        (
            lambda t: t.render([{"role": "u", "x": "y"}], continue_final_message="x"),
            ValueError,
            "does not use 'x'",
        ),
        (lambda t: ChatTemplate(3), TypeError, "string or a dict of strings, not int"),
        (lambda t: ChatTemplate({"rag": ""}).render(USER), ValueError, r"no default: \['rag'\]"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(ChatTemplate("{{ messages[0].content }}"))


def test_tools_may_come_from_any_iterable():
    """A template reads them more than once."""
    template = ChatTemplate(
        "{% for _ in 'ab' %}{% for tool in tools %}{{ tool.name }}{% endfor %}{% endfor %}"
    )
    tools = {"a": {"name": "x"}, "b": {"name": "y"}}
    for given in (list(tools.values()), tools.values(), iter(tools.values())):
        assert template.render([{"role": "user", "content": "a"}], tools=given) == "xyxy"
