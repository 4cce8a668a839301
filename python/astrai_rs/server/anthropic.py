"""`/v1/messages`: Anthropic's interface over the same conversation. Wire types and pure converters."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from astrai_rs.server.chat import ChatPlan, ChatRequest, ChatSample
from astrai_rs.server.common import new_id
from astrai_rs.server.errors import from_exception, invalid
from astrai_rs.server.generation import Generation, Usage
from astrai_rs.server.messages import OtherPart, by_type
from astrai_rs.server.parse import Content, Delta, Reasoning, ToolCallArguments, ToolCallStart
from astrai_rs.server.sampling import Items, Number, Wire
from astrai_rs.server.sse import event


class TextBlock(Wire):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    citations: None = None


class ThinkingBlock(Wire):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Wire):
    """Nobody can read it: left out."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Wire):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None


_ResultPart = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[OtherPart, Tag("<other>")], by_type("text")
]


class ToolResultBlock(Wire):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Items[_ResultPart] = ""
    is_error: bool = False
    cache_control: dict[str, Any] | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[OtherPart, Tag("<other>")],
    by_type("text", "thinking", "redacted_thinking", "tool_use", "tool_result"),
]


class InputMessage(Wire):
    role: Literal["user", "assistant", "system"]
    content: str | Items[Block]


class AnthropicTool(Wire):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: dict[str, Any] | None = None
    strict: bool | None = None
    """Arguments follow the schema where `tool_choice` makes the model call."""


class AnthropicToolChoice(Wire):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Wire):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    """Taken, as Anthropic's clients must send it; only `max_tokens` bounds an answer."""


class OutputFormat(Wire):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Wire):
    format: OutputFormat | None = None
    effort: str | None = None


class MessagesRequest(Wire):
    model: str | None = None
    max_tokens: int = 1024
    messages: Annotated[Items[InputMessage], Field(min_length=1)]
    system: str | Items[TextBlock] | None = None
    temperature: Number = 1.0
    top_p: Number = 1.0
    top_k: int = 0
    stop_sequences: Items[str] | None = None
    stream: bool = False
    tools: Items[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    # Accepted: nothing here depends on them.
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    cache_control: dict[str, Any] | None = None


def chat_request(body: MessagesRequest) -> ChatRequest:
    """The same request in OpenAI's words."""
    messages: list[dict[str, Any]] = []
    if body.system:
        system = body.system if isinstance(body.system, str) else "".join(b.text for b in body.system)
        messages.append({"role": "system", "content": system})
    for index, message in enumerate(body.messages):
        messages += _messages(f"messages.{index}", message)
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
    }
    last = messages[-1]
    if last["role"] == "assistant" and "tool_calls" not in last:
        fields["continue_final_message"] = True  # the client has begun the answer
    if body.thinking is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": body.thinking.type != "disabled"}
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"name": "output", "schema": body.output_config.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.output_config is not None:
        fields["reasoning_effort"] = body.output_config.effort
    if body.tools:
        fields["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        fields["tool_choice"] = _tool_choice(body.tool_choice)
        fields["parallel_tool_calls"] = not body.tool_choice.disable_parallel_tool_use
    return ChatRequest.model_validate(fields)


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _tool_choice(choice: AnthropicToolChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name or ""}}
    return {"any": "required"}.get(choice.type, choice.type)


def _messages(where: str, message: InputMessage) -> list[dict[str, Any]]:
    """Results of tools are messages of their own in OpenAI's words."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts, reasoning, calls, results = [], [], [], []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            reasoning.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ToolResultBlock):
            results.append(
                {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(where, block)}
            )
        elif not isinstance(block, RedactedThinkingBlock):
            raise _unsupported(where, block)
    out: dict[str, Any] = {"role": message.role, "content": "".join(texts)}
    out |= {"tool_calls": calls} if calls else {}
    out |= {"reasoning_content": "".join(reasoning)} if reasoning else {}
    return [*results, out] if texts or calls or not results else results


def _result(where: str, block: ToolResultBlock) -> str:
    if isinstance(block.content, str):
        return block.content
    texts = []
    for part in block.content:
        if not isinstance(part, TextBlock):
            raise _unsupported(where, part)
        texts.append(part.text)
    return "".join(texts)


def _unsupported(where: str, block: OtherPart) -> Exception:
    text = f"{where}.content: blocks of type {block.type!r} are not supported"
    return invalid(text, param=f"{where}.content", code="unsupported")


class MessagesReply:
    """What a messages request is answered with: one sample's blocks, as they come."""

    def __init__(self, plan: ChatPlan, model: str) -> None:
        self._sample = ChatSample(plan)
        self._head = {"id": new_id("msg"), "type": "message", "role": "assistant", "model": model}
        self._blocks: list[dict[str, Any]] = []
        self._open = False

    def whole(self, generation: Generation) -> dict[str, Any]:
        choice = generation.choices[0]
        for part in self._sample.parts(choice.text, last=True):
            self._take(part)
        content = [_without_json(block) for block in self._blocks]
        return {
            **self._head,
            "content": content,
            **self._end(choice.finish_reason, choice.stop_reason),
            "usage": _usage(generation.usage),
        }

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """Events; an error ends the stream with an event of its own."""
        try:
            first: dict[str, Any] = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None}
            usage = {**_usage(generation.usage), "output_tokens": 0}
            yield _event("message_start", message={**first, "usage": usage})
            async for _, piece in generation:
                for part in self._sample.parts(piece.text, last=piece.finish_reason is not None):
                    for data in self._take(part):
                        yield event(data, data["type"])
            if self._open:
                yield _event("content_block_stop", index=len(self._blocks) - 1)
            choice = generation.choices[0]
            end = self._end(choice.finish_reason, choice.stop_reason)
            yield _event("message_delta", delta=end, usage=_usage(generation.usage))
            yield _event("message_stop")
        except Exception as error:
            yield event(from_exception(error).body(), "error")
        finally:
            generation.close()

    def _take(self, part: Delta) -> list[dict[str, Any]]:
        """The events of a part; what it adds goes to the blocks."""
        out: list[dict[str, Any]] = []
        kind = _KINDS[type(part)]
        if isinstance(part, ToolCallStart) or not self._open or self._blocks[-1]["type"] != kind:
            if self._open:
                out.append({"type": "content_block_stop", "index": len(self._blocks) - 1})
            block = _new_block(kind, part)
            self._blocks.append(block)
            self._open = True
            shown = _without_json(block)
            out.append(
                {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": shown}
            )
        if not isinstance(part, ToolCallStart):
            name, key = _DELTAS[type(part)]
            self._blocks[-1][_TEXTS[kind]] += part.text
            delta = {"type": name, key: part.text}
            out.append({"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta})
        return out

    def _end(self, reason: str | None, stop: int | str | None) -> dict[str, Any]:
        if isinstance(stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        reason = self._sample.finish_reason(reason or "stop")
        name = {"length": "max_tokens", "tool_calls": "tool_use"}.get(reason, "end_turn")
        return {"stop_reason": name, "stop_sequence": None}


_KINDS = {Content: "text", Reasoning: "thinking", ToolCallStart: "tool_use", ToolCallArguments: "tool_use"}
_DELTAS: dict[type, tuple[str, str]] = {
    Content: ("text_delta", "text"),
    Reasoning: ("thinking_delta", "thinking"),
    ToolCallArguments: ("input_json_delta", "partial_json"),
}
_TEXTS = {"text": "text", "thinking": "thinking", "tool_use": "json"}


def _new_block(kind: str, part: Delta) -> dict[str, Any]:
    if isinstance(part, ToolCallStart):
        return {"type": kind, "id": new_id("toolu"), "name": part.name, "json": ""}
    return {"type": kind, _TEXTS[kind]: "", **({"signature": ""} if kind == "thinking" else {})}


def _without_json(block: dict[str, Any]) -> dict[str, Any]:
    """A block as clients see it: the input of a tool as an object, empty if it was cut off."""
    if "json" not in block:
        return dict(block)
    try:
        value = json.loads(block["json"] or "{}")
    except ValueError:
        value = {}
    rest = {name: item for name, item in block.items() if name != "json"}
    return {**rest, "input": value if isinstance(value, dict) else {"value": value}}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _event(name: str, /, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)
