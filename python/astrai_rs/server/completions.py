"""`/v1/completions`: text or token ids in, text out. Wire types and pure converters."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

from pydantic import Field

from astrai_rs.request import SamplingParams, TokenLogprobs
from astrai_rs.server.common import IdToText, Reply, token_text, usage_json
from astrai_rs.server.errors import from_exception, invalid
from astrai_rs.server.generation import Choice, Generation
from astrai_rs.server.sampling import Items, SamplingFields, at_most, sampling_params
from astrai_rs.server.settings import ServerSettings
from astrai_rs.server.sse import DONE, event


class CompletionRequest(SamplingFields):
    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    max_tokens: int | None = 16
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)
    prompt_logprobs: int | None = Field(None, ge=0)
    add_special_tokens: bool = True
    best_of: int | None = None
    suffix: Literal[""] | None = None


def prompts_of(body: CompletionRequest, settings: ServerSettings) -> list[str | list[int]]:
    """The request's prompts, one or many."""
    given = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise invalid("prompt must hold at least one text or token id; given: []", param="prompt")
    at_most("prompt", len(given), settings.max_prompts, "prompts")
    return list(given)  # type: ignore[arg-type]


def params_of(body: CompletionRequest, settings: ServerSettings) -> SamplingParams:
    """Scoring only (`echo` with `max_tokens: 0`) computes one token that nobody sees."""
    if body.echo and body.stream and body.logprobs is not None:
        raise invalid("echo with logprobs is not supported for streams", param="echo")
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("prompt_logprobs is not supported for streams", param="prompt_logprobs")
    if body.best_of not in (None, body.n):
        raise invalid(f"best_of must be n, {body.n}; given: {body.best_of}", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens must be at least 1; given: 0", param="max_tokens")
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    return sampling_params(
        body,
        settings,
        max_tokens=1 if body.max_tokens == 0 else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=prompt_logprobs,
    )


class CompletionReply(Reply):
    """What a completions request is answered with."""

    KIND, OBJECT = "cmpl", "text_completion"

    def __init__(
        self, body: CompletionRequest, texts: Sequence[str], model: str, id_to_text: IdToText | None
    ) -> None:
        super().__init__(model)
        self._body = body
        self._id_to_text = id_to_text
        self._texts = texts
        """The prompts as text, for `echo`."""

    def whole(self, generation: Generation) -> dict[str, Any]:
        choices = [self._choice(i, c, generation.prompts) for i, c in enumerate(generation.choices)]
        return {**self.head(), "choices": choices, "usage": self._usage(generation)}

    @property
    def _is_scoring(self) -> bool:
        """The one token that was computed is nobody's."""
        return self._body.max_tokens == 0

    def _usage(self, generation: Generation) -> dict[str, Any]:
        if self._is_scoring:
            generation.usage.completion_tokens = 0
        return usage_json(generation.usage)

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """Events; an error ends the stream with an event of its own."""
        options = self._body.stream_options
        offsets = [0] * len(generation.choices)
        try:
            async for index, piece in generation:
                choice = generation.choices[index]
                is_first = len(choice.token_ids) == len(piece.token_ids)
                echo = self._texts[choice.prompt] if self._body.echo and is_first else ""
                text, ids = ("", []) if self._is_scoring else (piece.text, piece.token_ids)
                delta: dict[str, Any] = {"index": index, "text": echo + text, "logprobs": None}
                if piece.logprobs is not None:
                    logprobs = self._logprobs(piece.token_ids, piece.logprobs, offsets[index])
                    offsets[index] += sum(map(len, logprobs["tokens"]))
                    delta["logprobs"] = logprobs
                delta["finish_reason"] = piece.finish_reason and (
                    "length" if self._is_scoring else piece.finish_reason
                )
                if piece.finish_reason is not None:
                    delta["stop_reason"] = piece.stop_reason
                if self._body.return_token_ids:
                    delta |= {"prompt_token_ids": generation.prompts[choice.prompt]} if is_first else {}
                    delta["token_ids"] = ids
                yield event({**self.head(), "choices": [delta]})
            if options is not None and options.include_usage:
                yield event({**self.head(), "choices": [], "usage": self._usage(generation)})
        except Exception as error:
            yield event(from_exception(error).body())
        finally:
            generation.close()
        yield DONE

    def _choice(self, index: int, choice: Choice, prompts: Sequence[list[int]]) -> dict[str, Any]:
        body, prompt = self._body, prompts[choice.prompt]
        text, ids, rows = (
            ("", [], []) if self._is_scoring else (choice.text, choice.token_ids, choice.logprobs)
        )
        prompt_rows: list[TokenLogprobs | None] = choice.prompt_logprobs or []
        logprobs = None
        if body.echo:
            text = self._texts[choice.prompt] + text
        if body.logprobs is not None:
            if body.echo:
                logprobs = self._logprobs([*prompt, *ids], [*self._trimmed(prompt_rows), *rows])
            else:
                logprobs = self._logprobs(ids, rows)
        out = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if self._is_scoring else choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if body.prompt_logprobs is not None:
            out["prompt_logprobs"] = [row and prompt_logprobs_json(row) for row in prompt_rows]
        if body.return_token_ids:
            out |= {"prompt_token_ids": prompt, "token_ids": ids}
        return out

    def _logprobs(
        self, ids: Sequence[int], rows: Sequence[TokenLogprobs | None], offset: int = 0
    ) -> dict[str, Any]:
        """OpenAI's four parallel lists. The first token of a prompt has no logprob."""
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        text_offset: list[int] = []
        for token_id, row in zip(ids, rows, strict=False):
            entry = None if row is None else row[token_id]
            text = token_text(token_id, entry, self._id_to_text)
            tokens.append(text)
            token_logprobs.append(None if entry is None else entry.logprob)
            top: dict[str, float] = {}
            for other, alternative in (row or {}).items():
                # Tokens that are parts of characters may look alike: the likeliest keeps the name.
                name = token_text(other, alternative, self._id_to_text)
                top[name] = max(top.get(name, alternative.logprob), alternative.logprob)
            top_logprobs.append(None if row is None else top)
            text_offset.append(offset)
            offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        }

    def _trimmed(self, rows: Sequence[TokenLogprobs | None]) -> list[TokenLogprobs | None]:
        """Of each row the prompt's token and as many others as `logprobs` asks for."""
        top = self._body.logprobs or 0
        return [row and first_entries(row, top) for row in rows]


def first_entries(row: TokenLogprobs, top: int) -> TokenLogprobs:
    """The row's own token, which comes first, and the `top` likeliest."""
    own = next(iter(row))
    return {i: entry for i, entry in row.items() if i == own or (entry.rank or 0) <= top}


def prompt_logprobs_json(row: TokenLogprobs) -> dict[str, Any]:
    """vLLM's form: id → logprob, rank and text."""
    return {str(token_id): entry._asdict() for token_id, entry in row.items()}
