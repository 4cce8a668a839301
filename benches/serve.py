"""Loads `astrai-rs serve` with many streams, some of which leave, against the engine's own `generate`.

    python benches/serve.py [--model FILE] [--streams 256] [--seconds 120] [--leave 0.2] [--threads 2]

Server and engine run alternately in processes of their own, on the same requests: prompts of 16 to 128
random tokens, 64 tokens out. A client reads each stream; a share of them hangs up at random. Prints output
tokens per second of both and their ratio, hung clients, what is left in the server, its memory over time,
and the time per token of one stream while 1,000-token prompts arrive. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from astrai_rs import Engine, SamplingParams
from astrai_rs.model import embedded_model

OUT = 64
HANG_S = 60.0
"""A stream that gives nothing for so long hangs."""


def random_prompt(rng: random.Random, tokens: int | None = None) -> list[int]:
    return [rng.randrange(3, 1000) for _ in range(tokens or rng.randrange(16, 129))]


class Server:
    """`astrai-rs serve` on a port of its own."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "astrai_rs", "serve", "--port", "0", "--model", arguments.model]
        command += ["--threads", str(arguments.threads), "--max-queued", "10000"]
        command += ["--kv-cache-tokens", str(arguments.kv_cache_tokens)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = next(line for line in self.process.stderr if " on http" in line)
        self.port = int(line.rsplit(":", 1)[1])
        # The rest of the log must be read, or the server waits for it.
        self._log = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)

    def memory_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * 4096 / 2**20

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


async def ask(port: int, method: str, path: str, body: dict | None = None) -> tuple:
    """`(reader, writer)` of an answer whose head has been read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    while (await reader.readline()).strip():
        pass
    return reader, writer


async def stats(port: int) -> dict:
    reader, writer = await ask(port, "GET", "/stats")
    text = (await reader.read()).decode()
    writer.close()
    return json.loads(text)


class Load:
    """Keeps a number of streams open until the time is over."""

    def __init__(self, server: Server, arguments: argparse.Namespace) -> None:
        self.server, self.arguments = server, arguments
        self.tokens = self.left = self.hung = self.complete = 0
        self.rng = random.Random(1)
        self.end = time.monotonic() + arguments.seconds
        self.memory: list[float] = []

    async def run(self) -> None:
        watcher = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._client() for _ in range(self.arguments.streams)))
        watcher.cancel()

    async def _client(self) -> None:
        while time.monotonic() < self.end:
            leaves = self.rng.random() < self.arguments.leave
            await self._stream(random_prompt(self.rng), self.rng.randrange(OUT) if leaves else None)

    async def _stream(self, prompt: list[int], leave_after: int | None) -> None:
        body = {"prompt": prompt, "max_tokens": OUT, "ignore_eos": True, "temperature": 0, "stream": True}
        reader, writer = await ask(self.server.port, "POST", "/v1/completions", body)
        seen = 0
        try:
            while line := await asyncio.wait_for(reader.readline(), HANG_S):
                if line.startswith(b"data: {"):
                    seen += 1
                    self.tokens += time.monotonic() < self.end
                    if seen == leave_after:
                        self.left += 1
                        return
                elif line.startswith(b"data: [DONE]"):
                    self.complete += 1
                    return
        except TimeoutError:
            self.hung += 1
        finally:
            writer.close()

    async def _watch(self) -> None:
        while True:
            self.memory.append(self.server.memory_mib())
            await asyncio.sleep(self.arguments.seconds / 10)


async def load(arguments: argparse.Namespace) -> dict:
    server = Server(arguments)
    run = Load(server, arguments)
    start = time.monotonic()
    await run.run()
    seconds = min(time.monotonic() - start, arguments.seconds)
    await asyncio.sleep(1.0)
    left = await stats(server.port)
    gauges = ("num_requests_running", "num_requests_waiting", "kv_blocks_used")
    return {
        "tokens_per_s": round(run.tokens / seconds, 1),
        "complete": run.complete,
        "left": run.left,
        "hung": run.hung,
        "held_at_the_end": sum(left[name] for name in gauges),
        "memory_mib": [round(value) for value in run.memory],
        "exit_code": server.stop(),
    }


def generate(arguments: argparse.Namespace) -> float:
    """Output tokens per second of the engine alone, as many samples at once as there are streams."""
    with Engine(arguments.model, num_threads=arguments.threads) as engine:
        params = SamplingParams(max_tokens=OUT, ignore_eos=True, temperature=0)
        rng = random.Random(1)
        prompts = [random_prompt(rng) for _ in range(2 * arguments.streams)]
        start = time.perf_counter()
        outputs = engine.generate(prompts, params)
        return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - start)


async def time_per_token(arguments: argparse.Namespace) -> dict:
    """Milliseconds per token of running streams: undisturbed, and while long prompts arrive."""
    server = Server(arguments)
    disturb = asyncio.Event()

    async def stream(times: list[float]) -> None:
        body = {"prompt": [5] * 64, "max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": True}
        reader, writer = await ask(server.port, "POST", "/v1/completions", body)
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
            if len(times) == 100:
                disturb.set()
        writer.close()

    async def long_prompts() -> None:
        await disturb.wait()
        rng = random.Random(2)
        for _ in range(4):
            body = {"prompt": random_prompt(rng, 1000), "max_tokens": 1, "stream": True}
            reader, writer = await ask(server.port, "POST", "/v1/completions", body)
            await reader.read()
            writer.close()
            span.append(time.perf_counter())

    times: list[list[float]] = [[] for _ in range(arguments.running)]
    span: list[float] = []
    await asyncio.gather(*(stream(each) for each in times), long_prompts())
    server.stop()
    begin, end = times[0][99], span[-1]
    quiet = [b - a for each in times for a, b in itertools.pairwise(each[20:100])]
    busy = [b - a for each in times for a, b in itertools.pairwise(each) if begin < b < end]
    figures = {"quiet_ms": statistics.fmean(quiet) * 1e3, "busy_ms": statistics.fmean(busy) * 1e3}
    figures |= {"ratio": figures["busy_ms"] / figures["quiet_ms"], "running": arguments.running}
    return {name: round(value, 2) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--leave", type=float, default=0.2, help="share of the streams that hang up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--running", type=int, default=64, help="streams that long prompts disturb")
    parser.add_argument("--kv-cache-tokens", type=int, default=65536)
    arguments = parser.parse_args()
    own = [generate(arguments)]
    server = asyncio.run(load(arguments))
    own.append(generate(arguments))
    result = {
        "generate_tokens_per_s": round(statistics.fmean(own), 1),
        "server": server,
        "ratio": round(server["tokens_per_s"] / statistics.fmean(own), 3),
        "time_per_token": asyncio.run(time_per_token(arguments)),
        **{name: getattr(arguments, name) for name in ("streams", "seconds", "leave", "threads")},
    }
    for name, value in result.items():
        print(f"{name:24}{value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
