"""What goes in and what comes out: sampling parameters, outputs, streamed pieces. Plain frozen data.

Types are checked here, so that a mistake is named in the caller's own words; ranges are checked by the core.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What a text must look like; exactly one of json, regex, choice, grammar and json_object is given.

    Fields and meanings are vLLM's.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: none or several are given, `choice` is empty, or `json` cannot be written as JSON.
    """

    json: str | Mapping[str, Any] | bool | None = None
    """A JSON schema, as JSON text or as Python data. Properties come in the schema's order."""
    regex: str | None = None
    """A regular expression in the syntax of Rust's `regex` crate, which the whole text must match."""
    choice: Sequence[str] | None = None
    """One of these strings."""
    grammar: str | None = None
    """A grammar in llguidance's variant of Lark."""
    json_object: bool | None = None
    """True: any JSON object."""
    disable_any_whitespace: bool = True
    """JSON without white space between its parts: small models like to go on with it for ever."""

    def __post_init__(self) -> None:
        given = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs takes exactly one of {', '.join(_CONSTRAINTS)}; "
                f"given: {', '.join(given) or 'none'}"
            )
        check_bool("disable_any_whitespace", self.disable_any_whitespace)
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"structured_outputs.{name} must be a non-empty string, not {_show(value)}")
            if value == "":
                raise ValueError(f"structured_outputs.{name} must be a non-empty string; given: ''")
        if self.choice is not None:
            what = "a list of strings"
            choice = check_strings("structured_outputs.choice", self.choice, what=what)
            if not choice:
                raise ValueError("structured_outputs.choice must have at least one string; given: []")
            object.__setattr__(self, "choice", choice)
        if self.json_object not in (None, True):
            raise ValueError(f"structured_outputs.json_object must be True; given: {self.json_object!r}")
        if self.json is not None and not isinstance(self.json, str):
            object.__setattr__(self, "json", _schema_text(self.json))

    @classmethod
    def of(cls, value: object) -> StructuredOutputsParams:
        """`value` itself, or made of a mapping of its fields."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(
                f"structured_outputs must be StructuredOutputsParams or a dict, not {_show(value)}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [str(name) for name in value if name not in known]:
            raise ValueError(
                f"structured_outputs has no field {', '.join(unknown)}; allowed: {', '.join(known)}"
            )
        return cls(**value)


_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")


def _schema_text(schema: object) -> str:
    if not isinstance(schema, (Mapping, bool)):
        raise TypeError(f"structured_outputs.json must be a JSON schema, not {_show(schema)}")
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"structured_outputs.json cannot be written as JSON: {error}") from error


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Fields, meanings and defaults are vLLM's (max_tokens defaults to 256).

    Every field is per request; requests with any mixture of fields share a batch.

    Raises:
        TypeError: a field has the wrong type; the message names field, value and what is allowed.
        ValueError: a stop string is empty.
    """

    n: int = 1
    """How many samples of the prompt; they share its cache blocks."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already generated; [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence among the generated tokens; [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; > 0."""
    temperature: float = 1.0
    """0 is greedy: the lowest id wins ties."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability; (0, 1]."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 and -1 keep all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest; [0, 1]."""
    seed: int | None = None
    """Replays the same tokens in any batch; None draws one."""
    stop: str | Sequence[str] | None = None
    """Strings that end the text; stored as a tuple. The match that completes first wins."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end the text, besides the model's own end-of-text ids."""
    include_stop_str_in_output: bool = False
    """Keep the stop string (or stop token's text) in the text."""
    ignore_eos: bool = False
    """Go on after an end-of-text token."""
    max_tokens: int | None = 256
    """The most tokens to generate; None fills the model's context."""
    min_tokens: int = 0
    """End-of-text, stop ids and stop strings are off until this many tokens."""
    logprobs: int | None = None
    """Per generated token, how many of the likeliest to report besides the sampled one; -1: all."""
    prompt_logprobs: int | None = None
    """The same per prompt token."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids."""
    allowed_token_ids: Sequence[int] | None = None
    """If given, only these ids can be sampled."""
    bad_words: Sequence[str] | None = None
    """Words that must not be generated, with or without a space before them."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    """What the text must look like; a mapping has the fields of `StructuredOutputsParams`."""

    def __post_init__(self) -> None:
        for name in ("n", "top_k", "min_tokens"):
            self._set(name, check_int(name, getattr(self, name)))
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._set(name, check_int(name, getattr(self, name), or_none=True))
        for name in _FLOATS:
            self._set(name, check_float(name, getattr(self, name)))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            check_bool(name, getattr(self, name))
        if isinstance(self.stop, str):
            self._set("stop", (self.stop,))
        self._set("stop", check_strings("stop", self.stop, what="a string or a list of strings"))
        self._set("bad_words", check_strings("bad_words", self.bad_words, what="a list of strings"))
        if self.stop_token_ids is None:
            self._set("stop_token_ids", ())
        self._set("stop_token_ids", check_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", check_ids("allowed_token_ids", self.allowed_token_ids))
        if self.logit_bias is not None:
            self._set("logit_bias", _check_bias(self.logit_bias))
        if self.structured_outputs is not None:
            self._set("structured_outputs", StructuredOutputsParams.of(self.structured_outputs))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen for everyone else


_I64 = range(-(2**63), 2**63)

_FLOATS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p")


class Logprob(NamedTuple):
    """One token's natural-log probability under the softmax of the raw logits."""

    logprob: float
    rank: int | None = None
    """1 is the likeliest token."""
    decoded_token: str | None = None
    """The token alone as text; None without a tokenizer."""


TokenLogprobs = dict[int, Logprob]
"""Token id → Logprob: the sampled (or prompt) token first, then the likeliest ones."""


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened, in seconds on one monotonic clock, and what the cache saved."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float
    num_cached_tokens: int
    """Prompt tokens that came from the prefix cache."""
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a request."""

    index: int
    text: str
    token_ids: list[int]
    """Generated ids, the stop token included."""
    finish_reason: str | None
    """`stop`, `length` or `abort`."""
    stop_reason: int | str | None
    """The stop string or stop_token_ids entry that ended it; None for end of text."""
    logprobs: list[TokenLogprobs] | None
    """One entry per generated token."""
    metrics: RequestMetrics | None


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """A finished request. The properties read the first sample; `outputs` has all `n`."""

    prompt: str | None
    """The prompt's text; None when it was given as ids."""
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    """One entry per prompt token, None for the first."""
    outputs: list[CompletionOutput]

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.outputs[0].stop_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].logprobs

    @property
    def metrics(self) -> RequestMetrics | None:
        return self.outputs[0].metrics


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """A streamed piece of one sample. Pieces of a sample, joined, are its `CompletionOutput`."""

    text: str
    """New text; may be empty while a character or a possible stop string is incomplete."""
    token_ids: list[int]
    """New token ids; their text may come with a later piece."""
    index: int = 0
    finish_reason: str | None = None
    """Set in the sample's last piece."""
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """With the request's first piece, if asked for."""
    num_cached_tokens: int | None = None
    """With the sample's first piece: prompt tokens that came from the prefix cache."""
    metrics: RequestMetrics | None = None
    """With the sample's last piece, unless a stop string ended it."""


def check_int(name: str, value: object, *, or_none: bool = False) -> int:
    """`value` as an int; bool is refused, integer types of other libraries are accepted."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int{' or None' if or_none else ''}, not {_show(value)}")
    return int(value.__index__())


def check_float(name: str, value: object) -> float:
    """`value` as a float; bool and str are refused, number types of other libraries are accepted."""
    if isinstance(value, (bool, str)) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be a number, not {_show(value)}")
    return float(value)  # type: ignore[arg-type]


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {_show(value)}")
    return value


def check_ids(name: str, value: object) -> list[int]:
    """`value` as a list of token ids."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be a list of token ids, not {_show(value)}")
    items = list(value)
    for item in items:
        if type(item) is not int:  # the plain case costs one comparison per id
            items = [check_int(f"{name}: each id", item) for item in items]
            break
    for item in (min(items), max(items)) if items else ():
        if not _I64.start <= item < _I64.stop:  # the core names its own range, but cannot take these
            raise ValueError(f"{name}: {item} is not a token id")
    return items


def check_strings(name: str, value: object, *, what: str) -> tuple[str, ...]:
    """`value` as a tuple of non-empty strings; None is empty."""
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be {what}, not {_show(value)}")
    items = tuple(value)
    for item in items:
        if not isinstance(item, str):
            raise TypeError(f"{name} must be {what}; it has {_show(item)}")
        if not item:
            raise ValueError(f"{name} must not contain an empty string")
    return items


def core_arguments(params: SamplingParams) -> dict[str, Any]:
    """The fields the core's `submit` takes under their own names; text-level fields are left out."""
    fields = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    for name in _TEXT_FIELDS:
        del fields[name]
    return fields


_TEXT_FIELDS = (
    "stop",
    "bad_words",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "structured_outputs",
)


def _check_bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, not {_show(value)}")
    return {
        check_int("logit_bias: each key", k): check_float(f"logit_bias[{k}]", v) for k, v in value.items()
    }


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
