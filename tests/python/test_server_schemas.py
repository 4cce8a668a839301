"""Answers against the schemas that OpenAI publishes (`tests/fixtures/openai`, version 2.3.0, MIT).

Two things that the real service does and its schemas forbid are left out: `finish_reason: null` in chunks,
and the null for a prompt's first token in the logprobs of completions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import jsonschema
import pytest

from astrai_rs import Engine
from astrai_rs.model import embedded_model
from astrai_rs.server import create_app
from conftest import FIXTURES

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30, "seed": 1}
TOOL = {
    "name": "f",
    "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]},
}
TOOLS = {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}
RESPONSE = {"input": "Hi", "max_output_tokens": 20}
RESPONSE_TOOLS = {"tools": [{"type": "function", **TOOL, "strict": True}], "tool_choice": "required"}


def validator(name: str) -> jsonschema.Draft202012Validator:
    schemas = json.loads((FIXTURES / "openai/schemas.json").read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator({**schemas, "$ref": f"#/$defs/{name}"})


@pytest.fixture(scope="module")
def engine(random_folder) -> Iterator[Engine]:
    with Engine(random_folder, tokenizer=embedded_model()) as engine:
        yield engine


@pytest.fixture
async def client(engine):
    transport = httpx.ASGITransport(create_app(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.mark.parametrize(
    ("route", "body", "schema"),
    [
        ("/v1/chat/completions", CHAT, "CreateChatCompletionResponse"),
        (
            "/v1/chat/completions",
            {**CHAT, "n": 3, "logprobs": True, "top_logprobs": 2},
            "CreateChatCompletionResponse",
        ),
        ("/v1/chat/completions", {**CHAT, **TOOLS}, "CreateChatCompletionResponse"),
        ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 2}, "CreateCompletionResponse"),
        ("/v1/completions", {"prompt": "a b c", "logprobs": 1, "echo": True}, "CreateCompletionResponse"),
        ("/v1/responses", RESPONSE, "Response"),
        ("/v1/responses", {**RESPONSE, **RESPONSE_TOOLS}, "Response"),
        ("/v1/completions", {"prompt": 3}, "ErrorResponse"),
    ],
    ids=str,
)
async def test_answers(client, route, body, schema):
    answer = (await client.post(route, json=body)).json()
    for choice in answer.get("choices", ()):
        if (choice.get("logprobs") or {}).get("token_logprobs", [0])[0] is None:
            choice["logprobs"]["token_logprobs"][0] = 0.0
            choice["logprobs"]["top_logprobs"][0] = {}
    validator(schema).validate(answer)


async def test_models(client):
    validator("ListModelsResponse").validate((await client.get("/v1/models")).json())


@pytest.mark.parametrize("more", [{}, {"logprobs": True, "top_logprobs": 1}, TOOLS], ids=str)
async def test_chunks(client, more):
    body = {**CHAT, **more, "stream": True, "stream_options": {"include_usage": True}}
    text = (await client.post("/v1/chat/completions", json=body)).text
    chunks = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    schema = validator("CreateChatCompletionStreamResponse")
    for chunk in chunks:
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        schema.validate(chunk)


@pytest.mark.parametrize("more", [{}, RESPONSE_TOOLS], ids=str)
async def test_events(client, more):
    text = (await client.post("/v1/responses", json={**RESPONSE, **more, "stream": True})).text
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    schema = validator("ResponseStreamEvent")
    assert len(events) > 5
    for event in events:
        schema.validate(event)
