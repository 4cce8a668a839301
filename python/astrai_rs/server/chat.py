"""`/v1/chat/completions`: wire types and pure converters."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from astrai_rs.request import GenerationChunk, SamplingParams, TokenLogprobs
from astrai_rs.server.common import Reply, new_id, usage_json
from astrai_rs.server.errors import from_exception, invalid
from astrai_rs.server.generation import Choice, Generation
from astrai_rs.server.messages import Message, NamedTool, Tool, ToolChoice, check_tools
from astrai_rs.server.parse import (
    Content,
    Delta,
    OutputParser,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
    starts_in_reasoning,
)
from astrai_rs.server.sampling import Items, SamplingFields, at_most, sampling_params
from astrai_rs.server.settings import ServerSettings
from astrai_rs.server.sse import DONE, event
from astrai_rs.server.tools import FORMATS, ToolFormat, tool_grammar


class ChatRequest(SamplingFields):
    messages: Annotated[Items[Message], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    tools: Items[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: None = None
    """Refused: a template is a program, and this server runs only the model's own."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    system_prompt: str | None = None
    """AstrAI's: put in front of the messages."""
    reasoning_effort: str | None = None


class ChatPlan:
    """What is known of a chat request before it runs: how its output is to be read.

    Args:
        tool_format: how the model writes tool calls; None for a model that cannot.
        reasoning: the markers around reasoning; None for a model that has none.
        token_ids: ids of the model's control tokens, by their text.
    """

    def __init__(
        self,
        body: ChatRequest,
        *,
        tool_format: ToolFormat | None,
        reasoning: tuple[str, str] | None,
        token_ids: Mapping[str, int],
    ) -> None:
        self.body = body
        self.tool_format = None
        self._starts_in_reasoning = False
        self._is_structured = False
        self._token_ids = token_ids
        self._reasoning = reasoning
        choice = body.tool_choice
        if choice is not None and choice != "none" and not body.tools:
            raise invalid("tool_choice needs tools", param="tool_choice")
        if body.tools and choice != "none":
            self.tool_format = tool_format or FORMATS["hermes"]
        self.spells_out_tools = tool_format is None
        """The template has no place for tools: they are written into the messages."""

    @property
    def tools(self) -> Sequence[Tool]:
        """The tools that the template shows."""
        return (self.body.tools or []) if self.tool_format is not None else []

    def params(self, settings: ServerSettings) -> SamplingParams:
        """The engine's parameters."""
        body = self.body
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", param="top_logprobs")
        if body.top_logprobs is not None:
            at_most("top_logprobs", body.top_logprobs, settings.max_logprobs)
        check_tools(self.tools, settings)
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise invalid("max_tokens and max_completion_tokens differ; give one", param="max_tokens")
        params = sampling_params(
            body,
            settings,
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=self._grammar(),
        )
        self._is_structured = params.structured_outputs is not None
        if self.tool_format is not None and self.tool_format.begin in self._token_ids:
            params = replace(params, skip_special_tokens=False)  # the marker must be seen
        return params

    def _grammar(self) -> str | None:
        """What makes the model call a tool where the request says that it must."""
        choice = self.body.tool_choice
        if self.tool_format is None or choice in (None, "auto"):
            return None
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
        if isinstance(choice, NamedTool):
            name = choice.function.name
            known = [tool.function.name for tool in self.tools]
            if name not in known:
                message = f"tool_choice names {name!r}, which is not among the tools: {', '.join(known)}"
                raise invalid(message, param="tool_choice")
            tools = [tool for tool in tools if tool["function"]["name"] == name]
        return tool_grammar(
            self.tool_format,
            tools,
            parallel=self.body.parallel_tool_calls and not isinstance(choice, NamedTool),
            token_ids=self._token_ids,
        )

    def read_prompt(self, text: str) -> None:
        """Note whether the rendered prompt ends inside reasoning; a grammar leaves no room for it."""
        is_open = self._reasoning is not None and starts_in_reasoning(text, self._reasoning)
        self._starts_in_reasoning = is_open and not self._is_structured

    def parser(self) -> OutputParser:
        """A reader for one sample's text."""
        return OutputParser(
            tool_format=self.tool_format,
            tool_names=[tool.function.name for tool in self.tools],
            reasoning=self._reasoning,
            starts_in_reasoning=self._starts_in_reasoning,
        )


class ChatSample:
    """One sample's output, read piece by piece into OpenAI's deltas."""

    def __init__(self, plan: ChatPlan) -> None:
        self._parser = plan.parser()
        self._max_calls = None if plan.body.parallel_tool_calls else 1
        self._has_calls = False

    def parts(self, text: str, *, last: bool) -> list[Delta]:
        """What a piece of text brings."""
        parts = self._parser.add(text) + (self._parser.flush() if last else [])
        if self._max_calls is not None:
            parts = [part for part in parts if getattr(part, "index", 0) < self._max_calls]
        self._has_calls |= any(isinstance(part, ToolCallStart) for part in parts)
        return parts

    def deltas(self, text: str, *, last: bool) -> list[dict[str, Any]]:
        """The same as OpenAI's `delta` objects."""
        return [self._delta(part) for part in self.parts(text, last=last)]

    def finish_reason(self, reason: str) -> str:
        return "tool_calls" if reason == "stop" and self._has_calls else reason

    def _delta(self, part: Delta) -> dict[str, Any]:
        if isinstance(part, Content):
            return {"content": part.text}
        if isinstance(part, Reasoning):
            return {"reasoning_content": part.text}
        if isinstance(part, ToolCallStart):
            call: dict[str, Any] = {
                "index": part.index,
                "id": new_id("call"),
                "type": "function",
                "function": {"name": part.name, "arguments": ""},
            }
        else:
            assert isinstance(part, ToolCallArguments)
            call = {"index": part.index, "function": {"arguments": part.text}}
        return {"tool_calls": [call]}


def merged(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's deltas add up to."""
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                named = {"id": call["id"], "type": "function", "function": dict(call["function"])}
                calls.append(named)
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    return message


class ChatReply(Reply):
    """What a chat request is answered with."""

    KIND, OBJECT, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, plan: ChatPlan, model: str, token_bytes: Sequence[bytes]) -> None:
        super().__init__(model)
        self._plan = plan
        self._body = plan.body
        self._token_bytes = token_bytes

    def whole(self, generation: Generation) -> dict[str, Any]:
        choices = [self._choice(i, c) for i, c in enumerate(generation.choices)]
        answer = {**self.head(), "choices": choices, "usage": usage_json(generation.usage)}
        return answer | self._prompt_ids(generation)

    def _prompt_ids(self, generation: Generation) -> dict[str, Any]:
        return {"prompt_token_ids": generation.prompts[0]} if self._body.return_token_ids else {}

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """Events; an error ends the stream with an event of its own."""
        samples = [ChatSample(self._plan) for _ in generation.choices]
        begun: set[int] = set()
        options = self._body.stream_options
        first = self._prompt_ids(generation)
        try:
            async for index, piece in generation:
                for choice in self._events(index, piece, samples[index], begun):
                    yield event({**self.chunk_head(), "choices": [choice], **first})
                    first = {}
            if options is not None and options.include_usage:
                yield event({**self.chunk_head(), "choices": [], "usage": usage_json(generation.usage)})
        except Exception as error:
            yield event(from_exception(error).body())
        finally:
            generation.close()
        yield DONE

    def _events(
        self, index: int, piece: GenerationChunk, sample: ChatSample, begun: set[int]
    ) -> list[dict[str, Any]]:
        """The `choices` entries of a piece: a first one with the role, then text, then the end."""
        reason = piece.finish_reason
        deltas = sample.deltas(piece.text, last=reason is not None)
        extras: dict[str, Any] = {}
        if self._body.return_token_ids:
            extras["token_ids"] = piece.token_ids
        if piece.logprobs is not None:
            extras["logprobs"] = self._logprobs(piece.token_ids, piece.logprobs)
        entries: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "finish_reason": None} for delta in deltas
        ]
        if index not in begun:
            begun.add(index)
            first = {"role": "assistant", "content": ""}
            entries.insert(0, {"index": index, "delta": first, "finish_reason": None})
        if reason is not None:
            end = {"index": index, "delta": {}, "finish_reason": sample.finish_reason(reason)}
            entries.append({**end, "stop_reason": piece.stop_reason})
        if extras and piece.token_ids:
            if not entries:
                entries.append({"index": index, "delta": {}, "finish_reason": None})
            entries[-1] = {**entries[-1], **extras}
        return entries

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        sample = ChatSample(self._plan)
        message = merged(sample.deltas(choice.text, last=True))
        out = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.token_ids, choice.logprobs) if self._body.logprobs else None,
            "finish_reason": sample.finish_reason(choice.finish_reason or "stop"),
            "stop_reason": choice.stop_reason,
        }
        if self._body.return_token_ids:
            out["token_ids"] = choice.token_ids
        return out

    def _logprobs(self, ids: Sequence[int], rows: Sequence[TokenLogprobs]) -> dict[str, Any]:
        top = self._body.top_logprobs or 0
        content = []
        for token_id, row in zip(ids, rows, strict=True):
            likeliest = [i for i, entry in row.items() if (entry.rank or 0) <= top]
            entry = self._entry(token_id, row)
            content.append({**entry, "top_logprobs": [self._entry(i, row) for i in likeliest]})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, row: TokenLogprobs) -> dict[str, Any]:
        text = row[token_id].decoded_token or ""
        raw = self._token_bytes[token_id] if token_id < len(self._token_bytes) else text.encode()
        return {"token": text, "logprob": row[token_id].logprob, "bytes": list(raw)}
