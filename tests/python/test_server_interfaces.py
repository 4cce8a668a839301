"""`/v1/messages` and `/v1/responses` through Anthropic's and OpenAI's own clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

from astrai_rs import Engine, SamplingParams
from astrai_rs.model import embedded_model
from conftest import assert_idle
from serving import serving

QUESTION = [{"role": "user", "content": "Explain why the sky is blue."}]
GREEDY = {"temperature": 0}
"""Anthropic's client has no argument for it any more."""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(embedded_model()) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with serving(engine, api_keys=("key",)) as (url, _):
        yield url
    assert_idle(engine)


@pytest.fixture
def claude(url) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="key", max_retries=0) as client:
        yield client


@pytest.fixture
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def answer(engine) -> str:
    return engine.chat(QUESTION, SamplingParams(temperature=0, max_tokens=20)).text


def test_messages(claude, answer, engine):
    arguments = {"model": "test", "messages": QUESTION, "max_tokens": 20, "extra_body": GREEDY}
    reply = claude.messages.create(**arguments)
    assert (reply.content[0].text, reply.stop_reason, reply.role) == (answer, "max_tokens", "assistant")
    prompt = len(engine.tokenizer.apply_chat_template(QUESTION))
    usage = reply.usage
    assert (usage.input_tokens + usage.cache_read_input_tokens, usage.output_tokens) == (prompt, 20)
    with claude.messages.stream(**arguments) as stream:
        assert "".join(stream.text_stream) == answer
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == (answer, "max_tokens")
    stop = answer[5:8]
    reply = claude.messages.create(**arguments, stop_sequences=[stop])
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", stop)
    assert reply.content[0].text == answer.partition(stop)[0]


def test_messages_with_system_and_blocks(claude, engine):
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    expected = engine.chat(messages, SamplingParams(temperature=0, max_tokens=8)).text
    blocks = [{"type": "text", "text": "Explain why the sky", "cache_control": {"type": "ephemeral"}}]
    blocks += [{"type": "text", "text": " is blue."}]
    reply = claude.messages.create(
        model="test",
        system=[{"type": "text", "text": "Be brief."}],
        messages=[{"role": "user", "content": blocks}],
        max_tokens=8,
        extra_body=GREEDY,
    )
    assert reply.content[0].text == expected


@pytest.mark.parametrize("stream", [False, True])
def test_messages_with_tools(claude, stream):
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    arguments = {
        "model": "test",
        "tools": [{"name": "get_weather", "description": "Of a city", "input_schema": SCHEMA}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "max_tokens": 60,
        "extra_body": GREEDY,
    }
    if stream:
        with claude.messages.stream(messages=question, **arguments) as events:
            reply = events.get_final_message()
    else:
        reply = claude.messages.create(messages=question, **arguments)
    (block,) = reply.content
    assert (block.type, block.name, reply.stop_reason) == ("tool_use", "get_weather", "tool_use")
    assert block.input.keys() == {"city"}
    sent_back = {"type": "tool_use", "id": block.id, "name": block.name, "input": block.input}
    result = [{"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}]
    history = [*question, {"role": "assistant", "content": [sent_back]}, {"role": "user", "content": result}]
    arguments["tool_choice"] = {"type": "none"}
    assert claude.messages.create(messages=history, **arguments).content[0].type == "text"


def test_messages_refusals(url, claude):
    with (
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as other,
        pytest.raises(anthropic.AuthenticationError, match="wrong API key"),
    ):
        other.messages.create(model="test", messages=QUESTION, max_tokens=1)
    image = [{"type": "image", "source": {"type": "url", "url": "https://a.example"}}]
    with pytest.raises(anthropic.BadRequestError, match="blocks of type 'image' are not supported"):
        claude.messages.create(model="test", messages=[{"role": "user", "content": image}], max_tokens=1)
    with pytest.raises(anthropic.BadRequestError, match="container: this field is not supported"):
        claude.messages.create(model="test", messages=QUESTION, max_tokens=1, extra_body={"container": "x"})


def test_responses(client, answer, engine):
    arguments = {"model": "test", "input": QUESTION[0]["content"], "max_output_tokens": 20, "temperature": 0}
    reply = client.responses.create(**arguments)
    assert (reply.output_text, reply.status) == (answer, "incomplete")
    assert reply.incomplete_details.reason == "max_output_tokens"
    prompt = len(engine.tokenizer.apply_chat_template(QUESTION))
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (prompt, 20)
    events = list(client.responses.create(**arguments, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer
    assert events[0].type == "response.created"
    assert (events[-1].type, events[-1].response.output_text) == ("response.incomplete", answer)


class City(BaseModel):
    name: Literal["Paris", "Rome"]


def test_responses_follow_a_schema(client):
    question = "Name a city, as JSON."
    arguments = {"model": "test", "input": question, "temperature": 0, "max_output_tokens": 60}
    reply = client.responses.parse(**arguments, text_format=City)
    assert isinstance(reply.output_parsed, City)
    assert reply.status == "completed"
    with client.responses.stream(**arguments, text_format=City) as stream:
        assert stream.get_final_response().output_parsed == reply.output_parsed


@pytest.mark.parametrize("stream", [False, True])
def test_responses_with_tools(client, stream):
    arguments = {
        "model": "test",
        "tools": [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "temperature": 0,
        "max_output_tokens": 60,
    }
    question = {"role": "user", "content": "What is the weather in Paris?"}
    if stream:
        with client.responses.stream(input=[question], **arguments) as events:
            reply = events.get_final_response()
    else:
        reply = client.responses.create(input=[question], **arguments)
    (call,) = reply.output
    assert (call.type, call.name, reply.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments).keys() == {"city"}
    sent_back = {"type": call.type, "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    arguments["tool_choice"] = "none"
    reply = client.responses.create(
        input=[question, sent_back, result], instructions="Be brief.", **arguments
    )
    assert reply.output_text


def test_responses_refusals(client):
    with pytest.raises(openai.BadRequestError, match="previous_response_id: this field is not supported"):
        client.responses.create(model="test", input="a", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="tools.0.type"):
        client.responses.create(model="test", input="a", tools=[{"type": "web_search"}])
    with pytest.raises(openai.BadRequestError, match="tools.0.function.name: String should match pattern"):
        client.responses.create(model="test", input="a", tools=[{"type": "function", "name": "a b"}])


def test_streams_end_with_an_error_event(engine, monkeypatch):
    """An engine that fails after the head of the answer has gone out."""

    async def broken(self):
        raise MemoryError("no memory")
        yield

    monkeypatch.setattr("astrai_rs.server.generation.Generation.__aiter__", broken)
    bodies = {
        "/v1/messages": {"messages": QUESTION},
        "/v1/responses": {"input": "a"},
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": QUESTION},
    }
    with serving(engine) as (url, _), httpx.Client(base_url=url) as http:
        for route, body in bodies.items():
            text = http.post(route, json={**body, "stream": True}).text
            last = [line for line in text.split("\n") if line.startswith("data: {")][-1]
            assert "no memory" in last, route
