"""`astrai-rs bench latency | throughput | serve`: with the keys of vLLM's benches in their JSON."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from astrai_rs.cli.common import (
    USAGE,
    Model,
    fail,
    model_name,
    open_engine,
    takes_engine_options,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from astrai_rs.engine import Engine

app = typer.Typer(help="Measure speed.", no_args_is_help=True, rich_markup_mode=None)

InputLen = Annotated[int, typer.Option(help="Tokens of each prompt; they are random.", min=1)]
OutputLen = Annotated[int, typer.Option(help="Tokens to generate for each prompt.", min=1)]
OutputJson = Annotated[Path | None, typer.Option("--output-json", help="Write the result to this file, too.")]
BenchSeed = Annotated[int, typer.Option("--seed", help="Of the prompts.")]

_PERCENTILES = (10, 25, 50, 75, 90, 99)


@app.command()
@takes_engine_options
def latency(
    model: Model = None,
    input_len: InputLen = 32,
    output_len: OutputLen = 128,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.", min=1)] = 1,
    num_iters: Annotated[int, typer.Option(help="Measurements.", min=1)] = 10,
    num_iters_warmup: Annotated[int, typer.Option(help="Runs before them.", min=0)] = 2,
    seed: BenchSeed = 0,
    output_json: OutputJson = None,
    *,
    options: dict[str, Any],
) -> None:
    """Time from a batch of prompts to its last token."""
    from rich.console import Console
    from rich.progress import track

    _check_writable(output_json)
    with open_engine(model, options) as engine:
        _check_fits(engine, input_len, output_len)
        latencies, generated = [], []
        console = Console(stderr=True)
        for index in track(range(num_iters_warmup + num_iters), "measuring", console=console):
            prompts = _prompts(engine, batch_size, input_len, seed + index)
            start = time.perf_counter()
            generated.append(_generate(engine, prompts, output_len))
            latencies.append(time.perf_counter() - start)
        latencies, generated = latencies[num_iters_warmup:], generated[num_iters_warmup:]
        result = {
            **_conditions(engine, model),
            "input_len": input_len,
            "output_len": output_len,
            "batch_size": batch_size,
            "avg_latency": statistics.fmean(latencies),
            "latencies": latencies,
            "percentiles": {str(p): percentile(latencies, p) for p in _PERCENTILES},
            "output_throughput": statistics.fmean(generated) / statistics.median(latencies),
        }
    _report(result, output_json)


@app.command()
@takes_engine_options
def throughput(
    model: Model = None,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    num_prompts: Annotated[int, typer.Option(help="Prompts, all submitted at once.", min=1)] = 64,
    seed: BenchSeed = 0,
    output_json: OutputJson = None,
    *,
    options: dict[str, Any],
) -> None:
    """Tokens per second of many prompts together."""
    _check_writable(output_json)
    with open_engine(model, options) as engine:
        _check_fits(engine, input_len, output_len)
        _generate(engine, _prompts(engine, 1, input_len, seed - 1), 8)
        prompts = _prompts(engine, num_prompts, input_len, seed)
        start = time.perf_counter()
        generated = _generate(engine, prompts, output_len, progress=True)
        seconds = time.perf_counter() - start
        total = num_prompts * input_len + generated
        result = {
            **_conditions(engine, model),
            "input_len": input_len,
            "output_len": output_len,
            "num_requests": num_prompts,
            "elapsed_time": seconds,
            "total_num_tokens": total,
            "requests_per_second": num_prompts / seconds,
            "tokens_per_second": total / seconds,
            "output_throughput": generated / seconds,
        }
    _report(result, output_json)


@app.command()
def serve(
    base_url: Annotated[str, typer.Option(help="Of any OpenAI-compatible server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the server's first.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="ASTRAI_API_KEY", help="For the server.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Requests.", min=1)] = 100,
    random_input_len: InputLen = 128,
    random_output_len: OutputLen = 64,
    request_rate: Annotated[
        float, typer.Option(help="Requests per second, with random gaps; inf sends all at once.", min=0.001)
    ] = float("inf"),
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson; below: bursts; above: even.", min=0.01, max=1e6)
    ] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Most requests at once.", min=1)] = None,
    seed: BenchSeed = 0,
    output_json: OutputJson = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the latencies to this .svg file.")] = None,
) -> None:
    """Load a server with streams, and measure what its users feel."""
    from astrai_rs.cli.load import Load, plot_svg

    _check_writable(output_json, plot)
    url = urlsplit(base_url)
    if url.scheme not in {"http", "https"} or not url.hostname:
        fail(f"--base-url must be http://… or https://… and name a host; given: {base_url!r}", USAGE)
    if plot is not None and plot.suffix != ".svg":
        fail(f"--plot writes .svg files; given: {plot}", USAGE)
    load = Load(
        base_url=base_url.rstrip("/").removesuffix("/v1"),
        model=model,
        api_key=api_key,
        num_prompts=num_prompts,
        lengths=(random_input_len, random_output_len),
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        seed=seed,
    )
    result = load.run()
    _report(result, output_json)
    if plot is not None:
        plot.write_text(plot_svg(load.samples), encoding="utf-8")


def percentile(values: Sequence[float], p: float) -> float:
    """By linear interpolation, as numpy's."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * p / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _prompts(engine: Engine, count: int, length: int, seed: int) -> list[list[int]]:
    """Random ids: no two share a beginning that the prefix cache could give."""
    rng = random.Random(seed)
    return [[rng.randrange(engine.vocab_size) for _ in range(length)] for _ in range(count)]


def _generate(engine: Engine, prompts: list[list[int]], tokens: int, *, progress: bool = False) -> int:
    """Says how many tokens were generated."""
    from astrai_rs.request import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return sum(len(output.token_ids) for output in engine.generate(prompts, params, progress=progress))


def _check_fits(engine: Engine, input_len: int, output_len: int) -> None:
    """Else sequences end early. The cache holds max_model_len, as the commands give it no size of its own."""
    if input_len + output_len > engine.max_model_len:
        fail(
            "--input-len + --output-len must be at most the engine's max_model_len of "
            f"{engine.max_model_len} tokens; given: {input_len} + {output_len} = {input_len + output_len}",
            USAGE,
        )


def _check_writable(*paths: Path | None) -> None:
    """Before minutes of measuring."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            fail(f"{path} is a folder; a file is to be written", USAGE)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            fail(f"{path} cannot be written", USAGE)


def _conditions(engine: Engine, model: str | None) -> dict[str, Any]:
    """What a figure means nothing without."""
    import platform
    from datetime import UTC, datetime

    from astrai_rs import _core

    info = _core.system_info()
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "astrai_rs",
        "version": _core.__version__,
        "model_id": model_name(model),
        "device": engine.device,
        "dtype": engine.dtype,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "num_threads": engine.num_threads,
        "simd": info["tier"],
        "machine": platform.machine(),
    }


def _report(result: dict[str, Any], output_json: Path | None) -> None:
    """A table on stderr, one JSON line on stdout."""
    shown = {name: value for name, value in result.items() if not isinstance(value, (list, dict))}
    width = max(map(len, shown))
    for name, value in shown.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        sys.stderr.write(f"{name:{width}}  {text}\n")
    line = json.dumps(result)
    sys.stdout.write(line + "\n")
    if output_json is not None:
        output_json.write_text(line + "\n", encoding="utf-8")
