"""One request on its way: the core's events become text, pieces and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from astrai_rs._core import CheckpointError, EngineClosed
from astrai_rs.detokenizer import Detokenizer, StopMatcher
from astrai_rs.request import (
    CompletionOutput,
    GenerationChunk,
    GenerationOutput,
    Logprob,
    RequestMetrics,
    SamplingParams,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from astrai_rs._core import Event
    from astrai_rs.codec import Codec


StopSample = Callable[[int, int], None]
"""`(request id, sample)`: the core shall stop this sample, its text is complete."""


class Request:
    """A submitted request and what has come back so far."""

    def __init__(
        self,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        codec: Codec | None,
        stop_sample: StopSample,
        *,
        engine: object = None,
    ) -> None:
        self._engine = engine
        """Lives as long as the request: dropped, it would be closed."""
        self.id = -1
        """The core's id, once submitted."""
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self._codec = codec
        self._stop_sample = stop_sample
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None

    @cached_property
    def _samples(self) -> list[_Sample]:
        """Made once the core has accepted the request, so that its checks of n and the ids come first."""
        ids, params = self.prompt_token_ids, self.params
        return [_Sample(index, ids, params, self._codec) for index in range(params.n)]

    @property
    def finished(self) -> bool:
        """Every sample is complete."""
        return all(sample.finish_reason is not None for sample in self._samples)

    @property
    def settled(self) -> bool:
        """The core has sent every sample's last event too, with its metrics."""
        return all(sample.metrics is not None for sample in self._samples)

    def feed(self, event: Event) -> GenerationChunk | None:
        """Take an event of this request; None if the event's sample was complete already.

        Raises the exception that an error event stands for.
        """
        sample = self._samples[event.sample]
        if event.error is not None:
            if sample.finish_reason is not None:  # its text was complete before
                return None
            raise exception(*event.error)
        if event.metrics is not None:
            sample.metrics = RequestMetrics(**event.metrics)  # type: ignore[arg-type]
        if sample.finish_reason is not None:
            return None
        prompt_logprobs: list[TokenLogprobs | None] | None = None
        if event.prompt_logprobs is not None:
            rows = event.prompt_logprobs
            prompt_logprobs = [None if row is None else self._logprobs(row) for row in rows]
            self._prompt_logprobs = prompt_logprobs
        logprobs = None
        if event.logprobs is not None:
            logprobs = [self._logprobs(row) for row in event.logprobs]
        chunk = sample.feed(event, logprobs, prompt_logprobs)
        if chunk.finish_reason is not None and event.finish_reason is None:
            self._stop_sample(event.request_id, event.sample)
        return chunk

    def output(self) -> GenerationOutput:
        """What has come so far as an output."""
        outputs = [sample.output() for sample in self._samples]
        return GenerationOutput(self.prompt, self.prompt_token_ids, self._prompt_logprobs, outputs)

    def _logprobs(self, row: Sequence[tuple[int, float, int]]) -> TokenLogprobs:
        if self._codec is None:
            return {token_id: Logprob(logprob, rank) for token_id, logprob, rank in row}
        text = self._codec.id_to_text
        return {token_id: Logprob(logprob, rank, text(token_id)) for token_id, logprob, rank in row}


class _Sample:
    """One of a request's samples."""

    def __init__(self, index: int, prompt: list[int], params: SamplingParams, codec: Codec | None) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.metrics: RequestMetrics | None = None
        self._stop_reason: int | str | None = None
        self._params = params
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._matcher = StopMatcher(params.stop or (), include=params.include_stop_str_in_output)
        self._detokenizer: Detokenizer | None = None
        if codec is not None:
            decode, skip = codec.decode, params.skip_special_tokens
            self._detokenizer = Detokenizer(lambda ids: decode(ids, skip), prompt)

    def feed(
        self,
        event: Event,
        logprobs: list[TokenLogprobs] | None,
        prompt_logprobs: list[TokenLogprobs | None] | None,
    ) -> GenerationChunk:
        ids = list(event.token_ids)
        # The token that ended the sample has no text, unless asked for.
        silent = event.ends_with_stop_token and not self._params.include_stop_str_in_output
        text, used, stop = self._text(ids, silent_last=silent)
        if stop is None and event.finish_reason is not None:
            text, stop = self._end(text)
        if stop is not None:
            self.finish_reason, self._stop_reason = "stop", stop
            ids, logprobs = ids[:used], None if logprobs is None else logprobs[:used]
        else:
            self.finish_reason, self._stop_reason = event.finish_reason, event.stop_reason
        self._pieces.append(text)
        if self._logprobs is not None:
            self._logprobs += logprobs or []
        return GenerationChunk(
            text=text,
            token_ids=ids,
            index=self.index,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=event.num_cached_tokens,
            metrics=self.metrics,
        )

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text="".join(self._pieces),
            token_ids=self._token_ids,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            logprobs=self._logprobs,
            metrics=self.metrics,
        )

    def _text(self, ids: list[int], *, silent_last: bool) -> tuple[str, int, str | None]:
        """`(text, how many ids were used, stop string)`; ids after a stop string are not used."""
        text = ""
        for used, token_id in enumerate(ids, start=1):
            self._token_ids.append(token_id)
            if self._detokenizer is None or (silent_last and used == len(ids)):
                continue
            piece, stop = self._matcher.add(self._detokenizer.add((token_id,)), active=self._may_stop())
            text += piece
            if stop is not None:
                return text, used, stop
        return text, len(ids), None

    def _end(self, text: str) -> tuple[str, str | None]:
        """The text at the end of the sample: nothing is held back any more."""
        if self._detokenizer is None:
            return text, None
        piece, stop = self._matcher.add(self._detokenizer.flush(), active=self._may_stop())
        return text + piece + ("" if stop is not None else self._matcher.flush()), stop

    def _may_stop(self) -> bool:
        return len(self._token_ids) > self._params.min_tokens


_EXCEPTIONS: dict[str, type[Exception]] = {
    "InvalidArgument": ValueError,
    "Checkpoint": CheckpointError,
    "Unsupported": NotImplementedError,
    "NotFound": FileNotFoundError,
    "Io": OSError,
    "OutOfMemory": MemoryError,
    "Shutdown": EngineClosed,
}


def exception(kind: str, message: str) -> Exception:
    """The Python exception of a core error; what has no entry (Device, Bug) is a RuntimeError."""
    return _EXCEPTIONS.get(kind, RuntimeError)(message)
