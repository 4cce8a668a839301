"""A load of streams on an OpenAI-compatible server, measured as `vllm bench serve` does."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from astrai_rs.cli.bench import percentile

_TIMEOUT_S = 600.0


@dataclass
class Sample:
    """One request: seconds and tokens."""

    prompt_tokens: int
    output_tokens: int = 0
    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first."""
        return (self.latency - self.ttft) / max(1, self.output_tokens - 1)


@dataclass
class Load:
    """The requests and how they are sent. `run` sends them; `samples` then has what came.

    Raises:
        OSError: the server cannot be reached.
        ValueError: it does not answer as an OpenAI-compatible server does.
    """

    base_url: str
    model: str | None
    api_key: str | None
    num_prompts: int
    lengths: tuple[int, int]
    """Tokens in and out."""
    request_rate: float
    burstiness: float
    max_concurrency: int | None
    seed: int
    samples: list[Sample] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """The result, under vLLM's names."""
        return asyncio.run(self._run())

    async def _run(self) -> dict[str, Any]:
        if self.model is None:
            reader, writer = await self._ask("GET", "/v1/models")
            listed = json.loads(await reader.read())
            writer.close()
            self.model = str(listed["data"][0]["id"])
        rng = random.Random(self.seed)
        room = asyncio.Semaphore(self.max_concurrency or self.num_prompts)
        start = time.perf_counter()
        tasks = []
        for _ in range(self.num_prompts):
            prompt = [rng.randrange(3, 1000) for _ in range(self.lengths[0])]
            tasks.append(asyncio.create_task(self._request(prompt, room)))
            if self.request_rate != float("inf"):
                # Gamma-distributed gaps, as vLLM's: exponential for burstiness 1.
                gap = rng.gammavariate(self.burstiness, 1 / (self.request_rate * self.burstiness))
                await asyncio.sleep(gap)
        for done, task in enumerate(asyncio.as_completed(tasks), start=1):
            self.samples.append(await task)
            sys.stderr.write(f"\r{done}/{self.num_prompts} requests")
        sys.stderr.write("\n")
        return self._result(time.perf_counter() - start)

    async def _request(self, prompt: list[int], room: asyncio.Semaphore) -> Sample:
        sample = Sample(len(prompt))
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.lengths[1],
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with room:
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    await self._stream(body, sample)
            except (OSError, ValueError, TimeoutError) as error:
                sample.error = str(error) or type(error).__name__
        return sample

    async def _stream(self, body: dict[str, Any], sample: Sample) -> None:
        """Fill the sample; ValueError for a stream that breaks off or leaves out what is measured."""
        start = last = time.perf_counter()
        reader, writer = await self._ask("POST", "/v1/completions", body)
        try:
            # The last line of a stream that breaks off may be a part of one.
            while (line := await reader.readline()).endswith(b"\n"):
                if line.startswith(b"data: [DONE]"):
                    break
                if not line.startswith(b"data: {"):
                    continue
                data = json.loads(line[6:])
                if "error" in data:
                    raise ValueError(data["error"].get("message", "the stream ended with an error"))
                now = time.perf_counter()
                if data.get("usage"):
                    sample.output_tokens = data["usage"]["completion_tokens"]
                if data["choices"]:
                    if sample.ttft:
                        sample.itl.append(now - last)
                    else:
                        sample.ttft = now - start
                    last = now
            else:
                raise ValueError("the stream ended without [DONE]")
        finally:
            writer.close()
        if not sample.ttft:
            raise ValueError("the stream gave no tokens")
        if not sample.output_tokens:
            raise ValueError("the stream's usage is missing or counts no tokens")
        sample.latency = last - start

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request; the answer's body follows on the reader. HTTP/1.0: it comes without chunks."""
        url = urlsplit(self.base_url)
        secure = url.scheme == "https"
        port = url.port or (443 if secure else 80)
        try:
            connection = asyncio.open_connection(url.hostname, port, ssl=secure or None, limit=1 << 20)
            reader, writer = await connection
        except OSError as error:
            raise OSError(f"{self.base_url}: {error}") from error
        data = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {url.path}{path} HTTP/1.0", f"Host: {url.netloc}", f"Content-Length: {len(data)}"]
        head += ["Content-Type: application/json"]
        head += [f"Authorization: Bearer {self.api_key}"] if self.api_key else []
        writer.write("\r\n".join([*head, "", ""]).encode() + data)
        status = (await reader.readline()).decode(errors="replace").split(maxsplit=2)
        while (await reader.readline()).strip():
            pass
        if len(status) < 2 or status[1] != "200":
            text = (await reader.read(1000)).decode(errors="replace")
            writer.close()
            raise ValueError(f"{self.base_url}{path}: {' '.join(status).strip()}: {text}")
        return reader, writer

    def _result(self, seconds: float) -> dict[str, Any]:
        good = [sample for sample in self.samples if not sample.error]
        if not good:
            first = self.samples[0].error
            raise ValueError(f"all {len(self.samples)} requests failed; the first: {first}")
        inputs, outputs = sum(s.prompt_tokens for s in good), sum(s.output_tokens for s in good)
        result: dict[str, Any] = {
            "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
            "backend": "openai",
            "model_id": self.model,
            "num_prompts": self.num_prompts,
            "request_rate": "inf" if self.request_rate == float("inf") else self.request_rate,
            "burstiness": self.burstiness,
            "max_concurrency": self.max_concurrency,
            "duration": seconds,
            "completed": len(good),
            "failed": len(self.samples) - len(good),
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "request_throughput": len(good) / seconds,
            "output_throughput": outputs / seconds,
            "total_token_throughput": (inputs + outputs) / seconds,
        }
        for name, values in {
            "ttft": [s.ttft for s in good],
            "tpot": [s.tpot for s in good if s.output_tokens > 1],
            "itl": [gap for s in good for gap in s.itl],
            "e2el": [s.latency for s in good],
        }.items():
            result |= _summary(name, [value * 1e3 for value in values])
        return result


def _summary(name: str, values: list[float]) -> dict[str, float]:
    """Of milliseconds; nothing where there are none."""
    if not values:
        return {}
    return {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"std_{name}_ms": statistics.pstdev(values),
        f"p99_{name}_ms": percentile(values, 99),
    }


def plot_svg(samples: list[Sample]) -> str:
    """Cumulative distributions of time to first token and time per token, as a drawing."""
    good = [sample for sample in samples if not sample.error]
    panels = {
        "time to first token, ms": [s.ttft * 1e3 for s in good],
        "time per token, ms": [s.tpot * 1e3 for s in good],
    }
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 260" font-family="sans-serif"'
    drawn = [_panel(index, title, sorted(values)) for index, (title, values) in enumerate(panels.items())]
    background = '<rect width="720" height="260" fill="#fff"/>'
    return f'{head} font-size="12">{background}{"".join(drawn)}</svg>\n'


def _panel(index: int, title: str, ordered: list[float]) -> str:
    most = max(ordered[-1], 1e-9)
    points = " ".join(
        f"{40 + 300 * value / most:.1f},{230 - 190 * (rank + 1) / len(ordered):.1f}"
        for rank, value in enumerate(ordered)
    )
    parts = [f'<text x="190" y="22" text-anchor="middle">{title}</text>']
    parts += ['<path d="M40 30V230H345" fill="none" stroke="#888"/>']
    for part in (0, 0.5, 1):
        x = 40 + 300 * part
        parts.append(f'<text x="{x:.0f}" y="246" text-anchor="middle">{most * part:.4g}</text>')
    parts += [f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="2"/>']
    return f'<g transform="translate({360 * index} 0)">{"".join(parts)}</g>'
