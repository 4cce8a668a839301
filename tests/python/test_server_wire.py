"""What clients send that is odd but legal, and the words in which the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from astrai_rs import Engine
from astrai_rs.model import embedded_model
from astrai_rs.server.chat import ChatPlan, ChatRequest, ChatSample
from astrai_rs.server.messages import spelled_out
from astrai_rs.server.parse import Content, Reasoning, ToolCallStart
from astrai_rs.server.settings import ServerSettings
from astrai_rs.server.tools import FORMATS
from conftest import ENDLESS_TOKENS, LIMIT
from serving import serving

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
ROUTES = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 3},
    "/v1/completions": {"prompt": "Once", "max_tokens": 3},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 3},
    "/v1/messages": {"messages": HELLO, "max_tokens": 3},
}


@pytest.fixture(scope="module")
def client(endless_folder) -> Iterator[httpx.Client]:
    with (
        Engine(endless_folder, dtype="float32", kv_cache_tokens=ENDLESS_TOKENS) as engine,
        serving(engine) as (url, _),
        httpx.Client(base_url=url, timeout=LIMIT) as client,
    ):
        yield client


def error(client: httpx.Client, route: str, body: dict) -> dict:
    answer = client.post(route, json=body)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def events(client: httpx.Client, route: str, body: dict) -> list[dict]:
    with client.stream("POST", route, json={**body, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("route", ROUTES)
def test_null_means_left_out(client, route):
    nulls = dict.fromkeys(
        ["temperature", "top_p", "n", "stream", "logprobs", "echo", "parallel_tool_calls", "modalities", "no"]
    )
    answer = client.post(route, json={**ROUTES[route], **nulls})
    assert answer.status_code == 200, answer.text


def test_parts_may_carry_more_than_text(client):
    part = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}
    body = {**ROUTES["/v1/chat/completions"], "temperature": 0}
    plain = client.post("/v1/chat/completions", json=body).json()
    body["messages"] = [{"role": "user", "content": [part]}]
    assert client.post("/v1/chat/completions", json=body).json()["choices"] == plain["choices"]


@pytest.mark.parametrize(
    ("route", "field", "value", "param", "message"),
    [
        ("/v1/chat/completions", "Foo", 1, "Foo", "Foo: this field is not supported"),
        ("/v1/chat/completions", "int", 1, "int", "int: this field is not supported"),
        ("/v1/chat/completions", "temperature", -1, "temperature", "temperature must be a finite number"),
        ("/v1/chat/completions", "top_logprobs", 21, "top_logprobs", "top_logprobs needs logprobs"),
        ("/v1/chat/completions", "stream_options", {}, "stream_options", "stream_options needs stream"),
        ("/v1/completions", "best_of", 2, "best_of", "best_of must be n, 1; given: 2"),
        ("/v1/completions", "n", 0, "n", "n must be"),
        ("/v1/completions", "structured_outputs", {"regex": ""}, None, "regex must be a non-empty string"),
        ("/v1/completions", "structured_outputs", {"grammar": ""}, None, "must be a non-empty string"),
        ("/v1/completions", "prompt", "a " * 600_000, None, "the prompt must leave room"),
        (
            "/v1/chat/completions",
            "messages",
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages.0.content.0.text",
            "Field required",
        ),
        (
            "/v1/chat/completions",
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages.0.content",
            "parts of type 'image_url' are not supported",
        ),
        (
            "/v1/responses",
            "input",
            [{"type": "function_call_output", "call_id": "a", "output": 3}],
            "input.0.output",
            "valid string",
        ),
        (
            "/v1/messages",
            "messages",
            [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}],
            "messages.0.content.0.input",
            "Field required",
        ),
    ],
)
def test_an_error_names_its_field(client, route, field, value, param, message):
    fault = error(client, route, {**ROUTES[route], field: value})
    assert message in fault["message"]
    assert param is None or fault["param"] == param
    # The connection lives on.
    assert client.post(route, json=ROUTES[route]).status_code == 200


def test_unknown_paths_methods_and_bad_json_are_named(client):
    assert client.get("/nothing").json()["error"]["message"] == "GET /nothing: Not Found"
    assert "PUT /v1/models: Method" in client.put("/v1/models").json()["error"]["message"]
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/completions", content=b'{"prompt": }', headers=headers)
    assert "Expecting value at character 11" in answer.json()["error"]["message"]
    assert client.head("/health").status_code == 200
    fault = client.post("/generate?query=a&bogus=1").json()["error"]
    assert (fault["param"], fault["code"]) == ("bogus", "unsupported_field")


def test_streams_of_completions_add_up(client):
    """Scoring without an answer, and the ids of prompt and answer."""
    body = {"prompt": "Once upon", "max_tokens": 0, "echo": True, "stream_options": {"include_usage": True}}
    *pieces, last = events(client, "/v1/completions", body)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "Once upon"
    assert (pieces[-1]["choices"][0]["finish_reason"], last["usage"]["completion_tokens"]) == ("length", 0)
    body = {"prompt": "Once", "max_tokens": 3, "temperature": 0, "return_token_ids": True}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]
    pieces = [piece["choices"][0] for piece in events(client, "/v1/completions", body)]
    assert [piece.get("prompt_token_ids") for piece in pieces] == [whole["prompt_token_ids"], None, None]
    assert [i for piece in pieces for i in piece["token_ids"]] == whole["token_ids"]
    body = {"messages": HELLO, "max_tokens": 3, "temperature": 0, "return_token_ids": True}
    whole = client.post("/v1/chat/completions", json=body).json()
    first, *rest = events(client, "/v1/chat/completions", body)
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in piece for piece in rest)
    assert (
        "prompt_logprobs"
        in error(client, "/v1/completions", {"prompt": "a", "prompt_logprobs": 1, "stream": True})["message"]
    )


def test_tokens_are_counted_as_chat_sends_them(client):
    body = {"messages": HELLO, "tools": [TOOL], "max_tokens": 1}
    used = client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]
    assert client.post("/tokenize", json={k: body[k] for k in ("messages", "tools")}).json()["count"] == used
    body = {"messages": HELLO, "max_tokens": 1, "system": "Short."}
    body["tools"] = [{"name": "look", "input_schema": {"type": "object"}}]
    usage = client.post("/v1/messages", json=body).json()["usage"]
    count = client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    assert count == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_an_answer_that_the_client_has_begun_goes_on(client):
    said = [*HELLO, {"role": "assistant", "content": "Once upon a"}]
    body = {"messages": said, "max_tokens": 8, "temperature": 0, "continue_final_message": True}
    body["add_generation_prompt"] = False
    chat = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    body = {"messages": said, "max_tokens": 8, "temperature": 0}
    answer = client.post("/v1/messages", json=body).json()
    assert answer["content"][0]["text"] == chat


def test_a_broken_call_may_come_back(client):
    """Our own answers, cut off by max_tokens, among them."""
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"at": '}}
    said = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
    said.append({"role": "tool", "tool_call_id": "a", "content": "nothing"})
    answer = client.post("/v1/chat/completions", json={"messages": said, "max_tokens": 1, "tools": [TOOL]})
    assert answer.status_code == 200, answer.text
    items = [{"type": "function_call", "call_id": "a", "name": "look", "arguments": "{"}]
    output = [{"type": "input_text", "text": "nothing"}]
    items.append({"type": "function_call_output", "call_id": "a", "output": output})
    answer = client.post("/v1/responses", json={"input": items, "max_output_tokens": 1})
    assert answer.status_code == 200, answer.text
    assert answer.json()["output"][0]["status"] == "incomplete"


def plan(**fields) -> ChatPlan:
    body = ChatRequest(messages=HELLO, **fields)
    reasoning = ("<think>", "</think>")
    made = ChatPlan(body, tool_format=FORMATS["hermes"], reasoning=reasoning, token_ids={})
    made.params(ServerSettings())
    made.read_prompt("user: hello\n<think>\n")
    return made


def test_plain_text_as_format_leaves_room_for_reasoning():
    text = "hm</think>\n\nyes"
    parts = ChatSample(plan(response_format={"type": "text"})).parts(text, last=True)
    assert parts == [Reasoning("hm"), Content("yes")]
    parts = ChatSample(plan(response_format={"type": "json_object"})).parts("{}", last=True)
    assert parts == [Content("{}")]


def test_one_call_where_several_are_not_wanted():
    text = "</think>" + '<tool_call>{"name": "look", "arguments": {}}</tool_call>\n' * 2
    for parallel in (True, False):
        sample = ChatSample(plan(tools=[TOOL], parallel_tool_calls=parallel))
        calls = [part for part in sample.parts(text, last=True) if isinstance(part, ToolCallStart)]
        assert len(calls) == (2 if parallel else 1)


def test_calls_and_results_are_told_without_tools_too():
    call = {"function": {"name": "look", "arguments": {}}}
    said = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "a cat"}]
    told = spelled_out(said, [])
    assert [message["role"] for message in told] == ["assistant", "user"]
    assert "look" in told[0]["content"]
    assert "a cat" in told[1]["content"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            'response_format.json_schema.schema: Unimplemented keys: ["not"]',
        ),
        (
            {
                "tool_choice": "required",
                "tools": [
                    TOOL,
                    {
                        "type": "function",
                        "function": {"name": "b", "parameters": {"type": "object", "not": {}}},
                    },
                ],
            },
            "tools.1.function.parameters",
            'tools.1.function.parameters: Unimplemented keys: ["not"]',
        ),
    ],
)
def test_an_unsupported_schema_is_named_as_the_client_does(random_folder, fields, param, message):
    with (
        Engine(random_folder, tokenizer=embedded_model(), kv_cache_tokens=2048) as engine,
        serving(engine) as (url, _),
        httpx.Client(base_url=url, timeout=LIMIT) as client,
    ):
        fault = error(client, "/v1/chat/completions", {**ROUTES["/v1/chat/completions"], **fields})
    assert (fault["param"], message in fault["message"]) == (param, True), fault
