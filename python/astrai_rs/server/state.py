"""`ServerState`: what the routes of one app share."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from astrai_rs._core import EngineClosed
from astrai_rs.engine import Engine
from astrai_rs.request import SamplingParams
from astrai_rs.server.errors import ApiError, busy, invalid
from astrai_rs.server.generation import Generation
from astrai_rs.server.metrics import Metrics
from astrai_rs.server.settings import ServerSettings
from astrai_rs.server.sse import EVENTS, StreamResponse
from astrai_rs.tokenizer import AutoTokenizer

Result = TypeVar("Result")

_SHUTTING_DOWN = "the server is shutting down"


class ServerState:
    """The engine, its live generations, and whether new ones are taken. Used on one event loop only."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(engine, settings.model_names[0])
        self.draining = False
        self.created = int(time.time())
        self._live: weakref.WeakSet[Generation] = weakref.WeakSet()
        self.num_requests = 0
        """Requests that are being answered, from their heads on."""
        self._is_over = False
        self._num_samples = 0
        self._busy_since = 0.0

    @property
    def tokenizer(self) -> AutoTokenizer:
        """The tokenizer; an error for a model that has none."""
        if not isinstance(self.engine.tokenizer, AutoTokenizer):
            raise ApiError(400, "this model has no tokenizer: only prompts of token ids are served")
        return self.engine.tokenizer

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Each id's bytes; empty where the tokenizer is of a kind whose tokens have none of their own."""
        try:
            return self.engine.token_bytes()
        except NotImplementedError:
            return []

    def check_lengths(self, texts: Iterable[object]) -> None:
        """Refuse a text that cannot fit, however few tokens it has: encoding it would take seconds."""
        if not isinstance(self.engine.tokenizer, AutoTokenizer):
            return
        limit = self.engine.max_model_len * self.engine.tokenizer.longest_token
        for text in texts:
            if isinstance(text, str) and len(text) > limit:
                message = (
                    f"the prompt must leave room for a token within max_model_len: at most "
                    f"{self.engine.max_model_len - 1} tokens; given: a text of {len(text)} characters"
                )
                raise invalid(message, code="context_length_exceeded")

    def check_model(self, name: str | None) -> None:
        """Clients may leave the name out."""
        names = self.settings.model_names
        if name is not None and name not in names:
            message = f"the model {name!r} does not exist; served: {', '.join(names)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def stream(self, chunks: AsyncGenerator[bytes, None], media_type: str | None = None) -> StreamResponse:
        """A streamed answer: events with keep-alives, or text of another type without."""
        keep_alive_s = self.settings.keep_alive_s if media_type is None else None
        return StreamResponse(chunks, keep_alive_s=keep_alive_s, media_type=media_type or EVENTS)

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run what takes long (tokenizing, compiling a grammar) on a thread."""
        return await asyncio.to_thread(function, *arguments)

    async def start(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> Generation:
        """Submit the prompts together; an error if any of them is not possible."""
        if any(one.structured_outputs is not None for one in params):
            await self.call(self.engine.compile_grammars, params)
        if self._is_over:
            raise busy(_SHUTTING_DOWN, code="shutting_down")
        wanted = sum(one.n for one in params)
        limit = self.engine.max_num_seqs + self.settings.max_queued
        if wanted > limit:
            message = (
                f"a request may ask for {limit} samples (n times prompts) on this server; given: {wanted}"
            )
            raise invalid(message, param="n")
        if self._num_samples + wanted > limit:
            message = f"the queue is full: {self._num_samples} samples are running or waiting"
            raise busy(message, status=429, code="queue_full")
        if not self._num_samples:
            self._busy_since = time.monotonic()
        group = self.engine.astream_group(prompts, params)
        self._num_samples += wanted

        def release() -> None:
            self._num_samples -= wanted

        generation = Generation(group, prompts, params, self.metrics, release)
        self._live.add(generation)
        return generation

    @property
    def num_live(self) -> int:
        """Generations that still run."""
        return sum(not generation.is_over for generation in self._live)

    def end_all(self) -> None:
        """End every live generation with an error, and begin none: the time to drain is over."""
        self._is_over = True
        for generation in list(self._live):
            generation.fail(EngineClosed(_SHUTTING_DOWN))

    def health(self) -> str | None:
        """None, or what is wrong with the engine."""
        if not self.engine.is_running:
            return "the engine has stopped"
        stats = self.engine.stats()
        silent = min(stats["uptime_s"] - stats["heartbeat_s"], time.monotonic() - self._busy_since)
        is_busy = self.num_live or stats["num_requests_running"] or stats["num_requests_waiting"]
        if is_busy and silent > self.settings.stuck_after_s:
            return f"the engine has not finished a step for {silent:.1f} s"
        return _SHUTTING_DOWN if self.draining else None
