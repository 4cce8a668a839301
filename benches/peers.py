"""Compares the engine with llama.cpp's own benches on the same file, alternating in one run.

    python benches/peers.py --model FILE.gguf --llama-bin DIR [--threads 2] [--rounds 5] [--tests decode]

Against ``llama-bench``: ``decode`` (128 tokens after a 1-token prompt), ``decode_4096`` (64 tokens after
4,096), ``prefill`` (512 tokens), ``prefill_4096``; against ``llama-batched-bench``: ``batch`` (32 requests of
128 tokens in, 64 out, in output tokens per second of the whole). Token ids are random, sampling is greedy,
prompts are computed anew in each measurement. Prints tokens per second of both (medians), the median of their
ratios, and ends with one JSON line.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from astrai_rs import Engine, SamplingParams, _core

DECODE_TOKENS, LONG_DECODE_TOKENS = 128, 64
PREFILL_TOKENS, LONG_TOKENS = 512, 4096
BATCH, BATCH_IN, BATCH_OUT = 32, 128, 64
TESTS = ["decode", "decode_4096", "prefill", "prefill_4096", "batch"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a GGUF file that both can read")
    parser.add_argument(
        "--llama-bin", type=Path, required=True, help="folder of llama-bench and llama-batched-bench"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tests", default=",".join(TESTS))
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


class Ours:
    """The measurements of this engine, each in tokens per second."""

    def __init__(self, model: str, threads: int, dtype: str) -> None:
        self.engine = Engine(model, num_threads=threads, dtype=dtype)
        self.vocab_size = self.engine.tokenizer.vocab_size
        self.random = random.Random(0)

    def prompt(self, length: int) -> list[int]:
        return [self.random.randrange(100, self.vocab_size) for _ in range(length)]

    def timed(self, prompts: list[list[int]], max_tokens: int) -> float:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        self.engine.clear_prefix_cache()
        start = time.perf_counter()
        self.engine.generate(prompts, params)
        return time.perf_counter() - start

    def decode(self) -> float:
        prompt = [self.prompt(1)]
        return DECODE_TOKENS / (self.timed(prompt, DECODE_TOKENS + 1) - self.timed(prompt, 1))

    def decode_4096(self) -> float:
        prompt = [self.prompt(LONG_TOKENS)]
        params = SamplingParams(max_tokens=LONG_DECODE_TOKENS + 1, temperature=0, ignore_eos=True)
        metrics = self.engine.generate(prompt, params)[0].metrics
        assert metrics is not None
        assert metrics.first_token_time is not None
        return LONG_DECODE_TOKENS / (metrics.finished_time - metrics.first_token_time)

    def prefill(self) -> float:
        return PREFILL_TOKENS / self.timed([self.prompt(PREFILL_TOKENS)], 1)

    def prefill_4096(self) -> float:
        return LONG_TOKENS / self.timed([self.prompt(LONG_TOKENS)], 1)

    def batch(self) -> float:
        prompts = [self.prompt(BATCH_IN) for _ in range(BATCH)]
        return BATCH * BATCH_OUT / self.timed(prompts, BATCH_OUT)


class Llama:
    """The same measurements by llama.cpp's tools."""

    def __init__(self, model: str, binaries: Path, threads: int) -> None:
        self.model, self.binaries, self.threads = model, binaries, str(threads)

    def run(self, tool: str, *arguments: str) -> str:
        command = [str(self.binaries / tool), "-m", self.model, "-t", self.threads, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def bench(self, *arguments: str) -> float:
        return float(json.loads(self.run("llama-bench", "-r", "1", "-o", "json", *arguments))[0]["avg_ts"])

    def decode(self) -> float:
        return self.bench("-p", "0", "-n", str(DECODE_TOKENS))

    def decode_4096(self) -> float:
        return self.bench("-p", "0", "-n", str(LONG_DECODE_TOKENS), "-d", str(LONG_TOKENS))

    def prefill(self) -> float:
        return self.bench("-p", str(PREFILL_TOKENS), "-n", "0")

    def prefill_4096(self) -> float:
        return self.bench("-p", str(LONG_TOKENS), "-n", "0")

    def batch(self) -> float:
        sizes = ["-npp", str(BATCH_IN), "-ntg", str(BATCH_OUT), "-npl", str(BATCH)]
        output = self.run("llama-batched-bench", "-c", "8192", "-b", "2048", "-ub", "512", *sizes)
        rows = [line.split("|") for line in output.splitlines() if line.startswith(f"| {BATCH_IN:>5}")]
        return BATCH * BATCH_OUT / float(rows[0][9])


def alternate(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> dict[str, float]:
    ours()  # warms caches and page tables, as llama-bench's own warm-up does
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    us, them = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return {"ours": round(us, 1), "llama.cpp": round(them, 1), "ratio": round(ratio, 3)}


def main() -> None:
    arguments = parse_arguments()
    ours = Ours(arguments.model, arguments.threads, arguments.dtype)
    llama = Llama(arguments.model, arguments.llama_bin, arguments.threads)
    results: dict[str, object] = {}
    for test in arguments.tests.split(","):
        result = alternate(getattr(ours, test), getattr(llama, test), arguments.rounds)
        print(
            f"{test:12} {result['ours']:>9} tok/s",
            f"llama.cpp {result['llama.cpp']:>9} tok/s",
            f"{result['ratio']}x",
            sep="   ",
            flush=True,
        )
        results[test] = result
    conditions = {
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "machine": f"{os.cpu_count()} cpus, {_core.system_info()['tier']}",
    }
    ours.engine.close()
    print(json.dumps({**conditions, **results}))


if __name__ == "__main__":
    main()
