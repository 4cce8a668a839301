"""One thread drains the core's events and hands them to whoever waits: threads, and asyncio loops."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from weakref import WeakKeyDictionary, ref

from astrai_rs._core import EngineClosed

if TYPE_CHECKING:
    import asyncio

    from astrai_rs._core import Engine as Core
    from astrai_rs._core import Event
    from astrai_rs.async_stream import Mailbox

_POLL_SECONDS = 1.0
"""How long one poll waits. Events and close wake it earlier; this bounds only a missed wake-up."""

Delivery: TypeAlias = "list[Event] | BaseException"
"""Events in order, or the reason why no more will come."""


class Sink(Protocol):
    """Takes deliveries on the dispatcher's thread; must not block. `queue.SimpleQueue` is one."""

    def put(self, delivery: Delivery, /) -> None: ...


class Dispatcher:
    """Routes events by request id. Every method may be called from any thread."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._pid = os.getpid()
        self._lock = threading.RLock()
        """Held over submit and registration, so that no event comes before its route. Reentrant, because the
        garbage collector may drop a stream, which aborts its request, at any allocation under the lock."""
        self._routes: dict[int, Sink] = {}
        self._failure: BaseException | None = None
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopSink] = WeakKeyDictionary()
        self._thread = threading.Thread(target=self._run, name="astrai-rs-events", daemon=True)
        self._thread.start()

    def check_process(self) -> None:
        """RuntimeError in a forked child: it has this object but not the engine's threads."""
        if self._is_forked():
            raise RuntimeError(
                "this Engine was made before a fork, and its threads are not in this process; "
                "make an Engine in the child, or use multiprocessing's 'spawn'"
            )

    @property
    def is_running(self) -> bool:
        """Whether the core still takes requests."""
        return self._failure is None

    def submit(self, sink: Sink, prompt_token_ids: list[int], arguments: dict[str, Any]) -> int:
        """Submit to the core; the request's events go to `sink`."""
        with self._lock:
            if self._failure is not None:
                raise EngineClosed(str(self._failure))
            request_id = self._core.submit(prompt_token_ids, **arguments)
            self._routes[request_id] = sink
        return request_id

    def abort(self, request_id: int) -> None:
        """Stop a request and forget it. Harmless when it is finished or unknown, and in a forked child."""
        if self._is_forked():
            return
        with self._lock:
            known = self._routes.pop(request_id, None) is not None
        if known:
            self._core.abort(request_id)

    def stop_sample(self, request_id: int, sample: int) -> None:
        """Stop one sample; its last event still comes."""
        self._core.abort(request_id, sample)

    def forget(self, request_id: int) -> None:
        """No more events of a finished request."""
        with self._lock:
            self._routes.pop(request_id, None)

    def loop_sink(self, loop: asyncio.AbstractEventLoop) -> LoopSink:
        """The one sink of an asyncio loop."""
        with self._lock:
            return self._loops.setdefault(loop, LoopSink(loop))

    def close(self) -> None:
        """Close the core and end every request with EngineClosed. Idempotent; nothing in a forked child."""
        if self._is_forked():
            return
        self._core.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _is_forked(self) -> bool:
        """Whether this is a child of the process that made it: the lock may then be held for ever."""
        return os.getpid() != self._pid

    def _run(self) -> None:
        failure: BaseException = RuntimeError("the event thread ended")
        try:
            while True:
                self._deliver(self._core.poll(_POLL_SECONDS))
        except EngineClosed as error:
            failure = error
        except BaseException as error:  # whatever it is, those who wait must hear of it
            failure = RuntimeError(f"the engine's event thread failed: {error!r}")
            failure.__cause__ = error
        with self._lock:
            self._failure = failure
            sinks = set(self._routes.values())
            self._routes.clear()
        for sink in sinks:
            _put(sink, failure)

    def _deliver(self, events: list[Event]) -> None:
        deliveries: defaultdict[Sink, list[Event]] = defaultdict(list)
        with self._lock:
            for event in events:
                sink = self._routes.get(event.request_id)
                if sink is not None:  # else it was aborted
                    deliveries[sink].append(event)
        for sink, batch in deliveries.items():
            if not _put(sink, batch):
                for request_id in {event.request_id for event in batch}:
                    self.abort(request_id)


def _put(sink: Sink, delivery: Delivery) -> bool:
    try:
        sink.put(delivery)
    except RuntimeError:  # its asyncio loop is closed
        return False
    return True


class LoopSink:
    """All streams of one asyncio loop: one wake-up of the loop per batch of events, however many streams."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)  # weak: the dispatcher must not keep finished loops alive
        self.mailboxes: dict[int, Mailbox] = {}
        """By request id."""

    def put(self, delivery: Delivery, /) -> None:
        """Raises RuntimeError when the loop is closed."""
        loop = self._loop()
        if loop is None:
            raise RuntimeError("the event loop is gone")
        loop.call_soon_threadsafe(self._hand_out, delivery)

    def _hand_out(self, delivery: Delivery) -> None:
        if isinstance(delivery, BaseException):
            for mailbox in list(self.mailboxes.values()):
                mailbox.receive(delivery)
            return
        for event in delivery:
            if (box := self.mailboxes.get(event.request_id)) is not None:
                box.receive(event)
