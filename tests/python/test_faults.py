"""What the real core cannot be made to do on demand: failing steps, a broken event thread, odd orders."""

from __future__ import annotations

import threading

import pytest

from astrai_rs import CheckpointError, Engine, EngineClosed, SamplingParams
from astrai_rs import engine as module
from conftest import GLASS, LIMIT, wait_until
from fake_core import METRICS, ByteTokenizer, Event, FakeCore


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module._core, "Engine", FakeCore)
    with Engine(GLASS, tokenizer=ByteTokenizer()) as engine:
        yield engine


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("InvalidArgument", ValueError),
        ("Checkpoint", CheckpointError),
        ("Unsupported", NotImplementedError),
        ("Io", OSError),
        ("NotFound", FileNotFoundError),
        ("OutOfMemory", MemoryError),
        ("Device", RuntimeError),
        ("Bug", RuntimeError),
        ("Shutdown", EngineClosed),
    ],
)
def test_errors_of_a_step(engine, kind, expected):
    engine._core.script = lambda number: [
        Event(number, [], finish_reason="error", error=(kind, "it broke"), metrics=METRICS)
    ]
    with pytest.raises(expected, match="it broke") as caught:
        engine.generate(["abc", "def"])
    assert type(caught.value) is expected
    with pytest.raises(expected, match="it broke"):
        list(engine.stream("abc"))
    assert engine._dispatcher._routes == {}
    engine._core.script = lambda number: [Event(number, [72, 105], finish_reason="length", metrics=METRICS)]
    assert engine.generate("ok").text == "Hi"


def test_an_error_keeps_what_was_streamed_before(engine):
    engine._core.script = lambda number: [
        Event(number, [72]),
        Event(number, [], finish_reason="error", error=("Bug", "it broke"), metrics=METRICS),
    ]
    stream = engine.stream("a")
    assert next(stream).text == "H"
    with pytest.raises(RuntimeError, match="it broke"):
        next(stream)


async def test_errors_reach_async_streams(engine):
    engine._core.script = lambda number: [
        Event(number, [], finish_reason="error", error=("OutOfMemory", "it broke"), metrics=METRICS)
    ]
    with pytest.raises(MemoryError, match="it broke"):
        await anext(engine.astream("a"))


def test_an_event_thread_that_fails_ends_the_requests(engine):
    stream = engine.stream("abc")
    engine._core.send(ZeroDivisionError("in poll"))
    with pytest.raises(RuntimeError, match="event thread failed.*in poll"):
        list(stream)
    with pytest.raises(EngineClosed):
        engine.generate("a")


def test_a_stream_has_one_reader_at_a_time(engine):
    stream = engine.stream("abc")
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    wait_until(stream._group._reading.locked)
    with pytest.raises(ValueError, match="read by another thread"):
        next(stream)
    stream.close()
    reader.join(LIMIT)
    assert not reader.is_alive()


def test_stop_string_without_a_last_event_does_not_hang(engine):
    engine._core.script = lambda number: [Event(number, list(b"ABCDEF"))]
    out = engine.generate("a", SamplingParams(stop="CD"))
    assert (out.text, out.token_ids, out.metrics) == ("AB", list(b"ABCD"), None)
    assert engine._core.aborts == [(1, 0)]


def test_events_of_unknown_requests_are_dropped(engine):
    engine._core.script = lambda number: [
        Event(99, [1]),
        Event(number, [72], finish_reason="length", metrics=METRICS),
    ]
    assert engine.generate("a").text == "H"


def test_a_finished_request_is_not_aborted(engine):
    engine._core.script = lambda number: [Event(number, [72], finish_reason="length", metrics=METRICS)]
    list(engine.stream("abc"))
    engine.generate(["abc", "d"])
    assert engine._core.aborts == []


def test_a_stream_holds_back_what_may_be_a_stop_string(engine):
    engine._core.script = lambda number: [
        *(Event(number, [byte]) for byte in b"ABCA"),
        Event(number, list(b"BD")),
    ]
    pieces = list(engine.stream("a", SamplingParams(stop="BD")))
    assert [piece.text for piece in pieces] == ["A", "", "BC", "A", ""]
    assert pieces[-1].stop_reason == "BD"


def test_a_character_in_pieces(engine):
    first, second = "é".encode()
    engine._core.script = lambda number: [
        Event(number, [first]),
        Event(number, [second, first], finish_reason="length", metrics=METRICS),
    ]
    assert [piece.text for piece in engine.stream("a")] == ["", "é\ufffd"]


def test_any_tokenizer_with_encode_and_decode(monkeypatch):
    class TextOnly:
        """`encode` and `decode` of one argument; end-of-text ids as a list."""

        eos_token_id = (0, 1)

        def encode(self, text):
            return type("Encoding", (), {"ids": list(text.encode())})

        def decode(self, ids):
            return bytes(ids).decode()

    options = {}

    class Recording(FakeCore):
        script = staticmethod(lambda number: [Event(number, [72], finish_reason="length", metrics=METRICS)])

        def __init__(self, path, eos_token_ids, **given):
            super().__init__(path, lambda: options.update(eos_token_ids=eos_token_ids()))

    monkeypatch.setattr(module._core, "Engine", Recording)
    with Engine(GLASS, tokenizer=TextOnly()) as engine:
        assert options["eos_token_ids"] == [0, 1, 3]  # the tokenizer's, and the model's own
        assert engine.generate("a", SamplingParams(bad_words=["b"])).text == "H"
        with pytest.raises(ValueError, match="no apply_chat_template"):
            engine.chat([{"role": "user", "content": "x"}])
