"""Engine over the fake core: order, samples, streams, aborts, threads, errors, close, fork, Ctrl-C."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import fake_core
from astrai_rs import Engine, EngineClosed, GenerationOutput, Logprob, SamplingParams

LONG = SamplingParams(max_tokens=400, ignore_eos=True)


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def idle(engine):
    return lambda: engine.stats()["num_requests_running"] == 0


def test_one_prompt_gives_one_output(engine):
    out = engine.generate("hello")
    assert isinstance(out, GenerationOutput)
    assert out.text == "HELLO"
    assert out.prompt == "hello"
    assert out.prompt_token_ids == list(b"hello")
    assert out.token_ids == [*b"HELLO", 0]
    assert (out.finish_reason, out.stop_reason) == ("stop", None)
    assert out.metrics.finished_time >= out.metrics.first_token_time >= out.metrics.arrival_time
    assert out.logprobs is None


def test_ids_as_prompt(engine):
    out = engine.generate([104, 105])
    assert (out.prompt, out.text) == (None, "HI")
    assert engine.generate((104, 105)).text == "HI"
    array = np.array([104, 105])
    assert engine.generate(array).text == "HI"
    assert [out.text for out in engine.generate([array, array[:1]])] == ["HI", "H"]


def test_list_keeps_order_and_mixes_texts_and_ids(engine):
    prompts = [f"prompt {'x' * (i % 7)}{i}" for i in range(50)] + [[97, 98]]
    outs = engine.generate(prompts)
    assert [out.text for out in outs] == [p.upper() if isinstance(p, str) else "AB" for p in prompts]
    assert outs[0].prompt == prompts[0]
    assert outs[-1].prompt is None
    assert engine.generate([]) == []


def test_params_one_each(engine):
    outs = engine.generate(["abcdef", "ghijkl"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)])
    assert [(o.text, o.finish_reason) for o in outs] == [("AB", "length"), ("GHI", "length")]
    with pytest.raises(ValueError, match="1 given for 2 prompts"):
        engine.generate(["a", "b"], [SamplingParams()])


def test_n_samples(engine):
    out = engine.generate("abc", SamplingParams(n=3))
    assert [(o.index, o.text) for o in out.outputs] == [(0, "ABC"), (1, "BCA"), (2, "CAB")]
    assert out.text == "ABC"


def test_logprobs(engine):
    out = engine.generate("abc", SamplingParams(logprobs=1, prompt_logprobs=0, max_tokens=2))
    assert out.logprobs[0] == {65: Logprob(-0.5, 1, "A"), 7: Logprob(-2.0, 2, "\x07")}
    assert len(out.logprobs) == 2
    assert out.prompt_logprobs[0] is None
    assert out.prompt_logprobs[1] == {98: Logprob(-1.0, 1, "b")}
    assert len(out.prompt_logprobs) == 3


def test_stop_token_text_is_left_out(engine):
    params = SamplingParams(stop_token_ids=[67], skip_special_tokens=False)
    out = engine.generate("abcd", params)
    assert (out.text, out.token_ids, out.stop_reason) == ("AB", [65, 66, 67], 67)
    out = engine.generate("ab", SamplingParams(skip_special_tokens=False))
    assert out.text == "AB"
    out = engine.generate("ab", SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True))
    assert out.text == "AB</s>"


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_cuts_text_ids_and_logprobs(engine, include):
    params = SamplingParams(stop=["ZZ", "CD"], logprobs=0, include_stop_str_in_output=include, n=2)
    out = engine.generate("abcdefgh", params)
    assert out.text == ("ABCD" if include else "AB")
    assert (out.finish_reason, out.stop_reason) == ("stop", "CD")
    assert out.token_ids == list(b"ABCD")
    assert len(out.logprobs) == 4
    assert out.outputs[1].text == ("BCD" if include else "B")
    assert out.metrics is not None, "the last event after the abort brings the metrics"
    assert engine.core.stats()["num_requests_running"] == 0


def test_stop_string_without_a_last_event_does_not_hang(engine, monkeypatch):
    monkeypatch.setattr(fake_core.FakeEngine, "aborted_events", False)
    monkeypatch.setattr(fake_core.FakeEngine, "step_seconds", 0.001)
    out = engine.generate("abcdefgh", SamplingParams(stop="CD"))
    assert (out.text, out.metrics) == ("AB", None)


def test_min_tokens_delays_stop_strings(engine):
    assert engine.generate("abababab", SamplingParams(stop="AB", min_tokens=3)).text == "AB"
    assert engine.generate("abababab", SamplingParams(stop="AB", min_tokens=2)).text == "AB"
    assert engine.generate("abababab", SamplingParams(stop="AB", min_tokens=1)).text == ""


def test_stream(engine):
    pieces = list(engine.stream("héllo"))
    assert "".join(p.text for p in pieces) == engine.generate("héllo").text
    assert [i for p in pieces for i in p.token_ids] == engine.generate("héllo").token_ids
    assert [p.finish_reason for p in pieces][-1] == "stop"
    assert all(p.finish_reason is None for p in pieces[:-1])
    assert pieces[-1].metrics is not None


def test_stream_holds_back_what_may_be_a_stop_string(engine):
    texts = [p.text for p in engine.stream("abcabd", SamplingParams(stop="BD"))]
    assert "".join(texts) == "ABCA"
    assert texts[1] == "", "B may begin the stop string"


def test_stream_of_several_samples(engine):
    texts = {0: "", 1: ""}
    for piece in engine.stream("abc", SamplingParams(n=2)):
        texts[piece.index] += piece.text
    assert texts == {0: "ABC", 1: "BCA"}


def test_bad_arguments_of_stream_raise_at_the_call(engine):
    with pytest.raises(ValueError, match="temperature"):
        engine.stream("a", SamplingParams(temperature=-1))
    with pytest.raises(ValueError, match="empty"):
        engine.stream([])


def test_a_failed_submit_aborts_the_others(slow_engine):
    with pytest.raises(ValueError, match="temperature"):
        slow_engine.generate(["a", "b"], [LONG, SamplingParams(temperature=-1)])
    wait_until(idle(slow_engine))


@pytest.mark.parametrize("how", ["close", "drop", "with", "never started", "exception"])
def test_ending_a_stream_aborts_its_request(slow_engine, how):
    stream = slow_engine.stream("abc", LONG)
    if how == "close":
        next(stream)
        stream.close()
        stream.close()
        with pytest.raises(StopIteration):
            next(stream)
    elif how == "drop":
        next(stream)
        del stream
    elif how == "with":
        with stream:
            next(stream)
    elif how == "exception":

        def consume(stream):
            for _ in stream:
                raise KeyError("consumer")

        with pytest.raises(KeyError):
            consume(stream)
        del stream
    else:
        del stream
    gc.collect()
    wait_until(idle(slow_engine))
    assert slow_engine._dispatcher._routes == {}


def test_a_finished_stream_is_not_aborted(engine):
    list(engine.stream("abc"))
    engine.generate(["abc", "d"])
    assert engine.core.aborts == []
    assert engine._dispatcher._routes == {}


def test_many_random_aborts_leave_nothing(slow_engine):
    streams = [slow_engine.stream(f"p{i}", LONG) for i in range(200)]
    for i, stream in enumerate(streams):
        if i % 3:
            next(stream)
    del stream, streams
    wait_until(idle(slow_engine))
    assert slow_engine._dispatcher._routes == {}
    assert slow_engine.generate("ok").text == "OK"


def test_threads_share_an_engine(engine):
    results = {}

    def work(number):
        for turn in range(10):
            text = f"thread {number} turn {turn}"
            results[number, turn] = engine.generate([text, text + "!"]), text
            results[number, turn, "s"] = "".join(p.text for p in engine.stream(text)), text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 160
    for key, (got, text) in results.items():
        want = text.upper()
        assert (got == want) if len(key) == 3 else ([o.text for o in got] == [want, want + "!"])


async def test_astream(engine):
    async def one(text):
        return "".join([piece.text async for piece in engine.astream(text)])

    texts = [f"task {i} ✓" for i in range(40)]
    assert await asyncio.gather(*map(one, texts)) == [t.upper() for t in texts]
    assert engine._dispatcher._routes == {}


async def test_batches_of_events_wake_the_loop_once(engine, monkeypatch):
    streams = [engine.astream("abcdef") for _ in range(30)]
    loop, calls = asyncio.get_running_loop(), []
    real = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: (calls.append(a), real(*a))[1])
    for stream in streams:
        assert "".join([p.text async for p in stream]) == "ABCDEF"
    assert len(calls) < 30 * 7


@pytest.mark.parametrize("how", ["cancel", "drop", "aclose"])
async def test_ending_an_async_stream_aborts_its_request(slow_engine, how):
    stream = slow_engine.astream("abc", LONG)
    await anext(stream)
    if how == "cancel":

        async def consume():
            async for _ in stream:
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif how == "aclose":
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    else:
        del stream
    assert slow_engine._dispatcher._routes == {}
    await asyncio.to_thread(wait_until, idle(slow_engine))


def test_a_closed_loop_aborts_its_streams(slow_engine):
    async def leave():
        stream = slow_engine.astream("abc", LONG)
        await anext(stream)
        return stream

    stream = asyncio.run(leave())
    wait_until(idle(slow_engine))
    assert slow_engine._dispatcher._thread.is_alive()
    del stream
    assert slow_engine.generate("ok").text == "OK"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("InvalidArgument", ValueError), ("Device", RuntimeError), ("Bug", RuntimeError), ("OutOfMemory",
    MemoryError),
     ("Unsupported", NotImplementedError), ("Io", OSError), ("Shutdown", EngineClosed)],
)  # fmt: skip
def test_errors_of_a_step(engine, kind, expected):
    engine.core.fail_next(kind, "it broke")
    with pytest.raises(expected, match="it broke"):
        engine.generate("abc")
    engine.core.fail_next(kind, "it broke")
    with pytest.raises(expected, match="it broke"):
        list(engine.stream("abc"))
    assert engine.generate("ok").text == "OK"


def test_close_ends_live_requests(slow_engine):
    results = []

    def work():
        try:
            results.append(slow_engine.generate("abc", LONG))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: slow_engine.stats()["num_requests_running"] == 4)
    slow_engine.close()
    for thread in threads:
        thread.join(5)
    assert [type(r) for r in results] == [EngineClosed] * 4
    slow_engine.close()
    with pytest.raises(EngineClosed):
        slow_engine.generate("abc")
    assert not slow_engine._dispatcher._thread.is_alive()


async def test_close_ends_async_streams(slow_engine):
    stream = slow_engine.astream("abc", LONG)
    await anext(stream)
    await asyncio.to_thread(slow_engine.close)
    with pytest.raises(EngineClosed):
        async for _ in stream:
            pass


def test_a_dropped_engine_is_closed(make_engine, folder):
    engine = Engine(folder, tokenizer=fake_core.ByteTokenizer())
    thread, core = engine._dispatcher._thread, engine._core
    assert engine.generate("a").text == "A"
    del engine
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
    assert core._closed


def test_an_event_thread_that_fails_ends_the_requests(slow_engine, monkeypatch):
    stream = slow_engine.stream("abc", LONG)
    next(stream)
    monkeypatch.setattr(slow_engine.core, "poll", lambda timeout: 1 / 0)
    with pytest.raises(RuntimeError, match="event thread failed"):
        list(stream)
    with pytest.raises(EngineClosed):
        slow_engine.generate("a")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_use_after_fork_is_refused(engine):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            engine.generate("a")
            os.write(write, b"no error")
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert b"before a fork" in os.read(read, 1000)
    os.close(read)
    os.close(write)
    assert engine.generate("a").text == "A"


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a CI may start us with SIGINT ignored
sys.path[:0] = [{tests!r}, {source!r}]
import fake_core
fake_core.install()
fake_core.FakeEngine.step_seconds = 0.01
from astrai_rs import Engine, SamplingParams
engine = Engine({folder!r}, tokenizer=fake_core.ByteTokenizer())
long = SamplingParams(max_tokens=100000, ignore_eos=True)
"""


def python(code: str, folder: Path, **options) -> subprocess.Popen:
    import astrai_rs

    tests, source = str(Path(__file__).parent), str(Path(astrai_rs.__file__).parent.parent)
    script = SCRIPT.format(tests=tests, source=source, folder=str(folder)) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, **options)


def test_ctrl_c_stops_generate(folder):
    process = python(
        """
        print("ready", flush=True)
        try:
            engine.generate(["abc", "def"], long)
        except KeyboardInterrupt:
            print("interrupted", len(engine._core.aborts), engine.generate("ok").text)
        """,
        folder,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "interrupted 2 OK\n"
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    "code", ["stream = engine.stream('a', long); next(stream)", "pass", "engine.close()"]
)
def test_the_interpreter_exits_with_an_open_engine(folder, code):
    with python(code, folder) as process:
        assert process.wait(10) == 0


def test_progress(engine, capsys):
    seen = []
    engine.generate(["a", "b", "c"], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    engine.generate(["a", "b"], progress=True)
    assert "2/2 prompts" in capsys.readouterr().err


def test_an_exception_in_a_progress_function_aborts(slow_engine):
    def report(done, total):
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        slow_engine.generate(["a", "b"], [SamplingParams(max_tokens=1), LONG], progress=report)
    assert slow_engine._dispatcher._routes == {}, "at once, though the exception holds the frames"
    assert caught.value.args == ("mine",)


def test_bad_words_are_encoded_with_and_without_space(engine):
    engine.generate("abc", SamplingParams(bad_words=["xy"]))
    assert engine.core.submitted[-1][1]["bad_words"] == [list(b"xy")]


def test_max_tokens_none_fills_the_context(engine):
    engine.generate("abc", SamplingParams(max_tokens=None))
    assert engine.core.submitted[-1][1]["max_tokens"] == 512 - 3


def test_stop_ids_reach_the_core(make_engine):
    assert make_engine().core.options["eos_token_ids"] == [0]


def test_without_tokenizer(make_engine):
    engine = make_engine(tokenizer=None)
    assert engine.tokenizer is None
    out = engine.generate([97, 98], SamplingParams(logprobs=0))
    assert (out.text, out.token_ids) == ("", [65, 66, 0])
    assert out.logprobs[0][65].decoded_token is None
    for call in (
        lambda: engine.generate("text"),
        lambda: engine.generate([97], SamplingParams(stop="x")),
        lambda: engine.generate([97], SamplingParams(bad_words=["x"])),
        lambda: engine.chat([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(ValueError, match="tokenizer"):
            call()


def test_chat(make_engine, fixtures):
    from astrai_rs import AutoTokenizer

    engine = make_engine(tokenizer=AutoTokenizer.from_pretrained(fixtures / "tokenizers/glass-llama"))
    engine.core.reply = lambda prompt, sample: prompt[:2]
    out = engine.chat([{"role": "user", "content": "Once upon"}], SamplingParams(max_tokens=4))
    assert out.prompt_token_ids == engine.tokenizer.encode("Once upon ")
    both = engine.chat([[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]])
    assert [o.prompt_token_ids for o in both] == [
        engine.tokenizer.encode("a "),
        engine.tokenizer.encode("b "),
    ]
    with pytest.raises(ValueError, match="empty"):
        engine.chat([])


def test_repr(engine):
    assert "open" in repr(engine)
    engine.close()
    assert "closed" in repr(engine)
