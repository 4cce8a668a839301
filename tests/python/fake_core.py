"""A deterministic stand-in for the Rust core, to test the Python side without a model.

Each step gives every running sample one token of `FakeEngine.reply(prompt, sample)`. The ids are bytes, so
`ByteTokenizer` makes text of them.
"""

from __future__ import annotations

import io
import itertools
import sys
import threading
import time
import types
from collections import deque
from dataclasses import dataclass, field

EOS = 0

try:
    from astrai_rs._core import CheckpointError, EngineClosed
except ImportError:

    class CheckpointError(ValueError):
        """As in the core."""

    class EngineClosed(RuntimeError):
        """As in the core."""


@dataclass(frozen=True)
class Event:
    request_id: int
    sample: int
    token_ids: list[int]
    logprobs: list | None = None
    prompt_logprobs: list | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: tuple[str, str] | None = None
    metrics: dict | None = None


@dataclass
class _Running:
    request_id: int
    sample: int
    prompt: list[int]
    options: dict
    reply: list[int]
    arrival: float
    made: int = 0
    first: float | None = None


@dataclass
class FakeEngine:
    """The same surface as `_core.Engine`."""

    path: str
    device: str = "cpu"
    dtype: str = "float32"
    max_model_len: int = 512
    vocab_size: int = 256
    num_threads: int = 1
    kv_cache_tokens: int = 4096
    options: dict = field(default_factory=dict)

    step_seconds = 0.0
    """Class attribute: how long a step takes."""
    aborted_events = True
    """Class attribute: whether an aborted sample gets a last event."""

    def __init__(self, path: str, **options) -> None:
        self.path, self.options = path, options
        if options.get("max_model_len") is not None:
            self.max_model_len = options["max_model_len"]
        self.eos = set(options.get("eos_token_ids", ())) | {EOS}
        self.submitted: list[tuple[list[int], dict]] = []
        self.aborts: list[tuple[int, int | None]] = []
        self._ids = itertools.count(1)
        self._lock = threading.Condition()
        self._running: list[_Running] = []
        self._events: deque[Event] = deque()
        self._closed = False
        self._fail_next: tuple[str, str] | None = None
        self._thread = threading.Thread(target=self._steps, daemon=True)
        self._thread.start()

    @staticmethod
    def reply(prompt: list[int], sample: int) -> list[int]:
        """What is generated, before the end-of-text token: the prompt in capitals, rotated by the sample."""
        if max(prompt) > 255:  # not bytes: a real tokenizer
            return prompt[-8:]
        text = bytes(prompt).upper()
        return list(text[sample:] + text[:sample])

    def submit(self, prompt_token_ids, **options) -> int:
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed")
            if not prompt_token_ids:
                raise ValueError("the prompt is empty")
            if options.get("temperature", 1.0) < 0:
                raise ValueError(f"temperature must be at least 0. Given: {options['temperature']}")
            request_id = next(self._ids)
            self.submitted.append((list(prompt_token_ids), options))
            for sample in range(options.get("n", 1)):
                reply = [*self.reply(list(prompt_token_ids), sample), EOS]
                running = _Running(
                    request_id, sample, list(prompt_token_ids), options, reply, time.monotonic()
                )
                self._running.append(running)
            self._lock.notify_all()
            return request_id

    def abort(self, request_id, sample=None) -> None:
        with self._lock:
            self.aborts.append((request_id, sample))
            for running in list(self._running):
                if running.request_id == request_id and sample in (None, running.sample):
                    self._running.remove(running)
                    if self.aborted_events:
                        self._events.append(self._event(running, [], "abort"))
            self._lock.notify_all()

    def poll(self, timeout) -> list[Event]:
        with self._lock:
            self._lock.wait_for(lambda: self._events or self._closed, timeout)
            events = list(self._events)
            self._events.clear()
            if not events and self._closed:
                raise EngineClosed("the engine is closed")
            return events

    def fail_next(self, kind: str, message: str) -> None:
        """The next step fails its requests with this error."""
        with self._lock:
            self._fail_next = kind, message

    def stats(self):
        with self._lock:
            running = len({r.request_id for r in self._running})
            return {"num_requests_running": running, "num_requests_waiting": 0}

    def clear_prefix_cache(self) -> None: ...

    def close(self) -> None:
        with self._lock:
            for running in self._running:
                error = ("Shutdown", "the engine was closed")
                self._events.append(
                    Event(running.request_id, running.sample, [], None, None, "error", None, error)
                )
            self._running.clear()
            self._closed = True
            self._lock.notify_all()

    def _steps(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._running or self._closed)
                if self._closed:
                    return
                for running in list(self._running):
                    self._step(running)
                self._lock.notify_all()
            time.sleep(self.step_seconds)

    def _step(self, running: _Running) -> None:
        if self._fail_next:
            self._running.remove(running)
            error, self._fail_next = self._fail_next, None
            self._events.append(
                Event(running.request_id, running.sample, [], None, None, "error", None, error)
            )
            return
        options = running.options
        token = running.reply[running.made]
        if token == EOS and options.get("ignore_eos"):
            running.made = 0
            token = running.reply[0]
        running.made += 1
        running.first = running.first or time.monotonic()
        finish = stop = None
        if token in self.eos and not options.get("ignore_eos"):
            finish = "stop"
        elif token in options.get("stop_token_ids", ()):
            finish, stop = "stop", token
        elif running.made >= options["max_tokens"]:
            finish = "length"
        if finish:
            self._running.remove(running)
        self._events.append(self._event(running, [token], finish, stop))

    def _event(self, running, tokens, finish, stop=None) -> Event:
        logprobs = prompt_logprobs = metrics = None
        if running.options.get("logprobs") is not None:
            logprobs = [[(t, -0.5, 1), (t, -0.5, 1), (7, -2.0, 2)] for t in tokens]
        if running.options.get("prompt_logprobs") is not None and running.sample == 0 and running.made == 1:
            prompt_logprobs = [None, *[[(t, -1.0, 1)] for t in running.prompt[1:]]]
        if finish:
            metrics = {
                "arrival_time": running.arrival,
                "first_scheduled_time": running.arrival,
                "first_token_time": running.first,
                "finished_time": time.monotonic(),
                "num_cached_tokens": 0,
                "num_preemptions": 0,
            }
        return Event(
            running.request_id, running.sample, tokens, logprobs, prompt_logprobs, finish, stop, None, metrics
        )


class ByteTokenizer:
    """Ids are UTF-8 bytes; id 0 is the end of text and special."""

    eos_token_id = EOS

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        skip = {EOS} if skip_special_tokens else set()
        parts = b"".join(b"</s>" if i == EOS else bytes([i]) for i in ids if i not in skip)
        return parts.decode("utf-8", "replace")


def gguf_metadata(path: str) -> dict:
    """Reads the metadata of a GGUF file (version 2 and 3, little-endian)."""
    import struct
    from pathlib import Path

    data = io.BytesIO(Path(path).read_bytes())
    scalars = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))

    def read(code: str):
        return struct.unpack("<" + code, data.read(struct.calcsize("<" + code)))[0]

    def string():
        raw = data.read(read("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw

    def value(kind: int):
        if kind == 8:
            return string()
        if kind == 9:
            kind, count = read("I"), read("Q")
            if kind in scalars:
                return list(
                    struct.unpack(
                        f"<{count}{scalars[kind]}", data.read(count * struct.calcsize(scalars[kind]))
                    )
                )
            return [value(kind) for _ in range(count)]
        return read(scalars[kind])

    if data.read(4) != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file")
    read("I"), read("Q")
    return {string(): value(read("I")) for _ in range(read("Q"))}


def install() -> None:
    """Stand in for `astrai_rs._core` in a process of its own."""
    import astrai_rs

    module = types.ModuleType("astrai_rs._core")
    module.__dict__.update(
        Engine=FakeEngine, Event=Event, CheckpointError=CheckpointError, EngineClosed=EngineClosed,
        gguf_metadata=gguf_metadata, system_info=lambda: {"tier": "fake", "num_threads": 1, "cuda": False},
        __version__="0.0.0",
    )  # fmt: skip
    sys.modules["astrai_rs._core"] = module
    astrai_rs._core = module  # the import above has put the real one there
