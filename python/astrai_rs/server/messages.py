"""Chat messages on the wire → the dicts that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from astrai_rs.server.errors import invalid
from astrai_rs.server.sampling import Items, Wire, at_most, check_schema
from astrai_rs.server.settings import ServerSettings


class TextPart(Wire):
    type: Literal["text", "input_text", "output_text"]
    text: str
    # Accepted: nothing here depends on them.
    cache_control: dict[str, Any] | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class OtherPart(Wire):
    """Read so that it can be refused by name."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: str


def by_type(*known: str, default: str = "<other>") -> Discriminator:
    """Chooses a union's member by its `type`, so that what is wrong in it is named. Tags: `<type>`."""

    def tag(value: Any) -> str:
        kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
        return f"<{kind}>" if kind in known else default

    return Discriminator(tag)


_TEXTS = ("text", "input_text", "output_text")
Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[TextPart, Tag("<input_text>")]
    | Annotated[TextPart, Tag("<output_text>")]
    | Annotated[OtherPart, Tag("<other>")],
    by_type(*_TEXTS),
]
"""A piece of a message."""


class FunctionCall(Wire):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Wire):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Items[Part] | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    # Clients send answers back as they got them.
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionTool(Wire):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def template_messages(messages: Sequence[Message], settings: ServerSettings) -> list[dict[str, Any]]:
    """Messages as templates expect them: text as one string, tool arguments as objects.

    Raises:
        ApiError: there are too many, or a part that is not text.
    """
    at_most("messages", len(messages), settings.max_messages)
    return [_template_message(i, message) for i, message in enumerate(messages)]


def _template_message(index: int, message: Message) -> dict[str, Any]:
    where = f"messages.{index}"
    # `developer` is OpenAI's newer word for `system`; templates know only the old one.
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    out["content"] = _text(where, message)
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            out[name] = value
    if message.tool_calls:
        out["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return out


def _text(where: str, message: Message) -> str:
    if message.content is None:
        if message.role != "assistant":
            raise invalid(f"{where}.content is missing", param=f"{where}.content")
        return ""
    return joined(where, message.content)


def joined(where: str, content: str | Sequence[TextPart | OtherPart]) -> str:
    """The text of `where`'s content."""
    if isinstance(content, str):
        return content
    for part in content:
        if not isinstance(part, TextPart):
            text = f"{where}.content: parts of type {part.type!r} are not supported: only text is"
            raise invalid(text, param=f"{where}.content", code="unsupported")
    return "".join(part.text for part in content if isinstance(part, TextPart))


def _template_call(call: ToolCall) -> dict[str, Any]:
    """Arguments as an object; a call that was cut off comes back with what it had, as text."""
    arguments: Any = call.function.arguments
    if isinstance(arguments, str):
        parsed = _object(arguments or "{}")
        arguments = arguments if parsed is None else parsed
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


_TOOLS_PROMPT = """\
You may call functions. Their signatures, as JSON:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON inside <tool_call> tags:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


def spelled_out(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Tools, calls and their results as plain text, for a template that has no place for them."""
    out = [_spelled_out(message) for message in messages]
    if not tools:
        return out
    signatures = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    system = _TOOLS_PROMPT.format(tools=signatures)
    if out and out[0]["role"] == "system":
        out[0]["content"] += "\n\n" + system
        return out
    return [{"role": "system", "content": system}, *out]


def _spelled_out(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if message["role"] in ("tool", "function"):
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    parts = [content, *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
    return {"role": message["role"], "content": "\n".join(part for part in parts if part)}


def check_tools(tools: Sequence[Tool], settings: ServerSettings) -> None:
    """How many, and how large their schemas are.

    Raises:
        ApiError: they are over the server's limits.
    """
    at_most("tools", len(tools), settings.max_tools)
    for index, tool in enumerate(tools):
        schema = json.dumps(tool.function.parameters or {})
        check_schema(f"tools.{index}.function.parameters", schema, settings)


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as templates expect them."""
    return [tool.model_dump(exclude_none=True) for tool in tools]
