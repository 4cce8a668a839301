"""Request fields that choose tokens, shared by the routes: wire types → `SamplingParams`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from astrai_rs.request import SamplingParams, StructuredOutputsParams
from astrai_rs.server.errors import invalid
from astrai_rs.server.settings import ServerSettings


class Wire(BaseModel):
    """A request's body: JSON types as they are, no field but the known ones; null means left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class _FirstFault(FailFast):
    """Hashable, as the members of unions must be."""

    __hash__ = object.__hash__


Item = TypeVar("Item")
Items = Annotated[list[Item], _FirstFault()]
"""A list whose first fault is the only one reported: there may be a million."""

Number = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted, and no padding is sent: it has no meaning on one's own machine."""


class JsonSchema(Wire):
    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Wire):
    json_: str | dict[str, Any] | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = True


class SamplingFields(Wire):
    """vLLM's sampling fields beside OpenAI's."""

    model: str | None = None
    temperature: Number = 1.0
    top_p: Number = 1.0
    top_k: int = 0
    min_p: Number = 0.0
    n: int = 1
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    repetition_penalty: Number = 1.0
    seed: int | None = None
    stop: str | Items[str] | None = None
    stop_token_ids: Items[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: dict[str, Number] | None = None
    allowed_token_ids: Items[int] | None = None
    bad_words: Items[str] | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    # Accepted: nothing here depends on them.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def sampling_params(
    body: SamplingFields,
    settings: ServerSettings,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: str | None = None,
) -> SamplingParams:
    """The engine's parameters for a request.

    Args:
        max_tokens: None fills the model's context.
        grammar: what tool calls must look like; then no other structure may be asked for.

    Raises:
        ApiError: a value is over the server's limits, or two fields contradict each other.
    """
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream: true", param="stream_options")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    bad_words = body.bad_words or []
    at_most("n", body.n, settings.max_n)
    at_most("stop", len(stop), settings.max_stop, "strings")
    at_most("bad_words", len(bad_words), settings.max_bad_words, "strings")
    for name, words in (("stop", stop), ("bad_words", bad_words)):
        at_most(name, sum(map(len, words)), settings.max_stop_chars, "characters")
    for name, value in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
        if value is not None:
            at_most(name, value, settings.max_logprobs)
            if value < 0:
                raise invalid(f"{name} must be at least 0; given: {value}", param=name)
    structured = _structured(body, settings)
    if grammar is not None:
        if structured is not None:
            message = "response_format and structured_outputs cannot be combined with a required tool call"
            raise invalid(message, param="tool_choice")
        structured = StructuredOutputsParams(grammar=grammar)
    return SamplingParams(
        n=body.n,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        stop=stop,
        stop_token_ids=body.stop_token_ids,
        include_stop_str_in_output=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_logit_bias(body.logit_bias),
        allowed_token_ids=body.allowed_token_ids,
        bad_words=body.bad_words,
        skip_special_tokens=body.skip_special_tokens,
        structured_outputs=structured,
    )


def at_most(name: str, value: int, limit: int, what: str = "") -> None:
    if value > limit:
        unit = f" {what}" if what else ""
        raise invalid(f"{name} may be at most {limit}{unit} on this server; given: {value}", param=name)


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    try:
        return {int(token_id): bias for token_id, bias in given.items()}
    except ValueError as error:
        raise invalid(f"logit_bias: each key must be a token id: {error}", param="logit_bias") from error


def _structured(body: SamplingFields, settings: ServerSettings) -> StructuredOutputsParams | None:
    name = "response_format" if body.structured_outputs is None else "structured_outputs"
    wanted = _response_format(body.response_format)
    if body.structured_outputs is not None:
        if wanted is not None:
            raise invalid("give response_format or structured_outputs, not both", param="response_format")
        wanted = StructuredOutputsParams(
            **body.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        )
    if wanted is not None:
        check_schema(name, str(wanted.json or ""), settings)
        sizes = {
            "grammar": (len(wanted.grammar or ""), settings.max_schema_bytes),
            "choice": (sum(map(len, wanted.choice or ())), settings.max_schema_bytes),
            "regex": (len(wanted.regex or ""), settings.max_regex_bytes),
        }
        for what, (size, limit) in sizes.items():
            at_most(f"{name}.{what}", size, limit, "characters")
    return wanted


def _response_format(wanted: ResponseFormat | None) -> StructuredOutputsParams | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise invalid("response_format.json_schema.schema is missing", param="response_format")
    return StructuredOutputsParams(json=wanted.json_schema.schema_)


def check_schema(name: str, schema: str, settings: ServerSettings) -> None:
    """The size and depth of a JSON schema in the field `name`.

    Raises:
        ApiError: it is over the server's limits.
    """
    at_most(name, len(schema), settings.max_schema_bytes, "characters")
    at_most(name, _depth(schema), settings.max_schema_depth, "levels")


def _depth(schema: str) -> int:
    """How deep a schema's lists and objects nest; 0 for what is no JSON, which the compiler will name."""
    try:
        level = [json.loads(schema)]
    except (ValueError, RecursionError):
        return 0
    depth = 0
    while level := [v for v in level if isinstance(v, (dict, list))]:
        depth += 1
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    return depth
