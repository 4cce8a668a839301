"""Streams of pieces for threads. Dropping one aborts its request."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from astrai_rs._core import Event
    from astrai_rs.dispatch import Delivery, Dispatcher
    from astrai_rs.output import Request
    from astrai_rs.request import GenerationChunk


Prepared = tuple["Request", dict[str, Any]]
"""A request and the arguments of its submit."""


class RequestGroup:
    """Requests submitted together: iterates over `(index of the request, piece)` as pieces come.

    An exception while waiting, `close()`, and dropping the group abort what still runs.
    """

    def __init__(self, dispatcher: Dispatcher, prepared: Sequence[Prepared]) -> None:
        self._dispatcher = dispatcher
        self._reading = threading.Lock()
        self._queue: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._arrived: deque[Event] = deque()
        """Events of the last delivery; one at a time, so that pieces before an error are given out."""
        self._live: dict[int, tuple[int, Request]] = {}
        """Requests whose events still come, by id."""
        self._running = len(prepared)
        """Requests with samples that are not complete; only the reader counts it down."""
        self._closed = False
        try:
            for index, (request, arguments) in enumerate(prepared):
                request.id = dispatcher.submit(self._queue, request.prompt_token_ids, arguments)
                self._live[request.id] = index, request
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, GenerationChunk]:
        self._dispatcher.check_process()
        if not self._reading.acquire(blocking=False):
            raise ValueError("this stream is being read by another thread")
        try:
            while self._running and not self._closed:
                if not self._arrived:
                    self._receive(self._queue.get())
                elif (piece := self._feed(self._arrived.popleft())) is not None:
                    return piece
        except BaseException:
            self.close()
            raise
        finally:
            self._reading.release()
        raise StopIteration

    def settle(self, seconds: float) -> None:
        """Wait for the last events of requests that stop strings ended: they have the metrics."""
        while self._live:
            if self._arrived:
                self._feed(self._arrived.popleft())
                continue
            try:
                delivery = self._queue.get(timeout=seconds)
            except queue.Empty:
                break
            if isinstance(delivery, BaseException):
                break
            self._arrived.extend(delivery)
        self.close()

    def close(self) -> None:
        """Abort what still runs; no more pieces come. Idempotent."""
        self._closed = True
        self._queue.put([])  # wakes a thread that waits for a piece
        while self._live:
            request_id, (_, request) = self._live.popitem()
            if request.finished:
                self._dispatcher.forget(request_id)
            else:
                self._dispatcher.abort(request_id)

    def __del__(self) -> None:
        if getattr(self, "_live", None):
            self.close()

    def _receive(self, delivery: Delivery) -> None:
        if isinstance(delivery, BaseException):
            raise type(delivery)(*delivery.args) from delivery
        self._arrived.extend(delivery)

    def _feed(self, event: Event) -> tuple[int, GenerationChunk] | None:
        """The event's piece; None if its sample was complete already, or the group is closed."""
        index, request = self._live.get(event.request_id, (0, None))
        if request is None:
            return None
        chunk = request.feed(event)
        if chunk is not None:
            self._running -= request.finished
        if request.settled:
            self._live.pop(event.request_id, None)
            self._dispatcher.forget(event.request_id)
        return None if chunk is None else (index, chunk)


class TokenStream:
    """Iterator over a request's pieces; the last of each sample has its finish_reason.

    `close()`, leaving a `with` block, an exception while waiting, and dropping the stream all abort the
    request.
    """

    def __init__(self, dispatcher: Dispatcher, request: Request, arguments: dict[str, Any]) -> None:
        self._group = RequestGroup(dispatcher, [(request, arguments)])

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> GenerationChunk:
        try:
            return next(self._group)[1]
        except StopIteration:
            self.close()
            raise

    def close(self) -> None:
        """Abort the request if it still runs. Idempotent."""
        self._group.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
