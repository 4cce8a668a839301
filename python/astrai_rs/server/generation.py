"""`Generation`: the samples of one HTTP request, from the engine's pieces to complete choices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from astrai_rs.request import GenerationChunk, SamplingParams, TokenLogprobs
from astrai_rs.server.metrics import Metrics
from astrai_rs.server.sse import disconnected

if TYPE_CHECKING:
    from starlette.requests import Request

    from astrai_rs.async_stream import AsyncRequestGroup

Result = TypeVar("Result")


@dataclass
class Choice:
    """One sample as far as it has come."""

    prompt: int
    """Which prompt it belongs to."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, piece: GenerationChunk) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs or []
        self.prompt_logprobs = piece.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason


@dataclass
class Usage:
    """What a request has cost."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0


class Generation:
    """Iterates over `(index of the choice, piece)`; the choices of the first prompt come first in number.

    Closing it, or cancelling the task that iterates, aborts what still runs.
    """

    def __init__(
        self,
        group: AsyncRequestGroup,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        metrics: Metrics,
        on_close: Callable[[], None],
    ) -> None:
        self._group = group
        self._on_close = on_close
        self._closed = False
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}
        """When each choice's last token came."""
        self._first_choice = [sum(one.n for one in params[:i]) for i in range(len(params))]
        self.prompts = prompts
        self.choices = [Choice(prompt) for prompt, one in enumerate(params) for _ in range(one.n)]
        self.usage = Usage(sum(map(len, prompts)))
        self._open = len(self.choices)

    @property
    def is_over(self) -> bool:
        return not self._open

    async def __aiter__(self) -> AsyncIterator[tuple[int, GenerationChunk]]:
        try:
            async for prompt, piece in self._group:
                index = self._first_choice[prompt] + piece.index
                self._note(index, piece)
                yield index, piece
        finally:
            self.close()

    async def finish(self, request: Request) -> list[Choice]:
        """All choices, complete. If the client leaves before, everything is aborted."""
        await unless_disconnected(request, self._run())
        return self.choices

    async def _run(self) -> None:
        async for _ in self:
            pass

    def fail(self, error: BaseException) -> None:
        """End it with an error."""
        self._group.fail(error)

    def close(self) -> None:
        """Abort what still runs. Idempotent."""
        self._group.close()
        self._open = 0
        if not self._closed:
            self._closed = True
            self._on_close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _note(self, index: int, piece: GenerationChunk) -> None:
        choice = self.choices[index]
        choice.add(piece)
        self.usage.completion_tokens += len(piece.token_ids)
        if piece.num_cached_tokens is not None and piece.index == 0:
            self.usage.cached_tokens += piece.num_cached_tokens
        now = time.perf_counter()
        if piece.token_ids:
            self._metrics.token(now - self._last.get(index, self._start), first=index not in self._last)
            self._last[index] = now
        if piece.finish_reason is not None:
            self._open -= 1
            prompt_tokens = len(self.prompts[choice.prompt])
            lengths = prompt_tokens, len(choice.token_ids)
            self._metrics.finished(piece.finish_reason, now - self._start, lengths)


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`; if the client leaves before, `work` is cancelled, and so is the caller."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class ClientLeft(Exception):
    """Nobody is there to answer."""
