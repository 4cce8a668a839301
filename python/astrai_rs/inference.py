"""AstrAI's inference surface (names, argument order, defaults of 1.3.3 and 1.3.13) over `Engine`.

Where the two versions differ both forms are accepted. Where upstream is broken this is right: prompts are not
cut to 512 tokens, temperature 0 is greedy in any batch and honours penalties, dropping a stream stops its
request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from astrai_rs.async_stream import AsyncTokenStream
from astrai_rs.engine import Engine
from astrai_rs.model import AutoModel, refuse_changed
from astrai_rs.request import GenerationOutput, RequestMetrics, SamplingParams, check_int
from astrai_rs.stream import Prepared, RequestGroup

_RECENT = 128
"""Finished tasks that `get_stats` reports on."""


@dataclass
class GenerationRequest:
    """A conversation to answer, with AstrAI's sampling fields.

    Raises:
        ValueError: top_k is not an integer ≥ 0, top_p not in [0, 1], temperature not a number ≥ 0, or
            messages is not a list of dicts.
    """

    messages: Sequence[Mapping[str, Any]]
    top_k: int = 50
    top_p: float = 1.0
    temperature: float = 1.0
    max_len: int | None = 1024
    """The most tokens to generate; None fills the context."""
    stream: bool = False
    frequency_penalty: float = 0.0
    rep_window: int = 64

    def __post_init__(self) -> None:
        if not _is_int(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k must be a non-negative integer, given {self.top_k!r}")
        if not _is_number(self.top_p) or not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p must be a number in [0, 1], given {self.top_p!r}")
        if not _is_number(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature must be a non-negative number, given {self.temperature!r}")
        if not isinstance(self.messages, (list, tuple)) or not all(
            isinstance(m, Mapping) for m in self.messages
        ):
            raise ValueError("messages must be a list of dicts with 'role' and 'content'")


class InferenceEngine:
    """AstrAI's engine.

    Args:
        model: an `AutoModel`, or a path or hub id.
        tokenizer: an `AutoTokenizer`, or None for the model's own.
        max_batch_size: the most prompts computed together.
        max_seq_len: the most tokens of prompt and output; longer prompts keep their end.
        max_prefix_len, cache_capacity, cache, enable_cuda_graph, backend: accepted at their defaults only;
            the prefix cache and the backend need no such settings here.
    """

    def __init__(
        self,
        model: AutoModel | str | Path,
        tokenizer: Any = None,
        max_batch_size: int = 1,
        max_seq_len: int | None = None,
        *,
        max_prefix_len: int = 512,
        cache_capacity: int = 1000,
        cache: None = None,
        enable_cuda_graph: bool = True,
        backend: None = None,
    ) -> None:
        refuse_changed(max_prefix_len=(max_prefix_len, 512), cache_capacity=(cache_capacity, 1000))
        refuse_changed(
            cache=(cache, None), enable_cuda_graph=(enable_cuda_graph, True), backend=(backend, None)
        )
        if check_int("max_batch_size", max_batch_size) < 1:
            raise ValueError(f"max_batch_size must be at least 1; given: {max_batch_size}")
        if max_seq_len is not None and check_int("max_seq_len", max_seq_len) < 2:
            raise ValueError(f"max_seq_len must be at least 2; given: {max_seq_len}")
        self.model = model if isinstance(model, AutoModel) else AutoModel.from_pretrained(model)
        self._engine = Engine(
            self.model.path,
            tokenizer=tokenizer,
            device=self.model.device,
            dtype=self.model.dtype,
            max_model_len=max_seq_len,
            max_num_seqs=max_batch_size,
        )
        self.tokenizer = self._engine.tokenizer
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self._totals = {"total_tasks": 0, "total_tokens": 0}

    def generate(
        self,
        prompt: str | list[str],
        stream: bool = False,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 50,
        frequency_penalty: float = 0.0,
        rep_window: int = 64,
        *,
        abort_on_exception: bool = True,
    ) -> Any:
        """Generate text.

        Args:
            prompt: a text, or a list of texts.
            max_tokens: None fills `max_seq_len`; 0 or less gives empty text.
            top_p: 0 keeps only the likeliest token.
            top_k: 0 keeps all.
            frequency_penalty: subtracted per occurrence among the last `rep_window` prompt tokens and the
                output.

        Returns:
            str for a text, list[str] for a list. With `stream`: an iterator of str for a text, of `(index,
            str)` for a list.
        """
        refuse_changed(abort_on_exception=(abort_on_exception, True))
        params = _params(max_tokens, temperature, top_p, top_k, frequency_penalty)
        if not isinstance(prompt, (str, list, tuple)):
            raise TypeError(f"prompt must be a string or a list of strings, not {type(prompt).__name__}")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if params is None:
            pairs: Iterator[tuple[int, str]] = iter(())
            texts = [""] * len(prompts)
        elif stream:
            pairs = self._stream([self._prepare(text, params, rep_window) for text in prompts])
        else:
            prepared = [self._prepare(text, params, rep_window) for text in prompts]
            texts = [self._count(output) for output in self._engine._finish(prepared)]
        if stream:
            return (text for _, text in pairs) if isinstance(prompt, str) else pairs
        return texts[0] if isinstance(prompt, str) else texts

    def generate_with_request(self, request: GenerationRequest) -> Any:
        """Answer `request.messages`: str, or an iterator of str with `request.stream`."""
        return self.generate(
            self.tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True),
            stream=request.stream,
            max_tokens=request.max_len,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            frequency_penalty=request.frequency_penalty,
            rep_window=request.rep_window,
        )

    async def generate_async(
        self,
        prompt: str,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 50,
        frequency_penalty: float = 0.0,
        rep_window: int = 64,
    ) -> AsyncIterator[str]:
        """Pieces of text for `async for`."""
        params = _params(max_tokens, temperature, top_p, top_k, frequency_penalty)
        if params is None:
            return
        request, arguments = self._prepare(prompt, params, rep_window)
        dispatcher = self._engine._dispatcher
        sink = dispatcher.loop_sink(asyncio.get_running_loop())
        async with AsyncTokenStream(dispatcher, sink, request, arguments) as stream:
            async for chunk in stream:
                if chunk.text:
                    yield chunk.text
        self._count(request.output())

    def get_stats(self) -> dict[str, Any]:
        """AstrAI's keys: total_tasks, total_tokens, active_tasks, waiting_queue; once something finished also
        avg_ttft_ms, avg_decode_tps, avg_e2e_latency_ms and recent_tasks (of the last 128)."""
        stats = self._engine.stats()
        out: dict[str, Any] = {
            **self._totals,
            "active_tasks": stats["num_requests_running"],
            "waiting_queue": stats["num_requests_waiting"],
        }
        recent = list(self._recent)
        for name, key in (("avg_ttft_ms", "ttft_ms"), ("avg_decode_tps", "decode_tps")):
            if values := [task[key] for task in recent if key in task]:
                out[name] = fmean(values)
        if recent:
            out["avg_e2e_latency_ms"] = fmean(task["e2e_latency_ms"] for task in recent)
            out["recent_tasks"] = recent
        return out

    def shutdown(self) -> None:
        """Close the engine. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _prepare(self, text: str, params: SamplingParams, rep_window: int) -> Prepared:
        """The request for the end of the prompt that leaves room for a token; max_tokens fill that room."""
        if not isinstance(text, str):
            raise TypeError(f"prompt must be a string or a list of strings, not {type(text).__name__}")
        if check_int("rep_window", rep_window) < 0:
            raise ValueError(f"rep_window must be at least 0; given: {rep_window}")
        limit = self._engine.max_model_len
        ids = self._engine._prompt_ids(text)[-(limit - 1) :]
        room = limit - len(ids)
        params = replace(params, max_tokens=min(params.max_tokens or room, room))
        return self._engine._request(ids, params, frequency_window=rep_window)

    def _stream(self, prepared: list[Prepared]) -> Iterator[tuple[int, str]]:
        """Submit now; `(index, piece)`, interleaved as they come. Dropping the iterator aborts."""
        return self._pieces(RequestGroup(self._engine._dispatcher, prepared), prepared)

    def _pieces(self, group: RequestGroup, prepared: list[Prepared]) -> Iterator[tuple[int, str]]:
        try:
            for index, chunk in group:
                if chunk.text:
                    yield index, chunk.text
                if chunk.finish_reason is not None:
                    self._count(prepared[index][0].output())
        finally:
            group.close()

    def _count(self, output: GenerationOutput) -> str:
        self._totals["total_tasks"] += 1
        self._totals["total_tokens"] += len(output.token_ids)
        if output.metrics is not None:
            self._recent.append(_task(self._totals["total_tasks"], output, output.metrics))
        return output.text


def _task(number: int, output: GenerationOutput, metrics: RequestMetrics) -> dict[str, Any]:
    """A finished task in AstrAI's words; times in milliseconds, rates in tokens per second."""
    inputs, outputs = len(output.prompt_token_ids), len(output.token_ids)
    end_to_end = metrics.finished_time - metrics.arrival_time
    task: dict[str, Any] = {
        "task_id": f"task_{number}",
        "input_tokens": inputs,
        "output_tokens": outputs,
        "e2e_latency_ms": end_to_end * 1e3,
    }
    if end_to_end > 0:
        task["total_tps"] = (inputs + outputs) / end_to_end
    if metrics.first_scheduled_time is not None and metrics.first_token_time is not None:
        prefill = metrics.first_token_time - metrics.first_scheduled_time
        decode = metrics.finished_time - metrics.first_token_time
        task["queue_wait_ms"] = (metrics.first_scheduled_time - metrics.arrival_time) * 1e3
        task["ttft_ms"] = (metrics.first_token_time - metrics.arrival_time) * 1e3
        if prefill > 0:
            task["prefill_tps"] = inputs / prefill
        if decode > 0 and outputs > 1:
            task["decode_tps"] = (outputs - 1) / decode
            task["decode_avg_ms"] = decode / (outputs - 1) * 1e3
    return task


def _params(
    max_tokens: int | None, temperature: float, top_p: float, top_k: int, frequency_penalty: float
) -> SamplingParams | None:
    """None when no token is wanted."""
    if max_tokens is not None and check_int("max_tokens", max_tokens) <= 0:
        return None
    if top_p == 0:  # AstrAI: exactly one token is kept
        top_p, top_k = 1.0, 1
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        frequency_penalty=frequency_penalty,
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
