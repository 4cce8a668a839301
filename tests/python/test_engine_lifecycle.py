"""Real engines under rough use: aborts, dropped iterators, closing, Ctrl-C, threads, asyncio."""

import asyncio
import gc
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from astrai_rs import Engine, EngineClosed, SamplingParams
from reference import GOLDEN

MODEL = str(GOLDEN / "glass-llama")
LONG = SamplingParams(max_tokens=100, ignore_eos=True, seed=1)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(MODEL) as engine:
        yield engine


def assert_idle(engine: Engine) -> None:
    """Nothing is held or queued, and the engine answers."""
    deadline = time.monotonic() + 10
    keys = ("num_requests_running", "num_requests_waiting", "kv_blocks_used")
    while any(engine.stats()[key] for key in keys) and time.monotonic() < deadline:
        time.sleep(0.01)
    stats = engine.stats()
    assert [stats[key] for key in keys] == [0, 0, 0]
    assert len(engine.generate("Once", LONG).token_ids) == 100


def test_a_thousand_random_aborts_and_dropped_iterators(engine: Engine) -> None:
    rng = random.Random(3)
    streams = []
    for _ in range(1000):
        params = SamplingParams(max_tokens=rng.randint(1, 100), ignore_eos=True, n=rng.choice([1, 1, 1, 3]))
        stream = engine.stream([rng.randrange(1000) for _ in range(rng.randint(1, 27))], params)
        for _ in range(rng.randint(0, 3)):
            next(stream, None)
        streams.append(stream)
        if len(streams) > 20:
            victim = streams.pop(rng.randrange(len(streams)))
            if rng.random() < 0.5:
                victim.close()
            del victim
    del streams, stream
    gc.collect()
    assert_idle(engine)


def test_async_streams_cancelled_and_dropped(engine: Engine) -> None:
    expected = engine.generate("Once upon", LONG).text

    async def one(index: int) -> str | None:
        stream = engine.astream("Once upon", LONG)
        text = ""
        async for piece in stream:
            text += piece.text
            if index % 3 == 1 and len(text) > 5:
                return None  # dropped
        return text

    async def everything() -> list[str | BaseException | None]:
        tasks = [asyncio.create_task(one(index)) for index in range(50)]
        await asyncio.sleep(0.005)
        for task in tasks[2::3]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(everything())
    assert all(result == expected for result in results[0::3])
    gc.collect()
    assert_idle(engine)


def test_eight_threads_share_an_engine(engine: Engine) -> None:
    prompts = [f"Once there was {index}" for index in range(24)]
    params = [SamplingParams(max_tokens=40, seed=index, ignore_eos=True) for index in range(24)]
    alone = [engine.generate(prompt, one).token_ids for prompt, one in zip(prompts, params, strict=True)]
    got: dict[int, list[int]] = {}

    def work(first: int) -> None:
        for index in range(first, 24, 8):
            got[index] = engine.generate(prompts[index], params[index]).token_ids

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [got[index] for index in range(24)] == alone


def test_closing_ends_running_requests() -> None:
    engine = Engine(MODEL)
    stream = engine.stream("Once", SamplingParams(max_tokens=100, n=64, ignore_eos=True))
    next(stream)
    failures: list[BaseException] = []

    def generate() -> None:
        try:
            engine.generate(["a"] * 500, LONG)
        except EngineClosed as error:
            failures.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    time.sleep(0.05)
    engine.close()
    thread.join(10)
    assert len(failures) == 1
    with pytest.raises(EngineClosed):
        list(stream)
    with pytest.raises(EngineClosed):
        engine.generate("a")
    engine.close()


def test_an_exception_in_a_consumer_aborts(engine: Engine) -> None:
    def consume() -> None:
        for _ in engine.stream("Once", SamplingParams(max_tokens=100, n=32, ignore_eos=True)):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert_idle(engine)


def test_a_stream_belongs_to_one_reader(engine: Engine) -> None:
    stream = engine.stream("Once", SamplingParams(max_tokens=100, n=200, ignore_eos=True))
    thread = threading.Thread(target=lambda: list(stream))
    thread.start()
    time.sleep(0.02)
    stream.close()  # ends the reader, wherever it is
    thread.join(10)
    assert not thread.is_alive()
    assert_idle(engine)


def test_an_async_stream_belongs_to_its_loop(engine: Engine) -> None:
    async def make():
        return engine.astream("Once", LONG)

    async def read(stream):
        return [piece async for piece in stream]

    stream = asyncio.run(make())
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(read(stream))


CTRL_C = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a CI may start us with SIGINT ignored
from astrai_rs import Engine, SamplingParams
engine = Engine({model!r})
params = SamplingParams(max_tokens=100, n=900, ignore_eos=True)
print("ready", flush=True)
try:
    {call}
    print("finished")
except KeyboardInterrupt:
    few = SamplingParams(max_tokens=5, ignore_eos=True)
    print("interrupted", len(engine.generate("Once", few).token_ids))
"""


@pytest.mark.parametrize(
    "call",
    [
        "engine.generate(['Once'] * 50, params)",
        "[None for _ in range(50) for _ in engine.stream('a', params)]",
    ],
)
def test_ctrl_c(call: str) -> None:
    code = CTRL_C.format(model=MODEL, call=call)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == "interrupted 5\n"
        assert process.returncode == 0


def test_samples_share_the_prompts_blocks() -> None:
    prompt = [index % 1000 for index in range(96)]
    params = SamplingParams(n=16, max_tokens=16, ignore_eos=True)
    for prefix_caching in (True, False):
        with Engine(MODEL, enable_prefix_caching=prefix_caching) as engine:
            stream = engine.stream(prompt, params)
            most = max(engine.stats()["kv_blocks_used"] for _ in stream)
            assert 6 < most <= 6 + 16 * 2  # 16 tables of 7 blocks apiece would be 112


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kv_cache_tokens": 10**13}, MemoryError, "a KV cache of 10000000000000 tokens needs"),
        ({"kv_cache_tokens": 0}, ValueError, "kv_cache_tokens must be at least 1; given: 0"),
        ({"max_model_len": 129}, ValueError, "max_model_len must be at most 128"),
        ({"max_model_len": -1}, ValueError, "max_model_len must be at least 1; given: -1"),
        ({"max_model_len": 1.5}, TypeError, "max_model_len must be an integer; given: 1.5"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be at least 1; given: 0"),
        ({"max_num_batched_tokens": -3}, ValueError, "max_num_batched_tokens must be at least 1; given: -3"),
        ({"num_threads": 0}, ValueError, "num_threads must be at least 1; given: 0"),
        ({"num_threads": True}, TypeError, "num_threads must be an integer; given: True"),
        ({"seed": -5}, ValueError, "seed must be between 0 and 18446744073709551615"),
        (
            {"dtype": "int3"},
            ValueError,
            'dtype must be one of auto, float32, bfloat16, float16; given: "int3"',
        ),
        ({"device": "tpu"}, ValueError, 'device must be one of auto, cpu, cuda; given: "tpu"'),
        ({"device": "cuda"}, NotImplementedError, "this build has no CUDA"),
        ({"device": 5}, TypeError, "device: 'int' object is not an instance of 'str'; given: 5"),
    ],
    ids=str,
)
def test_bad_engine_arguments(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        Engine(MODEL, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 10**6}, "n must be between 1 and 1024; given: 1000000"),
        ({"seed": -2}, "seed must be between 0 and 18446744073709551615, or -1 for a random one; given: -2"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1; given: 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number of at least 0; given: NaN"),
        ({"logprobs": 1025}, "logprobs must be between 0 and 1024 (the vocabulary), or -1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; given: 0"),
        (
            {"allowed_token_ids": [1024]},
            "allowed_token_ids must hold token ids between 0 and 1023; given: 1024",
        ),
    ],
    ids=str,
)
def test_bad_sampling_values(engine: Engine, fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        engine.generate("a", SamplingParams(**fields))
    assert message in str(caught.value)


@pytest.mark.parametrize("token", [-1, 1024, 2**40])
def test_bad_prompt_ids(engine: Engine, token: int) -> None:
    with pytest.raises(ValueError, match=f"prompt token ids must be between 0 and 1023; given: {token}"):
        engine.generate([token])
