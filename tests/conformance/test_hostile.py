"""Five thousand requests that no client means well."""

from __future__ import annotations

import asyncio
import json
import random
import time

import httpx

from astrai_rs import Engine
from conftest import GLASS
from serving import serving
from test_server_behaviour import HOSTILE

VALID = [
    ("/v1/completions", {"prompt": "a", "max_tokens": 2, "stop": ["b"], "logprobs": 1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "n": 1}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "system": "b"}),
    ("/v1/responses", {"input": [{"role": "user", "content": "a"}], "max_output_tokens": 2}),
    ("/tokenize", {"prompt": "a", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [1, 2]}),
    ("/generate", {"query": "a", "max_len": 2, "history": [["a", "b"]]}),
]
WRONG = [
    None,
    -1,
    1e308,
    2**70,
    "x",
    [],
    {},
    [[]],
    {"a": {}},
    True,
    "\ud800",
    "\x00",
    [None],
    0.5,
    ["a"] * 300,
]


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """A valid request with a value of another type, an unknown field, too many bytes, or damaged ones."""
    route, body = rng.choice(VALID)
    kind = rng.randrange(5)
    if kind == 0:
        body = {**body, rng.choice(list(body)): rng.choice(WRONG)}
    elif kind == 1:
        body = {**body, rng.choice(["best_of", "suffix", "__class__", "x" * 1000, ""]): rng.choice(WRONG)}
    elif kind == 2:
        return route, rng.choice(HOSTILE).encode("utf-8", "replace")
    elif kind == 3 and rng.random() < 0.02:
        body = {**body, "padding": "x" * (9 << 20)}
    data = json.dumps(body).encode()
    if kind == 4:
        at = rng.randrange(len(data))
        data = data[:at] + bytes(rng.choices(range(256), k=rng.randrange(4))) + data[at + rng.randrange(3) :]
    return route, data


async def test_every_answer_is_a_refusal_or_an_answer_within_a_second():
    rng = random.Random(0)
    slowest, statuses = 0.0, set()
    with Engine(GLASS) as engine, serving(engine) as (url, _):
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:

            async def send() -> None:
                nonlocal slowest
                route, data = mutated(rng)
                start = time.perf_counter()
                answer = await client.post(route, content=data, headers={"content-type": "application/json"})
                slowest = max(slowest, time.perf_counter() - start)
                statuses.add(answer.status_code)
                if answer.status_code != 200:
                    assert 400 <= answer.status_code < 500, (route, data[:300], answer.text)
                    assert answer.json()["error"]["message"]

            for _ in range(5000 // 8):
                await asyncio.gather(*(send() for _ in range(8)))
            assert (await client.get("/health")).status_code == 200
        stats = engine.stats()
        assert (stats["num_requests_running"], stats["kv_blocks_used"]) == (0, 0)
    assert statuses >= {200, 400}
    assert slowest < 1.0, slowest
