"""A core whose events a test writes: for failures and orders that the real one cannot be made to show."""

from __future__ import annotations

import itertools
import queue
from dataclasses import dataclass

from astrai_rs import EngineClosed

METRICS = {
    "arrival_time": 1.0,
    "first_scheduled_time": 2.0,
    "first_token_time": 3.0,
    "finished_time": 4.0,
    "num_cached_tokens": 0,
    "num_preemptions": 0,
}


@dataclass(frozen=True)
class Event:
    request_id: int
    token_ids: list[int]
    sample: int = 0
    logprobs: list | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: list | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    ends_with_stop_token: bool = False
    error: tuple[str, str] | None = None
    metrics: dict | None = None


class FakeCore:
    """As much of `_core.Engine` as a request needs. `script(request id)` gives a new request's events."""

    vocab_size, max_model_len, num_threads, kv_cache_tokens = 256, 512, 1, 4096
    max_num_seqs = 256
    device, dtype = "cpu", "float32"
    script = staticmethod(lambda request_id: [])

    def __init__(self, path: str, eos_token_ids, **options) -> None:
        eos_token_ids()
        self.aborts: list[tuple[int, int | None]] = []
        self._ids = itertools.count(1)
        self._events: queue.SimpleQueue = queue.SimpleQueue()

    def submit(self, prompt_token_ids, **options) -> int:
        request_id = next(self._ids)
        self.send(*self.script(request_id))
        return request_id

    def send(self, *events) -> None:
        """The next `poll` gives these events, or raises the exception that is among them."""
        self._events.put(events)

    def abort(self, request_id, sample=None) -> None:
        self.aborts.append((request_id, sample))

    def poll(self, timeout) -> list[Event]:
        try:
            events = self._events.get(timeout=timeout)
        except queue.Empty:
            return []
        for event in events:
            if isinstance(event, BaseException):
                raise event
        return list(events)

    def close(self) -> None:
        self.send(EngineClosed("the engine is closed"))


class ByteTokenizer:
    """Ids are UTF-8 bytes; id 0 is the end of text and special."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        skip = {0} if skip_special_tokens else set()
        return b"".join(b"</s>" if i == 0 else bytes([i]) for i in ids if i not in skip).decode(
            errors="replace"
        )
