"""The engine on a GPU, beside what the GPU can do and what transformers makes of it.

    python benches/gpu.py [--parts kernels,decode,…] [--kernels dist/gpu/kernels] [--out benches/results]

A 1 B model in the shape of AstrAI's (vocabulary 100000, hidden 1536, 24 layers, feed-forward 6912, 24 query
and 4 key/value heads, bf16) with random weights, made on the spot. Rates stand beside the bandwidth of a
copy and the rate of a large bf16 matrix product, both measured first, with torch. What is compared
alternates, and each figure is a median. Writes `gpu-DEVICE.json` and `gpu-DEVICE.md` after every part.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from astrai_rs import Engine, SamplingParams
from random_model import ASTRAI_1B, TINY, Shape, write_model

L20_BANDWIDTH = 864e9
ASTRAI_ON_L20 = {1: 242.6, 8: 1286.6}
"""Tokens per second that AstrAI publishes, by batch: prompt 512, 128 tokens out."""


class Bench:
    """Measures one part after the other into `results`."""

    def __init__(self, folder: Path, shape: Shape, sizes: dict[str, Any], kernels: Path) -> None:
        self.folder, self.shape, self.sizes, self.kernels_path = folder, shape, sizes, kernels
        self.results: dict[str, Any] = {}
        self.rng = random.Random(0)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return [[self.rng.randrange(3, self.shape.vocab) for _ in range(length)] for _ in range(count)]

    def engine(self, **options: Any) -> Engine:
        settings = {"device": "cuda", "dtype": "bfloat16", "enable_prefix_caching": False}
        return Engine(self.folder, **(settings | {"gpu_memory_utilization": 0.5} | options))

    def of_bandwidth(self, seconds: float, num_bytes: float) -> float | None:
        limits = self.results.get("limits")
        return num_bytes / seconds / limits["copy_bytes_per_s"] if limits else None

    def limits(self) -> dict[str, Any]:
        import torch

        device, repeat = torch.device(self.sizes["torch_device"]), self.sizes["repeat"]
        data = torch.randn(self.sizes["copy"], device=device)
        other = torch.empty_like(data)
        a, b = (
            torch.randn(self.sizes["matmul"], self.sizes["matmul"], device=device).bfloat16() for _ in "ab"
        )
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        copy = _seconds(lambda: other.copy_(data), wait, repeat)
        matmul = _seconds(lambda: a @ b, wait, repeat)
        return {
            "copy_bytes_per_s": 2 * data.nbytes / copy,
            "matmul_flops": 2 * self.sizes["matmul"] ** 3 / matmul,
        }

    def kernels(self) -> dict[str, Any]:
        """`cargo bench --bench kernels` on the GPU, with the products' share of the peak, and how much slower
        they are than where their sums depend on the batch."""
        report, free = self._kernels("fixed"), self._kernels("free")
        for name, op in report["ops"].items():
            if name.startswith("linear"):
                op["cost_of_invariance"] = free["ops"][name]["rate"] / op["rate"] - 1
        peak = self.results.get("limits", {}).get("matmul_flops")
        for op in report["ops"].values():
            if op["unit"] == "GMAC/s" and peak:
                op["of_limit"] = op["rate"] * 2e9 / peak
        return report

    def _kernels(self, sums: str) -> dict[str, Any]:
        environment = os.environ | {"ASTRAI_DEVICE": "cuda", "ASTRAI_SUMS": sums}
        done = subprocess.run(
            [self.kernels_path], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return report

    def decode(self) -> dict[str, Any]:
        """Steps of 1 … 256 sequences, of 16 to 144 tokens."""
        figures = {}
        with self.engine(max_num_batched_tokens=8192) as engine:
            for batch in self.sizes["batches"]:
                step = statistics.median(self._step_seconds(engine, batch) for _ in range(3))
                context = 16 + self.sizes["out"] / 2
                read = 2 * self.shape.step_weights + batch * context * self.shape.kv_bytes_per_token
                figures[str(batch)] = {
                    "tokens_per_s": batch / step,
                    "step_ms": step * 1e3,
                    "of_bandwidth": self.of_bandwidth(step, read),
                }
        return figures

    def _step_seconds(self, engine: Engine, batch: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=self.sizes["out"], ignore_eos=True)
        before = engine.stats()["steps"]
        outputs = engine.generate(self.prompts(batch, 16), params)
        total = engine.stats()["steps"] - before
        # From when all are running to when the first is done.
        start = max(output.metrics.first_token_time for output in outputs)
        end = min(output.metrics.finished_time for output in outputs)
        # They start some steps apart. The last one ends with step `total`, so it began with
        # `total - out + 1`; the first one began with step 1, so it ends with `out`.
        steps = 2 * self.sizes["out"] - 1 - total
        if steps < 1:
            sys.exit(f"of {batch} sequences one was done before all were running")
        return (end - start) / steps

    def prefill(self) -> dict[str, Any]:
        figures, first = {}, SamplingParams(temperature=0, max_tokens=1)
        with self.engine(max_num_batched_tokens=8192) as engine:
            for length in self.sizes["prompts"]:
                prompts = [self.prompts(1, length) for _ in range(6)]
                engine.generate(prompts.pop(), first)
                seconds = statistics.median(
                    _time(lambda prompt=prompt: engine.generate(prompt, first)) for prompt in prompts
                )
                attention = 2 * self.shape.layers * self.shape.heads * self.shape.head_dim * length**2
                flops = 2 * self.shape.layers * self.shape.layer_weights * length + attention
                peak = self.results.get("limits", {}).get("matmul_flops")
                figures[str(length)] = {
                    "tokens_per_s": length / seconds,
                    "of_matmul_peak": flops / seconds / peak if peak else None,
                }
        return figures

    def recipe(self) -> dict[str, Any]:
        """AstrAI's: prompt 512, 128 tokens out, the whole call timed."""
        figures = {}
        out = self.sizes["out"]
        params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
        with self.engine() as engine:
            for batch, published in ASTRAI_ON_L20.items():
                prompts = self.prompts(batch, self.sizes["recipe_prompt"])
                engine.generate(prompts, params)
                seconds = statistics.median(
                    _time(lambda p=prompts: engine.generate(p, params)) for _ in range(3)
                )
                rate = batch * out / seconds
                per_sequence = rate / batch * 2 * self.shape.step_weights
                limit = self.results.get("limits", {}).get("copy_bytes_per_s")
                figures[str(batch)] = {
                    "tokens_per_s": rate,
                    "of_bandwidth": per_sequence / limit if limit else None,
                    "published_on_l20": published,
                    "published_of_bandwidth": published / batch * 2 * self.shape.step_weights / L20_BANDWIDTH,
                }
        return figures

    def load(self) -> dict[str, Any]:
        """256 requests of random lengths at once: ours and transformers' continuous batching, in turns."""
        count, longest, out = self.sizes["requests"], self.sizes["longest"], self.sizes["out"]
        prompts = [self.prompts(1, self.rng.randrange(longest // 8, longest))[0] for _ in range(count)]
        params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
        with self.engine(gpu_memory_utilization=0.4) as engine:
            theirs = self._transformers()

            def continuous() -> None:
                results = theirs.model.generate_batch(prompts, theirs.greedy(out), **theirs.batching)
                tokens = sum(len(result.generated_tokens) for result in results.values())
                if tokens != count * out:
                    sys.exit(f"transformers gave {tokens} tokens, not {count * out}")

            return _ratio(count * out, lambda: engine.generate(prompts, params), continuous)

    def static(self) -> dict[str, Any]:
        """One sequence: ours and transformers' static cache with a compiled step, in turns."""
        out = self.sizes["out"]
        (prompt,) = self.prompts(1, self.sizes["recipe_prompt"])
        params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
        with self.engine(gpu_memory_utilization=0.4) as engine:
            theirs = self._transformers()

            def compiled() -> None:
                config = theirs.greedy(out, cache_implementation="static", min_new_tokens=out)
                ids = theirs.tensor([prompt])
                result = theirs.model.generate(ids, config, attention_mask=ids.new_ones(ids.shape))
                if result.shape[1] != len(prompt) + out:
                    sys.exit(f"transformers gave {result.shape[1] - len(prompt)} tokens, not {out}")

            return _ratio(out, lambda: engine.generate([prompt], params), compiled)

    def _transformers(self) -> "Transformers":
        return Transformers(self.folder, self.sizes["torch_device"])

    def start(self) -> dict[str, Any]:
        """A new process: import, engine, first token; the file is in the page cache."""
        code = (
            "import sys, time; begin = time.monotonic()\n"
            "from astrai_rs import Engine, SamplingParams\n"
            "with Engine(sys.argv[1], device='cuda', gpu_memory_utilization=0.5) as engine:\n"
            "    engine.generate([5, 6, 7], SamplingParams(max_tokens=1))\n"
            "    print(time.monotonic() - begin)\n"
        )
        command = [sys.executable, "-c", code, str(self.folder)]
        runs = [float(subprocess.check_output(command, text=True)) for _ in range(4)]
        return {"first_s": runs[0], "seconds": statistics.median(runs[1:])}


class Transformers:
    """The same checkpoint in transformers."""

    def __init__(self, folder: Path, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        self.device, self._config, self._torch = device, GenerationConfig, torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        self.batching: dict[str, Any] = {"persistent_manager": True}
        if importlib.util.find_spec("transformers.generation.continuous_batching"):
            from transformers import ContinuousBatchingConfig

            self.batching["continuous_batching_config"] = ContinuousBatchingConfig(max_memory_percent=0.4)

    def greedy(self, out: int, **more: Any) -> Any:
        """Greedy, for `out` tokens, whatever they are."""
        return self._config(do_sample=False, max_new_tokens=out, eos_token_id=-1, pad_token_id=0, **more)

    def tensor(self, ids: list[list[int]]) -> Any:
        return self._torch.tensor(ids, device=self.device)


def _time(call: Callable[[], object]) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


def _seconds(call: Callable[[], object], wait: Callable[[], object], repeat: int) -> float:
    """Of one call, when many are queued: the median of several rounds."""

    def round_() -> None:
        for _ in range(repeat):
            call()
        wait()

    round_()
    return statistics.median(_time(round_) for _ in range(5)) / repeat


def _ratio(tokens: int, ours: Callable[[], object], theirs: Callable[[], object]) -> dict[str, Any]:
    ours(), theirs()  # warm both up
    times = [(_time(ours), _time(theirs)) for _ in range(3)]
    mine, other = (statistics.median(each) for each in zip(*times, strict=True))
    return {"tokens_per_s": tokens / mine, "transformers_tokens_per_s": tokens / other, "ratio": other / mine}


FULL = {
    "torch_device": "cuda",
    "repeat": 20,
    "copy": 1 << 28,
    "matmul": 8192,
    "batches": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "out": 128,
    "prompts": [512, 1024, 2048, 4096, 8192, 16384],
    "recipe_prompt": 512,
    "requests": 256,
    "longest": 1024,
}
SMALL = FULL | {
    "torch_device": "cpu",
    "repeat": 1,
    "copy": 1 << 20,
    "matmul": 256,
    "batches": [1, 3],
    "out": 4,
    "prompts": [64],
    "recipe_prompt": 16,
    "requests": 4,
    "longest": 32,
}
"""To try this file itself, on an emulated GPU."""

PARTS = ["limits", "kernels", "start", "decode", "prefill", "recipe", "static", "load"]


def table(results: dict[str, Any]) -> str:
    """Every figure in Markdown, a table for each part."""
    lines = [f"# {results['device']}", ""]
    lines += [f"- {name}: {results[name]}" for name in ("driver", "versions", "date") if name in results]
    for part in PARTS:
        if part not in results:
            continue
        rows = results[part]["ops"] if part == "kernels" else results[part]
        if not all(isinstance(row, dict) for row in rows.values()):
            rows = {"": rows}
        columns = list(next(iter(rows.values())))
        lines += [
            "",
            f"## {part}",
            "",
            "| | " + " | ".join(columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for name, row in rows.items():
            lines.append(f"| {name} | " + " | ".join(_short(row.get(column)) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def device() -> dict[str, Any]:
    """What the figures were measured on and with."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        name, driver = subprocess.check_output(query, text=True).splitlines()[0].split(", ")
    except (FileNotFoundError, subprocess.CalledProcessError):
        name, driver = "emulated", "emulated"
    versions = {}
    for package in ("astrai_rs", "torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"device": name, "driver": driver, "versions": versions, "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in this order")
    parser.add_argument("--kernels", type=Path, default=Path("dist/gpu/kernels"), help="the compiled bench")
    parser.add_argument("--out", type=Path, default=Path("benches/results"))
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the bench itself")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts must be of {', '.join(PARTS)}; given: {', '.join(sorted(unknown))}")
    shape, sizes = (TINY, SMALL) if arguments.small else (ASTRAI_1B, FULL)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape)
        bench = Bench(Path(folder), shape, sizes, arguments.kernels)
        conditions = device()
        name = conditions["device"].replace(" ", "-").lower()
        earlier = arguments.out / f"gpu-{name}.json"
        if earlier.exists():
            found = json.loads(earlier.read_text())
            # Parts of an earlier call, where nothing else differs.
            bench.results |= found if conditions.items() <= found.items() else {}
        bench.results |= conditions
        for part in (part for part in PARTS if part in parts):
            begin = time.monotonic()
            bench.results[part] = getattr(bench, part)()
            print(f"{part}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
            (arguments.out / f"gpu-{name}.json").write_text(json.dumps(bench.results, indent=1) + "\n")
            (arguments.out / f"gpu-{name}.md").write_text(table(bench.results))
    print(table(bench.results))


if __name__ == "__main__":
    main()
