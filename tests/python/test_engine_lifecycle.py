"""Real engines under rough use: aborts, dropped iterators, closing, Ctrl-C, threads, asyncio, forks."""

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from astrai_rs import AutoTokenizer, Engine, EngineClosed, SamplingParams
from astrai_rs.async_stream import AsyncTokenStream, Mailbox
from conftest import ENDLESS_TOKENS, INTERRUPTIBLE, LIMIT, assert_idle, python, wait_until
from reference import GOLDEN

MODEL = str(GOLDEN / "glass-llama")
SHORT = SamplingParams(max_tokens=100, ignore_eos=True, seed=1)
ENDLESS = SamplingParams(max_tokens=30_000)
"""With the fixture `endless`: runs until something stops it."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(MODEL) as engine:
        yield engine


def random_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    prompt = [rng.randrange(1000) for _ in range(rng.randint(1, 27))]
    return prompt, SamplingParams(max_tokens=rng.randint(1, 100), ignore_eos=True, n=rng.choice([1, 1, 1, 3]))


def test_a_thousand_random_aborts_and_dropped_iterators(engine: Engine) -> None:
    rng = random.Random(3)
    streams = []
    for _ in range(1000):
        stream = engine.stream(*random_request(rng))
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


async def test_a_thousand_async_streams_end_in_every_way(engine: Engine) -> None:
    rng = random.Random(4)

    async def one(how: str, pieces: int) -> str:
        stream = engine.astream(*random_request(rng))
        async for _ in stream:
            pieces -= 1
            if pieces == 0 and how == "close":
                await stream.aclose()
            elif pieces == 0 and how == "drop":
                break
            elif pieces == 0 and how == "raise":
                raise ZeroDivisionError
        return how

    ways = ("cancel", "close", "drop", "raise", "finish")
    for _ in range(20):
        chosen = [rng.choice(ways) for _ in range(50)]
        tasks = [asyncio.create_task(one(how, rng.randint(1, 4))) for how in chosen]
        await asyncio.sleep(0)
        for task, how in zip(tasks, chosen, strict=True):
            if how == "cancel":
                if rng.random() < 0.5:
                    await asyncio.sleep(0.001)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    del tasks, task  # their exceptions hold frames, and these streams
    await asyncio.sleep(0)  # lets go of gather's future, which woke us and holds the tasks
    gc.collect()
    await asyncio.to_thread(assert_idle, engine)


async def test_fifty_async_streams_give_what_each_gives_alone(engine: Engine) -> None:
    requests = [
        (f"Once there was {index}", SamplingParams(max_tokens=60, seed=index, n=1 + index % 2))
        for index in range(50)
    ]
    alone = [[sample.text for sample in engine.generate(*request).outputs] for request in requests]

    async def one(prompt: str, params: SamplingParams) -> list[str]:
        texts = [""] * params.n
        async for piece in engine.astream(prompt, params):
            texts[piece.index] += piece.text
        return texts

    assert await asyncio.gather(*(one(*request) for request in requests)) == alone


async def test_a_batch_of_events_wakes_the_loop_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [engine.astream("Once", SHORT) for _ in range(30)]
    loop, calls = asyncio.get_running_loop(), []
    real = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *given: (calls.append(given), real(*given))[1])
    for stream in streams:
        assert sum([len(piece.token_ids) async for piece in stream]) == 100
    assert len(calls) < 30 * 100 / 4


def test_eight_threads_share_an_engine(engine: Engine) -> None:
    prompts = [f"Once there was {index}" for index in range(48)]
    params = [SamplingParams(max_tokens=40, seed=index, ignore_eos=True) for index in range(48)]
    alone = [engine.generate(prompt, one).token_ids for prompt, one in zip(prompts, params, strict=True)]
    got: dict[int, list[int]] = {}

    def work(first: int) -> None:
        for index in range(first, 48, 8):
            if index % 3 == 0:
                pieces = engine.stream(prompts[index], params[index])
                got[index] = [token for piece in pieces for token in piece.token_ids]
            elif index % 3 == 1:
                got[index] = engine.generate(prompts[index], params[index]).token_ids
            else:
                next(engine.stream(prompts[index], SHORT))  # dropped
                both = engine.generate([prompts[index]] * 2, params[index])
                assert both[0].token_ids == both[1].token_ids
                got[index] = both[0].token_ids

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert [got[index] for index in range(48)] == alone
    assert_idle(engine)


def test_closing_ends_running_requests(endless: Engine) -> None:
    stream = endless.stream("Once", ENDLESS)
    next(stream)
    results: list[object] = []

    def generate() -> None:
        try:
            results.append(endless.generate(["a"] * 5, ENDLESS))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=generate) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: endless.stats()["num_requests_running"] == 21)
    endless.close()
    for thread in threads:
        thread.join(LIMIT)
    assert [type(result) for result in results] == [EngineClosed] * 4
    with pytest.raises(EngineClosed):
        list(stream)
    assert list(stream) == []
    for use in (
        lambda: endless.generate("a"),
        lambda: endless.stream("a"),
        lambda: endless.chat([{"role": "user", "content": "a"}]),
        endless.clear_prefix_cache,
    ):
        with pytest.raises(EngineClosed):
            use()
    assert not endless._dispatcher._thread.is_alive()
    endless.close()


TWO_ENGINES = """
import sys
from astrai_rs import Engine, SamplingParams
for _ in range(2):
    with Engine(sys.argv[1], kv_cache_tokens=2**18) as engine:
        engine.generate("Once", SamplingParams(max_tokens=2))
        status = open("/proc/self/status").read()
        print(int(status.partition("RssAnon:")[2].split()[0]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of the process")
def test_the_cache_of_a_second_engine_takes_memory_only_as_it_fills() -> None:
    with python("-c", TWO_ENGINES, MODEL) as process:
        output, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    first, second = map(int, output.split())
    assert second < first + 32, "MiB"


async def test_closing_ends_async_streams(endless: Engine) -> None:
    stream = endless.astream("abc", ENDLESS)
    await anext(stream)
    await asyncio.to_thread(endless.close)
    with pytest.raises(EngineClosed):
        async for _ in stream:
            pass
    with pytest.raises(EngineClosed):
        endless.astream("a")


@pytest.mark.parametrize("how", ["close", "drop", "with", "never started", "exception"])
def test_ending_a_stream_aborts_its_request(endless: Engine, how: str) -> None:
    stream = endless.stream("abc", ENDLESS)
    if how == "close":
        next(stream)
        stream.close()
        stream.close()
        with pytest.raises(StopIteration):
            next(stream)
    elif how == "with":
        with stream:
            next(stream)
    elif how == "exception":

        def consume() -> None:
            for _ in endless.stream("def", ENDLESS):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            consume()
    elif how == "drop":
        next(stream)
    del stream
    gc.collect()
    assert_idle(endless)


@pytest.mark.parametrize("how", ["cancel", "drop", "aclose", "with", "exception"])
async def test_ending_an_async_stream_aborts_its_request(endless: Engine, how: str) -> None:
    stream = endless.astream("abc", ENDLESS)
    await anext(stream)

    async def consume(stream: AsyncTokenStream) -> None:
        async for _ in stream:
            if how == "exception":
                raise ZeroDivisionError

    if how == "cancel":
        task = asyncio.create_task(consume(stream))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    elif how == "aclose":
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    elif how == "with":
        async with stream:
            await anext(stream)
    elif how == "exception":
        with pytest.raises(ZeroDivisionError):
            await consume(stream)
    del stream
    gc.collect()
    await asyncio.to_thread(assert_idle, endless)


def test_a_closed_loop_aborts_its_streams(endless: Engine) -> None:
    async def leave() -> object:
        stream = endless.astream("abc", ENDLESS)
        await anext(stream)
        return stream

    stream = asyncio.run(leave())
    assert_idle(endless)
    del stream


def test_closing_a_stream_ends_its_reader(endless: Engine) -> None:
    stream = endless.stream("Once", ENDLESS)
    pieces: list[object] = []

    def read() -> None:
        for piece in stream:
            pieces.append(piece)

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: len(pieces) > 10)
    stream.close()
    thread.join(LIMIT)
    assert not thread.is_alive()
    assert_idle(endless)


def test_an_async_stream_belongs_to_its_loop(engine: Engine) -> None:
    async def make():
        return engine.astream("Once", SHORT)

    async def read(stream):
        return [piece async for piece in stream]

    stream = asyncio.run(make())
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(read(stream))
    with pytest.raises(RuntimeError, match="no running event loop"):
        engine.astream("Once", SHORT)


def test_a_stream_keeps_its_engine() -> None:
    want = [id for piece in Engine(MODEL).stream([1, 2, 3], SHORT) for id in piece.token_ids]
    assert len(want) == 100

    async def collect() -> list[int]:
        return [id async for piece in Engine(MODEL).astream([1, 2, 3], SHORT) for id in piece.token_ids]

    assert asyncio.run(collect()) == want

    async def collect_group() -> list[int]:
        group = Engine(MODEL).astream_group([[1, 2, 3]], [SHORT])
        return [id async for _, piece in group for id in piece.token_ids]

    assert asyncio.run(collect_group()) == want


def test_a_dropped_engine_is_closed(endless_folder) -> None:
    engine = Engine(endless_folder, kv_cache_tokens=ENDLESS_TOKENS)
    stream, thread, gone = engine.stream("Once", ENDLESS), engine._dispatcher._thread, weakref.ref(engine)
    next(stream)
    del engine
    gc.collect()
    next(stream)  # which keeps the engine
    del stream
    gc.collect()
    assert gone() is None
    thread.join(LIMIT)
    assert not thread.is_alive()


ENGINE = f"""
import asyncio, os
from astrai_rs import Engine, SamplingParams
engine = Engine({{folder!r}}, kv_cache_tokens={ENDLESS_TOKENS})
endless = SamplingParams(max_tokens=30_000)
few = SamplingParams(max_tokens=5)
async def first_piece():
    await anext(engine.astream("Once", endless))
"""

CTRL_C = """
async def read():
    async for piece in engine.astream("Once", endless):
        pass
print("ready", flush=True)
try:
    {call}
except KeyboardInterrupt:
    print("interrupted", end=" ")
# Not before: while it is handled, the exception may keep the frame of a stream, which is dropped then.
print(len(engine.generate("Once", few).token_ids))
stats = engine.stats()
print(stats["num_requests_running"], stats["num_requests_waiting"], stats["kv_blocks_used"])
"""


async def test_ctrl_c_while_a_waiter_is_woken() -> None:
    """A signal's handler cancels the waiter just before it gets its result."""
    mailbox = Mailbox()
    waiter = asyncio.create_task(mailbox.wait())
    await asyncio.sleep(0)
    (future,) = mailbox._arrived._waiters

    class Interrupted:
        def done(self) -> bool:
            waiter.cancel()
            return False

        def set_result(self, result: bool) -> None:
            future.set_result(result)

    mailbox._arrived._waiters[0] = Interrupted()
    mailbox.receive(KeyError())
    assert len(mailbox.items) == 1
    mailbox._arrived._waiters[0] = future
    with pytest.raises(asyncio.CancelledError):
        await waiter


@pytest.mark.parametrize(
    "call",
    [
        "engine.generate(['Once', 'upon'] * 50, endless)",
        "for piece in engine.stream('Once', endless): pass",
        "asyncio.run(read())",
    ],
)
def test_ctrl_c(endless_folder, call: str) -> None:
    code = INTERRUPTIBLE + ENGINE.format(folder=str(endless_folder)) + CTRL_C.format(call=call)
    with python("-c", code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):  # it is busy
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LIMIT) == ("interrupted 5\n0 0 0\n", "")
        assert process.returncode == 0


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "engine.close()",
        "stream = engine.stream('Once', endless); next(stream)",
        "stream = engine.stream('Once', endless); next(stream); raise SystemExit(0)",
        "engine.me = engine; stream = engine.stream('Once', endless)",
        "asyncio.run(first_piece())",
    ],
)
def test_the_interpreter_exits_with_a_running_engine(endless_folder, code: str) -> None:
    with python("-c", ENGINE.format(folder=str(endless_folder)) + code) as process:
        assert process.communicate(timeout=LIMIT) == ("", "")
        assert process.returncode == 0


FORK = """
stream = engine.stream("Once", endless)
next(stream)
pid = os.fork()
if pid == 0:
    async def astream():
        engine.astream("a")
    calls = [lambda: engine.generate("a"), lambda: engine.stream("a"), lambda: asyncio.run(astream()),
             lambda: engine.chat([{"role": "user", "content": "a"}]), engine.stats, engine.clear_prefix_cache,
             engine.close, lambda: next(stream)]
    for call in calls:
        try:
            print("not refused", call())
        except RuntimeError as error:
            print(error)
    print("end of child", flush=True)
else:
    os.waitpid(pid, 0)
    stream.close()
    print(len(engine.generate("Once", few).token_ids))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_use_after_fork_is_refused(endless_folder) -> None:
    """The child also exits by itself, through the finalizers of what it inherited."""
    code = ENGINE.format(folder=str(endless_folder)) + FORK
    with python("-W", "ignore", "-c", code) as process:
        out, err = process.communicate(timeout=LIMIT)
    *refusals, end, parent = out.splitlines()
    assert (end, parent, process.returncode, err) == ("end of child", "5", 0, "")
    assert len(refusals) == 8
    assert all(line.startswith("this Engine was made before a fork") for line in refusals), refusals


def test_samples_share_the_prompts_blocks() -> None:
    prompt = [index % 1000 for index in range(96)]
    params = SamplingParams(n=16, max_tokens=16, ignore_eos=True)
    for prefix_caching in (True, False):
        with Engine(MODEL, enable_prefix_caching=prefix_caching) as engine:
            stream = engine.stream(prompt, params)
            most = max(engine.stats()["kv_blocks_used"] for _ in stream)
            assert 6 < most <= 6 + 16 * 2  # 16 tables of 7 blocks apiece would be 112


async def test_closing_a_stream_wakes_the_task_that_reads_it(endless) -> None:
    stream = endless.astream("Once", SamplingParams(max_tokens=20_000, stop="never written"))

    async def read() -> None:
        async for _ in stream:
            pass

    reader = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    await stream.aclose()
    await asyncio.wait_for(reader, LIMIT)


def test_the_models_own_ends_count_with_any_tokenizer() -> None:
    """The story model ends with id 3; a tokenizer that does not know changes nothing."""
    tokenizer = AutoTokenizer(AutoTokenizer.from_pretrained(MODEL).backend)
    with Engine(MODEL, tokenizer=tokenizer) as engine:
        only_end = SamplingParams(allowed_token_ids=[3], max_tokens=4)
        assert engine.generate([1, 2], only_end).finish_reason == "stop"
