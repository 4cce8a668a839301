"""Streams of pieces for asyncio, apart because importing asyncio takes as long as all the rest."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from astrai_rs._core import Event
    from astrai_rs.dispatch import Dispatcher, LoopSink
    from astrai_rs.output import Request
    from astrai_rs.request import GenerationChunk
    from astrai_rs.stream import Prepared


class AsyncRequestGroup:
    """`RequestGroup` for asyncio. Cancelling the task that waits for a piece aborts what still runs.

    Belongs to the loop that was running when it was made.
    """

    def __init__(self, dispatcher: Dispatcher, sink: LoopSink, prepared: Sequence[Prepared]) -> None:
        self._dispatcher = dispatcher
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._mailbox = Mailbox()
        self._live: dict[int, tuple[int, Request]] = {}
        """Requests with samples that are not complete, by id."""
        try:
            for index, (request, arguments) in enumerate(prepared):
                request.id = dispatcher.submit(sink, request.prompt_token_ids, arguments)
                # Deliveries run on this loop, so none comes before this line.
                sink.mailboxes[request.id] = self._mailbox
                self._live[request.id] = index, request
        except BaseException:
            self.close()
            raise

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, GenerationChunk]:
        self._dispatcher.check_process()
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this stream belongs to another event loop")
        try:
            while True:
                while self._mailbox.items:
                    piece = self._receive(self._mailbox.items.popleft())
                    if piece is not None:
                        return piece
                if not self._live:
                    raise StopAsyncIteration
                await self._mailbox.wait()
        except BaseException:
            self.close()
            raise

    def fail(self, error: BaseException) -> None:
        """Make the next wait for a piece raise `error`, after the pieces that are here already."""
        if self._live:
            self._mailbox.receive(error)

    def close(self) -> None:
        """Abort what still runs; no more pieces come. Idempotent."""
        while self._live:
            request_id, _ = self._live.popitem()
            self._sink.mailboxes.pop(request_id, None)
            self._dispatcher.abort(request_id)
        self._mailbox.items.clear()
        self._mailbox.wake()  # a task that waits for a piece

    def __del__(self) -> None:
        if getattr(self, "_live", None):
            self.close()

    def _receive(self, item: Event | BaseException) -> tuple[int, GenerationChunk] | None:
        if isinstance(item, BaseException):
            raise type(item)(*item.args) from item
        index, request = self._live.get(item.request_id, (0, None))
        if request is None:
            return None
        chunk = request.feed(item)
        if request.finished:
            del self._live[item.request_id]
            self._sink.mailboxes.pop(item.request_id, None)
            self._dispatcher.forget(item.request_id)
        return None if chunk is None else (index, chunk)


class AsyncTokenStream:
    """`TokenStream` for asyncio: `async for piece in stream`. Cancelling the task that waits aborts the
    request.

    Belongs to the loop that was running when it was made.
    """

    def __init__(
        self, dispatcher: Dispatcher, sink: LoopSink, request: Request, arguments: dict[str, Any]
    ) -> None:
        self._group = AsyncRequestGroup(dispatcher, sink, [(request, arguments)])

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationChunk:
        return (await self._group.__anext__())[1]

    async def aclose(self) -> None:
        """Abort the request if it still runs. Idempotent."""
        self._group.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._group.close()


class Mailbox:
    """What arrived for one stream. The sink holds this, not the stream, so a dropped stream goes at once."""

    def __init__(self) -> None:
        self.items: deque[Event | BaseException] = deque()
        self._arrived = asyncio.Event()

    def receive(self, item: Event | BaseException) -> None:
        self.items.append(item)
        self.wake()

    def wake(self) -> None:
        """End a wait, though nothing may have come."""
        # A Ctrl-C may cancel the task that waits between `set`'s look at it and its result.
        with contextlib.suppress(asyncio.InvalidStateError):
            self._arrived.set()

    async def wait(self) -> None:
        """Until something is there."""
        if not self.items:
            self._arrived.clear()
            await self._arrived.wait()
