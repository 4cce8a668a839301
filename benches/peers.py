"""Compares the engine with llama.cpp's own benches, and OpenVINO, on the same file, alternating in one run.

    python benches/peers.py --model FILE.gguf --llama-bin DIR [--threads 2] [--rounds 5] [--tests decode]

Against ``llama-bench``: ``decode`` (128 tokens after a 1-token prompt), ``decode_4096`` (64 tokens after
4,096), ``prefill`` (512 tokens), ``prefill_4096``; against ``llama-batched-bench``: ``batch`` (32 requests of
128 tokens in, 64 out, in output tokens per second of the whole). Where ``openvino_genai`` is installed and
reads the file, the same against it. Token ids are random, sampling is greedy, prompts are computed anew in
each measurement. Prints tokens per second (medians) and the medians of the ratios to each, and ends with one
JSON line.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from astrai_rs import Engine, SamplingParams, _core

try:
    import numpy
    import openvino
    import openvino_genai
except ImportError:
    openvino_genai = None

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
    arguments = parser.parse_args()
    if unknown := set(arguments.tests.split(",")) - set(TESTS):
        parser.error(f"--tests must be of {', '.join(TESTS)}; given: {', '.join(sorted(unknown))}")
    return arguments


class Timed(ABC):
    """The measurements of an engine in Python, each in tokens per second."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.random = random.Random(0)

    @abstractmethod
    def timed(self, prompts: list[list[int]], max_tokens: int) -> float:
        """Seconds until all prompts have so many tokens."""

    def prompt(self, length: int) -> list[int]:
        return [self.random.randrange(100, self.vocab_size) for _ in range(length)]

    def decode(self) -> float:
        prompt = [self.prompt(1)]
        return DECODE_TOKENS / (self.timed(prompt, DECODE_TOKENS + 1) - self.timed(prompt, 1))

    @abstractmethod
    def decode_4096(self) -> float: ...

    def prefill(self) -> float:
        return PREFILL_TOKENS / self.timed([self.prompt(PREFILL_TOKENS)], 1)

    def prefill_4096(self) -> float:
        return LONG_TOKENS / self.timed([self.prompt(LONG_TOKENS)], 1)

    def batch(self) -> float:
        prompts = [self.prompt(BATCH_IN) for _ in range(BATCH)]
        return BATCH * BATCH_OUT / self.timed(prompts, BATCH_OUT)


class Ours(Timed):
    def __init__(self, model: str, threads: int, dtype: str) -> None:
        self.engine = Engine(model, num_threads=threads, dtype=dtype)
        super().__init__(self.engine.tokenizer.vocab_size)

    def timed(self, prompts: list[list[int]], max_tokens: int) -> float:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        self.engine.clear_prefix_cache()
        start = time.perf_counter()
        self.engine.generate(prompts, params)
        return time.perf_counter() - start

    def decode_4096(self) -> float:
        prompt = [self.prompt(LONG_TOKENS)]
        params = SamplingParams(max_tokens=LONG_DECODE_TOKENS + 1, temperature=0, ignore_eos=True)
        metrics = self.engine.generate(prompt, params)[0].metrics
        assert metrics is not None
        assert metrics.first_token_time is not None
        return LONG_DECODE_TOKENS / (metrics.finished_time - metrics.first_token_time)


class OpenVino(Timed):
    def __init__(self, model: str, threads: int, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, openvino_genai.SchedulerConfig(), "CPU", {"INFERENCE_NUM_THREADS": threads}
        )

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[Any]:
        config = openvino_genai.GenerationConfig(max_new_tokens=max_tokens, ignore_eos=True, do_sample=False)
        tensors = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        return self.pipeline.generate(tensors, [config] * len(tensors))

    def timed(self, prompts: list[list[int]], max_tokens: int) -> float:
        start = time.perf_counter()
        self.generate(prompts, max_tokens)
        return time.perf_counter() - start

    def decode_4096(self) -> float:
        result = self.generate([self.prompt(LONG_TOKENS)], LONG_DECODE_TOKENS + 1)[0]
        return 1000 / float(result.perf_metrics.get_tpot().mean)


class Llama:
    """The same measurements by llama.cpp's tools."""

    def __init__(self, model: str, binaries: Path, threads: int) -> None:
        self.model, self.binaries, self.threads = model, binaries, str(threads)
        self.build = self.results("-p", "1", "-n", "0")["build_commit"]

    def run(self, tool: str, *arguments: str) -> str:
        command = [str(self.binaries / tool), "-m", self.model, "-t", self.threads, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def results(self, *arguments: str) -> dict[str, Any]:
        return json.loads(self.run("llama-bench", "-r", "1", "-o", "json", *arguments))[0]

    def bench(self, *arguments: str) -> float:
        return float(self.results(*arguments)["avg_ts"])

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


def alternate(test: str, engines: dict[str, Any], rounds: int) -> dict[str, float]:
    """Medians of all, and of the ratios of the first to each other one: ``ratio`` to the second."""
    runs = {name: getattr(engine, test) for name, engine in engines.items()}
    ours, llama, *_ = engines
    for name, run in runs.items():
        if name != llama:  # whose bench does so itself
            run()  # warms caches and page tables
    rates = [{name: run() for name, run in runs.items()} for _ in range(rounds)]
    result = {name: round(statistics.median(rate[name] for rate in rates), 1) for name in runs}
    for name in list(runs)[1:]:
        ratio = statistics.median(rate[ours] / rate[name] for rate in rates)
        result["ratio" if name == llama else f"ratio to {name}"] = round(ratio, 3)
    return result


def openvino_of(arguments: argparse.Namespace, vocab_size: int) -> dict[str, OpenVino]:
    """Nothing where it is not installed, or does not read the file."""
    if openvino_genai is None:
        return {}
    try:
        return {"openvino": OpenVino(arguments.model, arguments.threads, vocab_size)}
    except RuntimeError as error:
        print(f"openvino does not read the file: {str(error).strip().splitlines()[-1]}")
        return {}


def processor() -> str:
    """Its name, family and model, where Linux tells."""
    if not Path("/proc/cpuinfo").exists():
        return platform.processor()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    return " ".join(facts.get(key, "") for key in ("model name", "cpu family", "model")).strip()


def main() -> None:
    arguments = parse_arguments()
    ours = Ours(arguments.model, arguments.threads, arguments.dtype)
    llama = Llama(arguments.model, arguments.llama_bin, arguments.threads)
    engines = {"ours": ours, "llama.cpp": llama, **openvino_of(arguments, ours.vocab_size)}
    results = {}
    for test in arguments.tests.split(","):
        results[test] = alternate(test, engines, arguments.rounds)
        figures = (f"{name} {value}" for name, value in results[test].items())
        print(f"{test:12}", *figures, sep="   ", flush=True)
    info = _core.system_info()
    conditions = {
        "version": info["version"],
        "llama.cpp build": llama.build,
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "machine": f"{os.cpu_count()} cpus, {info['tier']}",
        "processor": processor(),
    }
    ours.engine.close()
    print(json.dumps({**conditions, **results}))


if __name__ == "__main__":
    main()
