"""AstrAI's documented calls over the fake core; only the import names changed."""

from __future__ import annotations

import pytest

import fake_core
from astrai_rs.inference import GenerationRequest, InferenceEngine
from astrai_rs.model import AutoModel


class Tokenizer(fake_core.ByteTokenizer):
    def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=True):
        assert not tokenize
        return "".join(f"{m['role'][0]}:{m['content']};" for m in messages)


@pytest.fixture
def engine(folder, make_engine):
    with InferenceEngine(
        AutoModel.from_pretrained(folder), Tokenizer(), max_batch_size=8, max_seq_len=64
    ) as engine:
        yield engine


def test_documented_example(engine):
    request = GenerationRequest(
        messages=[{"role": "system", "content": "be good"}, {"role": "user", "content": "hello"}],
        temperature=0.8,
        top_p=0.95,
        top_k=50,
        max_len=1024,
        stream=True,
    )
    stream = engine.generate_with_request(request)
    assert not isinstance(stream, str)
    assert "".join(stream) == "S:BE GOOD;U:HELLO;"
    request.stream = False
    assert engine.generate_with_request(request) == "S:BE GOOD;U:HELLO;"


def test_generate_forms(engine):
    assert engine.generate("abc") == "ABC"
    assert engine.generate(["abc", "de"]) == ["ABC", "DE"]
    assert list(engine.generate("abc", stream=True)) == ["A", "B", "C"]
    texts = ["", ""]
    for index, piece in engine.generate(["abc", "de"], stream=True):
        texts[index] += piece
    assert texts == ["ABC", "DE"]
    assert engine.generate("abc", False, 2, 1.0, 1.0, 50) == "AB"


def test_no_tokens_wanted(engine):
    assert engine.generate("abc", max_tokens=0) == ""
    assert engine.generate(["abc", "d"], max_tokens=-1) == ["", ""]
    assert list(engine.generate("abc", stream=True, max_tokens=0)) == []


async def test_generate_async(engine):
    assert [piece async for piece in engine.generate_async("abc")] == ["A", "B", "C"]
    assert [piece async for piece in engine.generate_async("abc", max_tokens=0)] == []


def test_core_arguments(engine):
    engine.generate("abc", frequency_penalty=0.5, rep_window=7)
    prompt, options = engine._engine._core.submitted[-1]
    assert (options["frequency_penalty"], options["frequency_window"], options["top_k"]) == (0.5, 7, 50)
    assert options["max_tokens"] == 64 - 3
    engine.generate("abc", top_p=0)
    assert (
        engine._engine._core.submitted[-1][1]["top_k"],
        engine._engine._core.submitted[-1][1]["top_p"],
    ) == (1, 1.0)
    engine.generate("x" * 80 + "end", max_tokens=5)
    prompt, options = engine._engine._core.submitted[-1]
    assert bytes(prompt) == b"x" * 60 + b"end"
    assert options["max_tokens"] == 1


def test_stats(engine):
    assert engine.get_stats() == {"total_tasks": 0, "total_tokens": 0, "active_tasks": 0, "waiting_queue": 0}
    engine.generate(["abc", "de"])
    list(engine.generate("f", stream=True))
    stats = engine.get_stats()
    assert (stats["total_tasks"], stats["total_tokens"]) == (3, 4 + 3 + 2)
    assert stats["avg_ttft_ms"] >= 0
    assert stats["avg_e2e_latency_ms"] >= 0
    assert [task["output_tokens"] for task in stats["recent_tasks"]] == [4, 3, 2]


def test_dropping_a_stream_stops_its_request(engine):
    stream = engine.generate(["a" * 60, "b" * 60], stream=True)
    next(stream)
    del stream
    assert engine._engine._dispatcher._routes == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": -1}, "top_k must be a non-negative integer, given -1"),
        ({"top_k": 1.5}, "top_k must be a non-negative integer"),
        ({"top_k": True}, "top_k must be a non-negative integer"),
        ({"top_p": 1.1}, r"top_p must be a number in \[0, 1\], given 1.1"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": "x"}, "top_p"),
        ({"temperature": -1}, "temperature must be a non-negative number, given -1"),
        ({"temperature": None}, "temperature"),
        ({"messages": "hello"}, "messages must be a list of dicts"),
        ({"messages": ["hello"]}, "messages must be a list of dicts"),
    ],
)
def test_request_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        GenerationRequest(**({"messages": []} | fields))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_prefix_len": 100}, "max_prefix_len=100 is not supported: only the default 512"),
        ({"cache_capacity": 1}, "cache_capacity=1 is not supported"),
        ({"cache": object()}, "cache=.* is not supported"),
        ({"enable_cuda_graph": False}, "enable_cuda_graph=False is not supported"),
        ({"backend": "flash"}, "backend='flash' is not supported"),
    ],
)
def test_engine_refusals(folder, make_engine, options, message):
    with pytest.raises(ValueError, match=message):
        InferenceEngine(AutoModel.from_pretrained(folder), Tokenizer(), **options)


def test_generate_refusals(engine):
    with pytest.raises(ValueError, match="abort_on_exception=False is not supported"):
        engine.generate("a", abort_on_exception=False)
    with pytest.raises(TypeError, match="prompt must be a string or a list of strings, not int"):
        engine.generate([1, 2])
    with pytest.raises(TypeError, match="max_tokens must be an int"):
        engine.generate("a", max_tokens=1.5)


def test_shutdown(engine):
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate("a")
