"""How models write tool calls: the common formats as data, and grammars that make a model call a tool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolFormat:
    """A way to write calls: `begin` JSON `end`, where the JSON is an object `{"name", <arguments>}`; or
    `begin` name `name_end` JSON, where the JSON is the arguments."""

    name: str
    begin: str = ""
    """Marker before a call, or before the list of calls. Empty: any object that names a tool is a call."""
    end: str = ""
    """Marker after a call."""
    is_list: bool = False
    """One JSON list holds all calls."""
    arguments: str = "arguments"
    """The key of the arguments."""
    separator: str = ""
    """What stands between two calls that are not in a list."""
    space: str = ""
    """White space on the inner side of the markers."""
    prefix: str = ""
    """Marker that may stand before a call where `begin` is empty."""
    name_end: str = ""
    """Marker between a bare name and the arguments, for models that write no object around them."""


FORMATS = {
    format.name: format
    for format in (
        ToolFormat("hermes", "<tool_call>", "</tool_call>", space="\n", separator="\n"),
        ToolFormat("mistral", "[TOOL_CALLS]", is_list=True, space=" "),
        ToolFormat("mistral-args", "[TOOL_CALLS]", name_end="[ARGS]"),
        ToolFormat("llama3", arguments="parameters", separator="; ", prefix="<|python_tag|>"),
        ToolFormat("json", separator="\n"),
    )
}


def detect_format(chat_template: str) -> ToolFormat | None:
    """The format that a chat template asks its model for; None for a template without tools."""
    if "tools" not in chat_template:
        return None
    for name in ("hermes", "mistral-args", "mistral"):
        if FORMATS[name].begin in chat_template and FORMATS[name].name_end in chat_template:
            return FORMATS[name]
    has_llama_headers = "<|start_header_id|>" in chat_template and "parameters" in chat_template
    is_llama = FORMATS["llama3"].prefix in chat_template or has_llama_headers
    return FORMATS["llama3" if is_llama else "json"]


def detect_reasoning(chat_template: str) -> tuple[str, str] | None:
    """The markers around reasoning that a chat template knows, if it does."""
    return ("<think>", "</think>") if "</think>" in chat_template else None


_SEPARATORS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""As Python's `json.dumps` writes, which most models were trained on."""

_NOTHING = {"properties": {}, "additionalProperties": False}
"""The schema of a tool without parameters."""


def tool_grammar(
    tool_format: ToolFormat,
    tools: Sequence[Mapping[str, Any]],
    *,
    parallel: bool,
    token_ids: Mapping[str, int],
) -> str:
    """A Lark grammar (llguidance's) of outputs that call one of the tools; with `parallel`, any number of
    times but at least once.

    Args:
        tools: `{"type": "function", "function": {"name", "parameters"}}` each; parameters are a JSON schema.
        token_ids: ids of the model's control tokens, by their text: markers among them are no plain text.
    """

    def quoted(text: str) -> str:
        return json.dumps(text).replace("\x7f", "\\u007f")  # Lark wants every control character escaped

    def literal(text: str) -> str:
        return f"<[{token_ids[text]}]>" if text in token_ids else quoted(text)

    def sequence(*parts: str) -> str:
        return " ".join(literal(part) for part in parts if part)

    rules = []
    for index, tool in enumerate(tools):
        function = tool["function"]
        schema = {"type": "object", **(function.get("parameters") or _NOTHING), "x-guidance": _SEPARATORS}
        if tool_format.name_end:
            call = f"{quoted(function['name'])} {literal(tool_format.name_end)} arguments_{index}"
        else:
            head = f'{{"name": {json.dumps(function["name"])}, "{tool_format.arguments}": '
            call = f'{quoted(head)} arguments_{index} "}}"'
        rules.append(f"tool_{index}: {call}")
        rules.append(f"arguments_{index}: %json {json.dumps(schema)}")
    names = " | ".join(f"tool_{index}" for index in range(len(tools)))
    begin = sequence(tool_format.begin, tool_format.space)
    end = sequence(tool_format.space, tool_format.end)
    if tool_format.is_list:
        more = '(", " tool)*' if parallel else ""
        start = f'start: {begin} "[" tool {more} "]"'
        return "\n".join([start, f"tool: {names}", *rules])
    more = f"({sequence(tool_format.separator)} call)*" if parallel else ""
    return "\n".join([f"start: call {more}", f"call: {begin} tool {end}", f"tool: {names}", *rules])
