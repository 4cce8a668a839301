"""Two replicas and a batch job on a local Ray cluster, against the engine in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import ray
from ray import serve

from astrai_rs import Engine, SamplingParams
from astrai_rs.ray import BatchGenerator, deployment
from astrai_rs.server import ServerSettings

GLASS = Path(__file__).parent.parent / "fixtures/golden/glass-llama"
ENGINE = {"dtype": "float32", "num_threads": 1}
HELLO = [{"role": "user", "content": "Once upon a time"}]
URL = "http://127.0.0.1:8765"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(GLASS, **ENGINE) as engine:
        yield engine


@pytest.fixture(scope="module")
def endless_folder(tmp_path_factory) -> Path:
    """The story model without an end."""
    folder = tmp_path_factory.mktemp("endless")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((GLASS / name).read_bytes())
    config = json.loads((GLASS / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "eos_token_id": None, "max_position_embeddings": 2**15})
    )
    tokenizer = json.loads((GLASS / "tokenizer_config.json").read_text())
    del tokenizer["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def client(cluster) -> Iterator[openai.OpenAI]:
    """Two replicas behind one address."""
    serve.start(http_options={"host": "127.0.0.1", "port": 8765})
    server = deployment(
        str(GLASS),
        engine_options=ENGINE,
        settings=ServerSettings(model_names=("story",), api_keys=("key",)),
        num_replicas=2,
    )
    serve.run(server.bind(), name="story", route_prefix="/")
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="key", max_retries=0) as client:
        yield client


def test_the_same_answers_as_in_this_process(client, engine):
    expected = engine.chat(HELLO, SamplingParams(temperature=0, max_tokens=20)).text
    sent = {"model": "story", "messages": HELLO, "temperature": 0, "max_tokens": 20}
    for _ in range(4):  # either replica
        assert client.chat.completions.create(**sent).choices[0].message.content == expected
    pieces = list(client.chat.completions.create(**sent, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    assert len(pieces) > 10
    ids = engine.tokenizer.encode("Once")
    text = engine.generate(ids, SamplingParams(temperature=0, max_tokens=5)).text
    answer = client.completions.create(model="story", prompt=ids, temperature=0, max_tokens=5)
    assert answer.choices[0].text == text


def test_what_else_clients_ask_for(client):
    assert [model.id for model in client.models.list()] == ["story"]
    answer = client.chat.completions.create(
        model="story", messages=HELLO, extra_body={"structured_outputs": {"choice": ["a cat", "a dog"]}}
    )
    assert answer.choices[0].message.content in ("a cat", "a dog")
    with pytest.raises(openai.BadRequestError, match="temperature must be") as caught:
        client.chat.completions.create(model="story", messages=HELLO, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_both_replicas_serve_and_a_client_that_leaves_costs_nothing(cluster, endless_folder):
    server = deployment(
        str(endless_folder), engine_options={**ENGINE, "kv_cache_tokens": 2**17}, num_replicas=2
    )
    serve.run(server.bind(), name="endless", route_prefix="/endless")
    body = {"prompt": "Once", "max_tokens": 30_000, "stream": True}
    with httpx.Client(base_url=f"{URL}/endless", timeout=60) as http:
        streams = [http.stream("POST", "/v1/completions", json=body) for _ in range(8)]
        answers = [stream.__enter__() for stream in streams]
        lines = [next(answer.iter_lines()) for answer in answers]
        assert all(line.startswith("data: ") for line in lines)
        assert len(running(http)) == 2, "one replica got all requests"
        for stream in streams:
            stream.__exit__(None, None, None)
        end = time.monotonic() + 30
        while any(running(http).values()):
            assert time.monotonic() < end, "requests of clients that left still run"
            time.sleep(0.1)
    serve.delete("endless")


def running(http: httpx.Client) -> dict[int, int]:
    """Running requests of the replicas that answered, by the second in which they were started."""
    seen = {}
    for _ in range(40):
        stats = http.get("/stats").json()
        seen[round((time.time() - stats["uptime_s"]) * 100)] = stats["num_requests_running"]
    return seen


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_batch_job_of_five_hundred_prompts(engine, column):
    params = SamplingParams(temperature=0.7, max_tokens=8, seed=3)
    texts = [f"The {n} birds" for n in range(500)]
    rows = [{"id": n, "prompt": text} for n, text in enumerate(texts)]
    expected = engine.generate(texts, params)
    if column == "messages":
        conversations = [[{"role": "user", "content": text}] for text in texts]
        rows = [{"id": n, "messages": messages} for n, messages in enumerate(conversations)]
        expected = engine.chat(conversations, params)
    dataset = ray.data.from_items(rows).map_batches(
        BatchGenerator,
        fn_constructor_kwargs={"model": str(GLASS), "engine_options": ENGINE, "sampling_params": params},
        batch_size=64,
        concurrency=2,
        num_cpus=1,
    )
    found = sorted(dataset.take_all(), key=lambda row: row["id"])
    assert [row["generated_text"] for row in found] == [output.text for output in expected]
    assert [row["num_input_tokens"] for row in found] == [len(o.prompt_token_ids) for o in expected]
    assert [row["num_generated_tokens"] for row in found] == [len(o.token_ids) for o in expected]
    assert {row["finish_reason"] for row in found} <= {"stop", "length"}


def test_rows_that_cannot_be_answered():
    rows = {
        "prompt": ["Once", "Once " * 500, "Once"],
        "sampling_params": [{"max_tokens": 2}, None, {"max_tokens": -1}],
    }
    stage = BatchGenerator(str(GLASS), engine_options=ENGINE, on_error="column")
    found = stage(rows)
    assert found["num_generated_tokens"] == [2, None, None]
    assert found["error"][0] is None
    assert "the prompt must leave room" in found["error"][1]
    assert "max_tokens must be" in found["error"][2]
    with pytest.raises(ValueError, match="max_tokens must be"):
        BatchGenerator(str(GLASS), engine_options=ENGINE)({name: rows[name][2:] for name in rows})
    with pytest.raises(ValueError, match="rows must have either prompt or messages; given: text"):
        stage({"text": ["a"]})
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'column'; given: 'skip'"):
        BatchGenerator(str(GLASS), on_error="skip")
    with pytest.raises(ValueError, match="n must be 1; given: 2"):
        BatchGenerator(str(GLASS), sampling_params=SamplingParams(n=2))
