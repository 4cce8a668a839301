"""`astrai-rs bench` with the story model, and with servers that break off."""

from __future__ import annotations

import asyncio
import json
from xml.etree import ElementTree

import pytest

from astrai_rs import Engine
from astrai_rs.cli import bench
from astrai_rs.cli.load import Load
from command_line import run
from conftest import GLASS
from serving import serving


@pytest.mark.parametrize("command", ["latency", "throughput"])
def test_bench(command, tmp_path):
    options = {"latency": ("--num-iters", 2), "throughput": ("--num-prompts", 3)}[command]
    file = tmp_path / "result.json"
    arguments = ("--input-len", 8, "--output-len", 4, *options, "--output-json", file)
    code, out, _ = run("bench", command, *arguments)
    result = json.loads(out)
    assert code == 0
    assert result == json.loads(file.read_text())
    assert (result["input_len"], result["output_len"], result["backend"]) == (8, 4, "astrai_rs")
    if command == "latency":
        assert result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 2)
        assert result["percentiles"]["50"] == pytest.approx(result["avg_latency"])
    else:
        assert result["total_num_tokens"] == 3 * 12
        assert result["requests_per_second"] == pytest.approx(3 / result["elapsed_time"])


@pytest.mark.parametrize("command", ["latency", "throughput"])
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((100, 64), "at most the engine's max_model_len of 128 tokens; given: 100 + 64 = 164"),
        ((20, 13, "--max-model-len", 32), "max_model_len of 32 tokens; given: 20 + 13 = 33"),
    ],
    ids=["the model's", "--max-model-len"],
)
def test_bench_refuses_more_tokens_than_fit(command, lengths, message):
    input_len, output_len, *options = lengths
    code, out, err = run("bench", command, "--input-len", input_len, "--output-len", output_len, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("astrai-rs: error: --input-len + --output-len must be ")
    assert message in err


@pytest.mark.parametrize("command", ["latency", "throughput"])
def test_bench_counts_what_was_generated(command, monkeypatch, capsys):
    """A cache of 32 tokens ends sequences at 33, of which 8 are the prompt's."""
    engine = Engine(GLASS, max_model_len=128, kv_cache_tokens=32)
    monkeypatch.setattr(bench, "open_engine", lambda model, options: engine)
    options = {"latency": ("--num-iters", "1"), "throughput": ("--num-prompts", "2")}[command]
    lengths = ("--input-len", "8", "--output-len", "40")
    bench.app([command, "--model", str(GLASS), *lengths, *options], standalone_mode=False)
    result = json.loads(capsys.readouterr().out)
    if command == "latency":
        assert result["output_throughput"] == pytest.approx(25 / result["avg_latency"])
    else:
        assert result["total_num_tokens"] == 2 * 33
        assert result["output_throughput"] == pytest.approx(2 * 25 / result["elapsed_time"])


def test_bench_serve(tmp_path):
    plot = tmp_path / "plot.svg"
    load = ("--num-prompts", 6, "--random-input-len", 8, "--random-output-len", 5, "--plot", plot)
    with Engine(GLASS) as engine, serving(engine, api_keys=("key",)) as (url, _):
        code, out, _ = run("bench", "serve", "--base-url", url, "--api-key", "key", *load, model=None)
        assert code == 0
        result = json.loads(out)
        assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 30)
        assert (result["total_input_tokens"], result["model_id"]) == (48, "test")
        for name in ("ttft", "tpot", "itl", "e2el"):
            assert result[f"median_{name}_ms"] > 0
        assert result["mean_e2el_ms"] > result["mean_ttft_ms"]
        ElementTree.parse(plot)
        code, _, err = run("bench", "serve", "--base-url", url, model=None)
        assert (code, "401" in err, err.count("\n")) == (2, True, 1)
    code, _, err = run("bench", "serve", "--base-url", "http://127.0.0.1:1", model=None)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("astrai-rs: error: http://127.0.0.1:1: ")


async def test_bench_serve_counts_broken_streams_as_failed():
    token = b'data: {"choices": [{"text": "a"}]}\n\n'
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n'
    done = b"data: [DONE]\n\n"
    no_end = "the stream ended without [DONE]"
    streams = [
        (token + token + usage + done, ""),
        (b"", no_end),
        (token, no_end),
        (token + token + usage, no_end),
        (token + token[:-9], no_end),
        (token + done, "the stream's usage is missing or counts no tokens"),
        (usage + done, "the stream gave no tokens"),
    ]
    bodies = iter([body for body, _ in streams])

    async def answer(reader, writer):
        await reader.readuntil(b"}}")  # the end of the request: closing before it would reset the connection
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + next(bodies))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        load = Load(
            base_url=f"http://127.0.0.1:{port}",
            model="test",
            api_key=None,
            num_prompts=len(streams),
            lengths=(4, 2),
            request_rate=float("inf"),
            burstiness=1.0,
            max_concurrency=1,
            seed=0,
        )
        result = await asyncio.to_thread(load.run)
    assert [sample.error for sample in load.samples] == [error for _, error in streams]
    good = load.samples[0]
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (1, 6, 2)
    assert result["mean_ttft_ms"] == good.ttft * 1e3 > 0
    assert result["mean_e2el_ms"] == good.latency * 1e3
