"""Clients that are too large for the suite: LangChain, LiteLLM, schemathesis, lm-evaluation-harness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from astrai_rs import Engine, SamplingParams
from astrai_rs.model import embedded_model
from conftest import FIXTURES
from serving import serving


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(embedded_model()) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with serving(engine) as (url, _):
        yield url


QUESTION = "What is the capital of France?"


def answer(engine, tokens: int = 12) -> str:
    messages = [{"role": "user", "content": QUESTION}]
    return engine.chat(messages, SamplingParams(temperature=0, max_tokens=tokens)).text


def test_langchain(engine, url):
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="test", temperature=0, max_tokens=12)
    reply = model.invoke(QUESTION)
    assert reply.content == answer(engine)
    assert reply.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == answer(engine)

    @tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        return "sunny"

    caller = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="test", temperature=0, max_tokens=60)
    bound = caller.bind_tools([get_weather], tool_choice="get_weather")
    (call,) = bound.invoke("The weather in Paris?").tool_calls
    assert (call["name"], call["args"].keys()) == ("get_weather", {"city"})


def test_litellm(engine, url):
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    arguments = {
        "model": "openai/test",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 12,
    }
    assert litellm.completion(**arguments).choices[0].message.content == answer(engine)
    chunks = litellm.completion(**arguments, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer(engine)


def test_schemathesis():
    """Thousands of requests made of the OpenAPI document: no server error, no answer it does not name.

    With a model of a short context: many of the requests fill it.
    """
    with Engine(FIXTURES / "golden/glass-llama") as engine, serving(engine) as (url, _):
        program = Path(sys.executable).with_name("schemathesis")
        command = [program, "run", f"{url}/openapi.json", "--max-examples", "20", "--no-color"]
        command += ["--checks", "not_a_server_error,status_code_conformance,content_type_conformance"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""

QUESTIONS = [
    ("The capital of France is", [" Paris", " Rome", " Berlin"], 0),
    ("The capital of Italy is", [" Paris", " Rome", " Berlin"], 1),
    ("The capital of Germany is", [" Paris", " Rome", " Berlin"], 2),
    ("Water is made of hydrogen and", [" oxygen", " iron", " gold"], 0),
    ("The opposite of hot is", [" blue", " cold", " fast"], 1),
    ("Two plus two is", [" ten", " seven", " four"], 2),
]


def score(engine, context: str, choice: str) -> float:
    """The log-probability of a choice, from the engine itself."""
    ids = engine.tokenizer.encode(context + choice)
    start = len(engine.tokenizer.encode(context))
    rows = engine.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    return sum(row[token].logprob for token, row in zip(ids[start:], rows[start:], strict=True))


def test_lm_eval(engine, url, tmp_path):
    """`local-completions` with the server's own tokenizer routes, against scores computed in process."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "capitals.yaml").write_text(TASK.format(file=data))
    arguments = f"model=test,base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent=4"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "capitals"]
    command += ["--model_args", arguments, "--include_path", str(tmp_path), "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | offline, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_capitals_*.jsonl")
    right = 0
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        question, choices, target = QUESTIONS[sample["doc_id"]]
        own = [score(engine, question, choice) for choice in choices]
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == own
        right += max(range(3), key=own.__getitem__) == target
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["capitals"]["acc,none"] == right / len(QUESTIONS)
