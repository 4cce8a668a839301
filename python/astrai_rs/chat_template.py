"""Chat templates: sandboxed Jinja with the semantics of Hugging Face transformers 5.

Templates come with a model and are untrusted code. They run in Jinja's immutable sandbox and see only plain
data (`plain`), never the caller's objects.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients pass a message's reasoning, the standard one first."""

_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks where the final message ends in the rendered text. The space shows whether the template trims."""


class ChatTemplateError(ValueError):
    """A chat template that refused the conversation or is broken; the cause is the template's own error."""


class ChatTemplate:
    """A model's chat template, or its named templates.

    >>> ChatTemplate("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}").render(
    ...     [{"role": "user", "content": "Hi"}])
    '[user] Hi'

    Args:
        source: the Jinja text, or `{name: text}` from which `render` chooses: `tool_use` when tools are
            given, else `default`.
        special_tokens: `{"bos_token": "<s>", …}`, visible to the template by name.
        trim: Jinja's `trim_blocks` and `lstrip_blocks`, as Hugging Face templates expect.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        *,
        trim: bool = True,
    ) -> None:
        if not isinstance(source, (str, Mapping)):
            raise TypeError(f"a chat template is a string or a dict of strings, not {type(source).__name__}")
        self.source = source if isinstance(source, str) else dict(source)
        self.special_tokens = dict(special_tokens or {})
        self._trim = trim

    def render(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: dicts with `role` and `content` (objects with `model_dump` and dataclasses work too).
            tools: JSON schemas of functions.
            documents: dicts with `title` and `text`, for retrieval templates.
            add_generation_prompt: end with the header of an assistant message.
            continue_final_message: leave the last message open; a string names its field (`content` if True).
            kwargs: variables for the template; they win over special tokens.

        Raises:
            ValueError: no template fits, no messages, contradicting flags, or the final message is not
                continuable.
            TypeError: a message, tool or document is not a dict.
            ChatTemplateError: the template itself refuses (`raise_exception`) or is broken.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        tools = _dicts("tools", tools)
        documents = _dicts("documents", documents)
        chat = _chat(messages)
        source = self._choose(tools)
        field = "content" if continue_final_message is True else continue_final_message
        final = _mark_final(chat, field, source) if field else ""
        variables = {
            **self.special_tokens,
            **plain(kwargs),
            "messages": chat,
            "tools": plain(tools),
            "documents": plain(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = _compile(source, self._trim).render(variables)
        except Exception as error:  # whatever a foreign template does
            raise ChatTemplateError(f"the chat template failed: {error}") from error
        return _cut_final(text, final) if field else text

    def _choose(self, tools: object) -> str:
        if isinstance(self.source, str):
            return self.source
        name = "tool_use" if tools is not None and "tool_use" in self.source else "default"
        if name not in self.source:
            raise ValueError(f"the model has several chat templates and no default: {sorted(self.source)}")
        return self.source[name]


def plain(value: Any) -> Any:
    """`value` rebuilt from plain JSON types; anything else becomes `"<TypeName>"`.

    The sandbox guards attributes that it knows. Objects of other libraries bring methods that it does not
    know.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # enums and other subclasses, stripped to their base
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else _plain_subclass(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return plain(value.model_dump())
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(value.item())
    return f"<{type(value).__name__}>"


def _plain_subclass(value: Sequence[Any]) -> Any:
    return (
        [plain(item) for item in value] if isinstance(value, list) else tuple(plain(item) for item in value)
    )


def _chat(messages: Any) -> list[dict[str, Any]]:
    """A fresh plain copy of the messages, without None values, with reasoning under all its names."""
    if isinstance(messages, (str, bytes, Mapping)) or not hasattr(messages, "__iter__"):
        raise TypeError(f"messages must be a list of dicts, not {type(messages).__name__}")
    chat = plain(list(messages))
    if not chat:
        raise ValueError("messages is empty: a chat template needs at least one message")
    out = []
    for message in chat:
        if not isinstance(message, dict):
            raise TypeError(f"each message must be a dict with 'role' and 'content', not {message!r}")
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        out.append(message)
    return out


def _dicts(name: str, items: Iterable[Any] | None) -> list[Any] | None:
    """`items` as a list: a template reads it more than once."""
    if items is None:
        return None
    if isinstance(items, (str, bytes, Mapping)) or not hasattr(items, "__iter__"):
        raise TypeError(f"{name} must be a list of dicts, not {type(items).__name__}")
    listed = list(items)
    for item in listed:
        if not isinstance(item, Mapping):
            raise TypeError(f"each of {name} must be a dict, not {type(item).__name__}")
    return listed


def _mark_final(chat: list[dict[str, Any]], field: str, source: str) -> str:
    """Append the marker to `field` of the last message; returns the text before it."""
    message = chat[-1]
    content = message.get(field)
    if content is None:
        raise ValueError(f"continue_final_message: the final message has no {field!r}")
    names = [name for name in _REASONING if message.get(name) == content] if field in _REASONING else [field]
    if not any(name in source for name in names):
        raise ValueError(f"continue_final_message: the chat template does not use {field!r}")
    if isinstance(content, (list, tuple)):
        block = next((block for block in reversed(content) if "text" in block), None)
        if block is None:
            raise ValueError("continue_final_message: the final message has no text to continue")
        content, block["text"] = block["text"], block["text"] + _CONTINUE
    else:
        for name in names:
            message[name] = content + _CONTINUE
    return str(content)


def _cut_final(text: str, final: str) -> str:
    """`text` up to the marker; if the template trimmed the message, trimmed too."""
    marker = _CONTINUE.strip()
    if marker not in text or final.strip() not in text:
        raise ValueError("continue_final_message: the chat template does not render the final message whole")
    end = text.rindex(marker)
    return text[:end] if text.startswith(_CONTINUE, end) else text[:end].rstrip()


@lru_cache(maxsize=64)
def _compile(source: str, trim: bool) -> jinja2.Template:
    return _environment(trim).from_string(source)


@lru_cache(maxsize=2)
def _environment(trim: bool) -> jinja2.Environment:
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks what the assistant wrote; it renders as its body."""

        tags = {"generation"}  # noqa: RUF012  Jinja's own attribute

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=trim, lstrip_blocks=trim, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_Dict(),
        namespace=_namespace_class(),
    )
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON. Jinja's own filter escapes HTML, which would change what the model reads."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(format)


class _Dict:
    """What templates see as `dict`: it makes dicts and has no attributes to climb out by."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _namespace_class() -> type:
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a chat template may not set {name!r}: it starts with an underscore")

    class TemplateNamespace(Namespace):
        """A Jinja namespace that refuses names with a leading underscore."""

        # No named self: `namespace(self=1)` is legal in a template.
        def __init__(*args: Any, **kwargs: Any) -> None:
            attributes = dict(*args[1:], **kwargs)
            for name in attributes:
                check(name)
            Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return TemplateNamespace
