"""AstrAI's surface over the story model: forms, edges, refusals. Its own models: test_engine_astrai.py."""

from __future__ import annotations

import gc

import pytest

from astrai_rs import AutoTokenizer, Engine, GenerationRequest, InferenceEngine, SamplingParams
from astrai_rs.model import AutoModel
from conftest import GLASS, LIMIT, python, wait_until


@pytest.fixture(scope="module")
def engine():
    model, tokenizer = AutoModel.from_pretrained(GLASS), AutoTokenizer.from_pretrained(GLASS)
    with InferenceEngine(model, tokenizer, 8, 64) as engine:
        yield engine


@pytest.fixture(scope="module")
def core():
    """The same model through `Engine`."""
    with Engine(GLASS, dtype="float32", max_model_len=64) as engine:
        yield engine


def test_documented_examples(tmp_path):
    """As AstrAI's document has them, in a program of its own; only `astrai` became `astrai_rs`."""
    program = f"""
from astrai_rs.model import AutoModel
# Load model from checkpoint
model = AutoModel.from_pretrained({str(GLASS)!r})
# Save model to new directory
model.save_pretrained({str(tmp_path)!r})

from astrai_rs import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})

from astrai_rs.inference import InferenceEngine, GenerationRequest
# Create inference engine with continuous batching
engine = InferenceEngine(
    model=model,
    tokenizer=tokenizer,
    max_batch_size=8,
    max_seq_len=128,
)
# Use GenerationRequest with messages format
request = GenerationRequest(
    messages=[
        {{"role": "system", "content": "You are a helpful assistant."}},
        {{"role": "user", "content": "Hello"}},
    ],
    temperature=0.8,
    top_p=0.95,
    top_k=50,
    max_len=1024,
    stream=True,
)
# Generate with streaming
for token in engine.generate_with_request(request):
    print(token, end="", flush=True)
"""
    with python("-c", program) as process:
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, err) == (0, "")
    assert out


def test_no_tokens_wanted(engine):
    assert engine.generate("abc", max_tokens=0) == ""
    assert engine.generate(["abc", "d"], max_tokens=-1) == ["", ""]
    assert list(engine.generate("abc", stream=True, max_tokens=0)) == []
    assert list(engine.generate(["abc"], stream=True, max_tokens=0)) == []
    assert engine.generate([]) == []


async def test_generate_async(engine, cases):
    case = cases[0]
    pieces = [piece async for piece in engine.generate_async(case["prompt"], 40, 0.0)]
    assert len(pieces) > 5
    assert "".join(pieces) == case["text"]
    assert [piece async for piece in engine.generate_async("abc", max_tokens=0)] == []


def test_top_p_zero_keeps_one_token(engine, cases):
    assert engine.generate(cases[0]["prompt"], max_tokens=40, top_p=0) == cases[0]["text"]


def test_penalty_counts_the_window_of_the_prompt_and_the_output(engine, core, cases):
    """Greedy, with a penalty of 2 per occurrence: as if each earlier token had this bias."""
    ids = cases[3]["prompt_ids"]
    for window in (0, 2, 64):
        text = engine.generate(
            cases[3]["prompt"], max_tokens=4, temperature=0, frequency_penalty=2.0, rep_window=window
        )
        seen, made = ids[len(ids) - min(window, len(ids)) :], []
        for _ in range(4):
            bias = {token: -2.0 * (seen + made).count(token) for token in seen + made}
            params = SamplingParams(max_tokens=1, temperature=0, logit_bias=bias)
            made += core.generate(ids + made, params).token_ids
        assert text == core.tokenizer.decode(made)


def test_long_prompts_keep_their_end_and_output_fits(engine, core):
    prompt = "Once upon a time " * 20 + "the queen said to"
    end = core.tokenizer.encode(prompt)[-63:]
    expected = core.generate(end, SamplingParams(max_tokens=1, temperature=0)).text
    assert engine.generate(prompt, max_tokens=5, temperature=0) == expected
    short = core.tokenizer.encode("Once")
    engine.generate("Once", max_tokens=None, temperature=0)
    assert engine.get_stats()["recent_tasks"][-1]["output_tokens"] <= 64 - len(short)


def test_stats():
    with InferenceEngine(GLASS) as engine:
        empty = {"total_tasks": 0, "total_tokens": 0, "active_tasks": 0, "waiting_queue": 0}
        assert engine.get_stats() == empty
        engine.generate(["abc", "de"], max_tokens=4, temperature=0)
        list(engine.generate("f", stream=True, max_tokens=2, temperature=0))
        stats = engine.get_stats()
        assert (stats["total_tasks"], stats["total_tokens"]) == (3, 4 + 4 + 2)
        assert (stats["active_tasks"], stats["waiting_queue"]) == (0, 0)
        assert stats["avg_e2e_latency_ms"] >= stats["avg_ttft_ms"] > 0
        assert stats["avg_decode_tps"] > 0
        assert [task["output_tokens"] for task in stats["recent_tasks"]] == [4, 4, 2]
        names = {"task_id", "input_tokens", "output_tokens", "queue_wait_ms", "ttft_ms", "prefill_tps"}
        names |= {"decode_tps", "decode_avg_ms", "total_tps", "e2e_latency_ms"}
        assert names == stats["recent_tasks"][0].keys()


def test_dropping_a_stream_stops_its_request(endless_folder):
    with InferenceEngine(endless_folder, max_batch_size=2, max_seq_len=30_000) as engine:
        stream = engine.generate(["Once", "upon"], stream=True)
        next(stream)
        assert engine.get_stats()["active_tasks"] + engine.get_stats()["waiting_queue"] == 2
        del stream
        gc.collect()
        wait_until(lambda: engine.get_stats()["active_tasks"] == 0)
        assert engine._engine._dispatcher._routes == {}


def test_shutdown():
    engine = InferenceEngine(GLASS)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate("a")


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
    ("options", "error", "message"),
    [
        ({"max_prefix_len": 100}, ValueError, "max_prefix_len=100 is not supported: only the default 512"),
        ({"cache_capacity": 1}, ValueError, "cache_capacity=1 is not supported"),
        ({"cache": object()}, ValueError, "cache=.* is not supported"),
        ({"enable_cuda_graph": False}, ValueError, "enable_cuda_graph=False is not supported"),
        ({"backend": "flash"}, ValueError, "backend='flash' is not supported"),
        ({"max_batch_size": 1.5}, TypeError, "max_batch_size must be an int, not float 1.5"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be at least 1; given: 0"),
        ({"max_seq_len": 1}, ValueError, "max_seq_len must be at least 2; given: 1"),
        ({"max_seq_len": 1000}, ValueError, "max_model_len must be at most 128"),
        ({"tokenizer": 3}, TypeError, "tokenizer must have encode and decode; int has no encode"),
        ({"model": 3}, TypeError, "model must be a path or a hub id, not int"),
    ],
    ids=str,
)
def test_engine_refusals(options, error, message):
    with pytest.raises(error, match=message):
        InferenceEngine(**({"model": GLASS} | options))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"abort_on_exception": False}, ValueError, "abort_on_exception=False is not supported"),
        ({"prompt": [1, 2]}, TypeError, "prompt must be a string or a list of strings, not int"),
        ({"prompt": 3}, TypeError, "prompt must be a string or a list of strings, not int"),
        ({"max_tokens": 1.5}, TypeError, "max_tokens must be an int"),
        ({"temperature": -1}, ValueError, "temperature must be a finite number of at least 0; given: -1"),
        ({"top_p": 1.5}, ValueError, "top_p must be above 0 and at most 1; given: 1.5"),
        ({"top_k": -2}, ValueError, "top_k must be at least 1"),
        ({"frequency_penalty": 9}, ValueError, "frequency_penalty must be between -2 and 2; given: 9"),
        ({"rep_window": -1}, ValueError, "rep_window must be at least 0; given: -1"),
        ({"rep_window": 1.5}, TypeError, "rep_window must be an int, not float 1.5"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_generate_refusals(engine, arguments, error, message, stream):
    with pytest.raises(error, match=message):
        engine.generate(**({"prompt": "a"} | arguments), stream=stream)
