"""Batch invariance with the fields that need a tokenizer, and with quantised weights."""

import random
from dataclasses import replace
from typing import Any

import pytest

from astrai_rs import Engine, SamplingParams
from astrai_rs.model import embedded_model
from reference import GOLDEN
from test_engine_invariance import random_params, results

WORDS = [
    "the",
    "a",
    "little",
    "old",
    "man",
    "table",
    "king",
    "said",
    "and",
    "upon",
    "time",
    "there",
    "was",
    "once",
    "house",
    "of",
    "in",
    "it",
    "she",
    "he",
    "water",
]
Requests = tuple[list[str], list[SamplingParams]]


def requests(count: int) -> Requests:
    """Text prompts with shared beginnings; stop strings and bad words in some requests only."""
    rng = random.Random(7)
    beginnings = [" ".join(rng.choices(WORDS, k=30)) for _ in range(4)]
    prompts, params = [], []
    for index in range(count):
        beginning = rng.choice(beginnings) if rng.random() < 0.5 else "Once"
        prompts.append(f"{beginning} {' '.join(rng.choices(WORDS, k=rng.randint(1, 10)))}")
        extra: dict[str, Any] = {"max_tokens": 20, "min_tokens": 0, "allowed_token_ids": None}
        if rng.random() < 0.4:
            extra["stop"] = rng.sample([" the", "and", ".", "e a", "ing"], 2)
            extra["include_stop_str_in_output"] = rng.random() < 0.5
        if rng.random() < 0.4:
            extra["bad_words"] = rng.sample(WORDS, 3)
        params.append(replace(random_params(rng, index), **extra))
    return prompts, params


def run(engine: Engine, given: Requests, *, alone: bool) -> list[Any]:
    prompts, params = given
    if alone:
        outputs = [engine.generate(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    else:
        outputs = engine.generate(prompts, params)
    texts = [[(sample.text, sample.stop_reason) for sample in output.outputs] for output in outputs]
    return list(zip(results(outputs), texts, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_text_fields(dtype: str) -> None:
    given, model = requests(300), str(GOLDEN / "glass-llama")
    with Engine(model, dtype=dtype, enable_prefix_caching=False) as engine:
        alone = run(engine, given, alone=True)
    for options in ({}, {"kv_cache_tokens": 160, "max_model_len": 128}, {"max_num_batched_tokens": 9}):
        with Engine(model, dtype=dtype, **options) as engine:
            assert run(engine, given, alone=False) == alone, options


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_quantised_weights(dtype: str) -> None:
    prompts, params = requests(16)
    few = [
        replace(one, logprobs=one.logprobs and abs(one.logprobs)) for one in params
    ]  # 49,152 floats a token add nothing
    given, model = (prompts, few), str(embedded_model())
    with Engine(model, dtype=dtype, enable_prefix_caching=False) as engine:
        alone = run(engine, given, alone=True)
    for options in ({"max_num_batched_tokens": 100}, {"num_threads": 1, "enable_prefix_caching": False}):
        with Engine(model, dtype=dtype, **options) as engine:
            assert run(engine, given, alone=False) == alone, options
