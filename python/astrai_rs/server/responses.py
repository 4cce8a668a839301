"""`/v1/responses`: OpenAI's newer interface over the same conversation. Wire types and pure converters.

Nothing is stored: `previous_response_id`, `conversation` and `background` are not supported.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from astrai_rs.server.chat import ChatPlan, ChatRequest, ChatSample
from astrai_rs.server.common import new_id
from astrai_rs.server.errors import from_exception, invalid
from astrai_rs.server.generation import Generation, Usage
from astrai_rs.server.messages import Part, by_type, joined
from astrai_rs.server.parse import Content, Delta, Reasoning, ToolCallStart
from astrai_rs.server.sampling import Items, Number, Wire
from astrai_rs.server.sse import event


class InputText(Wire):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Items[Part]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Wire):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputResult(Wire):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Items[Part]
    id: str | None = None
    status: str | None = None


class InputReasoning(Wire):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: str | None = None


InputItem = Annotated[
    Annotated[InputCall, Tag("<function_call>")]
    | Annotated[InputResult, Tag("<function_call_output>")]
    | Annotated[InputReasoning, Tag("<reasoning>")]
    | Annotated[InputText, Tag("<message>")],
    by_type("function_call", "function_call_output", "reasoning", default="<message>"),
]


class FunctionTool(Wire):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Wire):
    type: Literal["function"]
    name: str


class TextFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    name: str = "schema"
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Wire):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Wire):
    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(Wire):
    model: str | None = None
    input: str | Annotated[Items[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: Number = 1.0
    top_p: Number = 1.0
    tools: Items[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool = False
    # Accepted: nothing here depends on them.
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    include: Items[str] | None = None
    stream_options: dict[str, Any] | None = None


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The same request in the words of chat completions."""
    if body.include:
        raise invalid(f"include is not supported; given: {body.include!r}", param="include")
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    items = body.input
    messages += [{"role": "user", "content": items}] if isinstance(items, str) else _messages(items)
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "parallel_tool_calls": body.parallel_tool_calls,
    }
    if body.tools:
        choice = body.tool_choice
        named = {"type": "function", "function": {"name": getattr(choice, "name", "")}}
        fields["tool_choice"] = choice if isinstance(choice, str) else named
        fields["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools
        ]
    elif body.tool_choice != "auto" and body.tool_choice != "none":
        raise invalid("tool_choice needs tools", param="tool_choice")
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _response_format(body.text.format)
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    return ChatRequest.model_validate(fields)


def _response_format(given: TextFormat) -> dict[str, Any]:
    if given.type != "json_schema":
        return {"type": given.type}
    return {"type": given.type, "json_schema": {"name": given.name, "schema": given.schema_}}


def _messages(items: list[InputItem]) -> list[dict[str, Any]]:
    """Calls that follow each other become one assistant message; reasoning is not sent back to the model."""
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        if isinstance(item, InputText):
            messages.append({"role": item.role, "content": joined(f"input.{index}", item.content)})
        elif isinstance(item, InputCall):
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            if messages and "tool_calls" in messages[-1]:
                messages[-1]["tool_calls"].append(call)
            else:
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif isinstance(item, InputResult):
            output = joined(f"input.{index}", item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
    return messages


class ResponsesReply:
    """What a request is answered with: one sample's items, as they come."""

    def __init__(self, body: ResponsesRequest, plan: ChatPlan, model: str) -> None:
        self._body = body
        self._model = model
        self._sample = ChatSample(plan)
        self._id = new_id("resp")
        self._created = time.time()
        self._items: list[dict[str, Any]] = []
        self._events = 0

    def whole(self, generation: Generation) -> dict[str, Any]:
        choice = generation.choices[0]
        for part in self._sample.parts(choice.text, last=True):
            self._take(part)
        self._close(choice.finish_reason)
        return self._response(choice.finish_reason, generation.usage)

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """Events; an error ends the stream with an event of its own."""
        try:
            for name in ("response.created", "response.in_progress"):
                yield self._event(name, response=self._response(None, None))
            async for _, piece in generation:
                for part in self._sample.parts(piece.text, last=piece.finish_reason is not None):
                    for name, fields in self._take(part):
                        yield self._event(name, **fields)
            reason = generation.choices[0].finish_reason
            for name, fields in self._close(reason):
                yield self._event(name, **fields)
            response = self._response(reason, generation.usage)
            yield self._event(f"response.{response['status']}", response=response)
        except Exception as error:
            fault = from_exception(error)
            yield self._event("error", code=fault.code, message=fault.message, param=fault.param)
        finally:
            generation.close()

    def _event(self, name: str, /, **fields: Any) -> bytes:
        self._events += 1
        return event({"type": name, "sequence_number": self._events - 1, **fields}, name)

    def _take(self, part: Delta) -> list[tuple[str, dict[str, Any]]]:
        """The events of a part; what it adds goes to the items."""
        out: list[tuple[str, dict[str, Any]]] = []
        kind = (
            "message"
            if isinstance(part, Content)
            else "reasoning"
            if isinstance(part, Reasoning)
            else "function_call"
        )
        is_new = not self._items or self._items[-1]["type"] != kind or isinstance(part, ToolCallStart)
        if is_new:
            out += self._close()
            item = _new_item(kind, part)
            self._items.append(item)
            out.append(
                ("response.output_item.added", {"output_index": len(self._items) - 1, "item": dict(item)})
            )
            if kind != "function_call":
                item["content"] = [_new_part(kind)]
                if kind == "message":
                    fields = {**self._place(), "content_index": 0, "part": _new_part(kind)}
                    out.append(("response.content_part.added", fields))
        if isinstance(part, ToolCallStart):
            return out
        item = self._items[-1]
        if kind == "function_call":
            item["arguments"] += part.text
            out.append(("response.function_call_arguments.delta", {**self._place(), "delta": part.text}))
        else:
            item["content"][0]["text"] += part.text
            fields = {**self._place(), "content_index": 0, "delta": part.text}
            name = "response.reasoning_text.delta"
            if kind == "message":
                name, fields = "response.output_text.delta", {**fields, "logprobs": []}
            out.append((name, fields))
        return out

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _close(self, reason: str | None = None) -> list[tuple[str, dict[str, Any]]]:
        """The events that end the last item; `reason`: why the whole answer ends."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return []
        item = self._items[-1]
        item["status"] = "incomplete" if reason == "length" else "completed"
        out: list[tuple[str, dict[str, Any]]] = []
        if item["type"] == "function_call":
            fields = {**self._place(), "name": item["name"], "arguments": item["arguments"]}
            out.append(("response.function_call_arguments.done", fields))
        else:
            part = item["content"][0]
            fields = {**self._place(), "content_index": 0, "text": part["text"]}
            if item["type"] == "reasoning":
                out.append(("response.reasoning_text.done", fields))
            else:
                out.append(("response.output_text.done", {**fields, "logprobs": []}))
                done = {**self._place(), "content_index": 0, "part": part}
                out.append(("response.content_part.done", done))
        out.append(("response.output_item.done", {"output_index": len(self._items) - 1, "item": item}))
        return out

    def _response(self, reason: str | None, usage: Usage | None) -> dict[str, Any]:
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": self._items if reason is not None else [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": _shown_format(body.text)},
            "tool_choice": body.tool_choice
            if isinstance(body.tool_choice, str)
            else body.tool_choice.model_dump(),
            "tools": [{"strict": True, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
            "metadata": body.metadata or {},
            **({} if usage is None else {"usage": _usage(usage)}),
            **({} if body.user is None else {"user": body.user}),
        }


def _new_item(kind: str, part: Delta) -> dict[str, Any]:
    if isinstance(part, ToolCallStart):
        call = {"id": new_id("fc"), "call_id": new_id("call"), "name": part.name, "arguments": ""}
        return {"type": kind, **call, "status": "in_progress"}
    if kind == "reasoning":
        return {"type": kind, "id": new_id("rs"), "summary": [], "content": [], "status": "in_progress"}
    return {"type": kind, "id": new_id("msg"), "role": "assistant", "content": [], "status": "in_progress"}


def _new_part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _shown_format(text: TextOptions | None) -> dict[str, Any]:
    if text is None or text.format is None or text.format.type != "json_schema":
        return {"type": "text" if text is None or text.format is None else text.format.type}
    return text.format.model_dump(by_alias=True, exclude_none=True)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
