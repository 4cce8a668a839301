"""A stream adds up to the answer that is given whole, for random requests of every kind."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator

import httpx
import pytest

from astrai_rs import Engine
from astrai_rs.model import embedded_model
from astrai_rs.server import create_app
from conftest import assert_idle

TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["rot", "größer", "🟢"]}, "n": {"type": "integer"}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def engine(random_folder) -> Iterator[Engine]:
    with Engine(random_folder, tokenizer=embedded_model()) as engine:
        yield engine


@pytest.fixture(scope="module")
def broken_characters(engine) -> dict[str, float]:
    """A bias for bytes that are no characters, or parts of some."""
    return {str(i): 100 for i, token in enumerate(engine.token_bytes()) if len(token) == 1 and token[0] > 127}


def random_request(rng: random.Random, broken_characters: dict[str, float]) -> tuple[str, dict]:
    """`(route, body)`."""
    body: dict = {
        "temperature": rng.choice([0, 0.7, 1.5]),
        "seed": rng.randrange(1000),
        "max_tokens": rng.randrange(1, 40),
        "n": rng.choice([1, 1, 2, 3]),
        "stop": rng.choice([None, ["a"], [" the", "."], ["\n", "é"]]),
        "ignore_eos": rng.random() < 0.3,
        "return_token_ids": rng.random() < 0.3,
    }
    if rng.random() < 0.2:
        body["logit_bias"] = broken_characters
    if rng.random() < 0.5:
        prompts = [rng.choice(["Once", "The big", "é🙂"]) for _ in range(rng.choice([1, 1, 3]))]
        body |= {"prompt": prompts, "logprobs": rng.choice([None, 0, 3])}
        body["echo"] = rng.random() < 0.3 and body["logprobs"] is None
        return "/v1/completions", body
    body |= {"messages": [{"role": "user", "content": rng.choice(["Hi", "🙂"])}]}
    if rng.random() < 0.5:
        body |= {"logprobs": True, "top_logprobs": rng.randrange(3)}
    if rng.random() < 0.5:
        body |= {"tools": [TOOL], "tool_choice": rng.choice(["auto", "required", "required"])}
        if body["tool_choice"] == "required":
            body |= {"stop": None, "logit_bias": None, "max_tokens": 40}
    return "/v1/chat/completions", body


def events(text: str) -> list[dict]:
    """The stream's data, read by the standard's rules: events end with an empty line."""
    *parts, end = text.split("\n\n")
    assert (end, parts[-1]) == ("", "data: [DONE]")
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


def added_up(chunks: list[dict], n: int) -> list[dict]:
    """Choices as a client puts them together."""
    choices: list[dict] = [{} for _ in range(n)]
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices[part["index"]]
            delta = part.get("delta", {"content": part.get("text")})
            for name in ("content", "reasoning_content"):
                if delta.get(name):
                    choice[name] = choice.get(name, "") + delta[name]
            for call in delta.get("tool_calls", ()):
                calls = choice.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    calls.append({"name": call["function"]["name"], "arguments": ""})
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
            for name, value in (part.get("logprobs") or {}).items():
                choice.setdefault("logprobs", {}).setdefault(name, []).extend(value or [])
            choice.setdefault("token_ids", []).extend(part.get("token_ids", []))
            choice["finish_reason"] = part["finish_reason"] or choice.get("finish_reason")
    return choices


def whole(choice: dict) -> dict:
    """A choice of a whole answer in the same form."""
    message = choice.get("message", {"content": choice.get("text")})
    out = {name: message[name] for name in ("content", "reasoning_content") if message.get(name)}
    if "tool_calls" in message:
        out["tool_calls"] = [
            {"name": c["function"]["name"], "arguments": c["function"]["arguments"]}
            for c in message["tool_calls"]
        ]
    if choice["logprobs"] is not None:
        out["logprobs"] = {name: value or [] for name, value in choice["logprobs"].items()}
    out["token_ids"] = choice.get("token_ids", [])
    return out | {"finish_reason": choice["finish_reason"]}


async def test_streams_add_up(engine, broken_characters):
    rng = random.Random(1)
    requests = [random_request(rng, broken_characters) for _ in range(300)]
    transport = httpx.ASGITransport(create_app(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:

        async def both(route: str, body: dict) -> None:
            answer = (await client.post(route, json=body)).json()
            stream = await client.post(
                route, json={**body, "stream": True, "stream_options": {"include_usage": True}}
            )
            *chunks, last = events(stream.text)
            expected = [whole(choice) for choice in answer["choices"]]
            assert added_up(chunks, len(expected)) == expected, body
            usage = [{**u, "prompt_tokens_details": None} for u in (last["usage"], answer["usage"])]
            assert usage[0] == usage[1]
            seen["calls"] += any("tool_calls" in choice for choice in expected)
            seen["unicode"] += any("�" in choice.get("content", "") for choice in expected)
            seen["stop"] += any(choice["finish_reason"] == "stop" for choice in expected)

        seen = {"calls": 0, "unicode": 0, "stop": 0}
        for start in range(0, len(requests), 32):
            await asyncio.gather(*(both(*request) for request in requests[start : start + 32]))
    assert min(seen.values()) > 10, seen
    assert_idle(engine)
