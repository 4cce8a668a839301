"""Batch invariance, bitwise: same ids and logprobs whatever shares a request's batch, cache and chunks."""

import random
from typing import Any

import pytest

from astrai_rs import Engine, SamplingParams
from reference import GOLDEN

REQUESTS = 300
VOCAB = 128
Result = list[tuple[list[int], list[dict[int, float]] | None, str | None]]


def random_params(rng: random.Random, index: int) -> SamplingParams:
    """A mixture over every sampling field; each is set in some requests only."""
    fields: dict[str, Any] = {
        "seed": index,
        "max_tokens": rng.randint(1, 48),
        "ignore_eos": rng.random() < 0.7,
    }

    def sometimes(name: str, value: Any, chance: float = 0.3) -> None:
        if rng.random() < chance:
            fields[name] = value

    sometimes("temperature", rng.choice([0.0, 0.3, 0.9, 1.8]), 0.8)
    sometimes("n", rng.randint(2, 4), 0.15)
    sometimes("top_k", rng.randint(1, 40))
    sometimes("top_p", rng.uniform(0.2, 0.99))
    sometimes("min_p", rng.uniform(0.01, 0.3))
    sometimes("presence_penalty", rng.uniform(-2, 2))
    sometimes("frequency_penalty", rng.uniform(-2, 2))
    sometimes("repetition_penalty", rng.uniform(0.5, 1.9))
    sometimes("logit_bias", {rng.randrange(VOCAB): rng.uniform(-5, 5) for _ in range(3)})
    sometimes("allowed_token_ids", rng.sample(range(VOCAB), 30), 0.1)
    sometimes("stop_token_ids", rng.sample(range(VOCAB), 3))
    sometimes("min_tokens", rng.randint(0, fields["max_tokens"]))
    sometimes("logprobs", rng.choice([0, 1, 5, -1]), 0.5)
    sometimes("prompt_logprobs", rng.choice([0, 2]), 0.1)
    return SamplingParams(**fields)


def random_requests(count: int = REQUESTS) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that often share prefixes, some longer than a block, a few longer than a window."""
    rng = random.Random(20)
    prefixes = [[rng.randrange(VOCAB) for _ in range(rng.choice([16, 33, 48]))] for _ in range(6)]
    prompts = []
    for _ in range(count):
        prefix = rng.choice(prefixes) if rng.random() < 0.6 else []
        prompts.append(prefix + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))])
    return prompts, [random_params(rng, index) for index in range(count)]


def results(outputs: list[Any]) -> list[Result]:
    """Everything that must be equal, floats as they are."""

    def plain(logprobs: Any) -> Any:
        return logprobs and [
            entry and {token: value.logprob for token, value in entry.items()} for entry in logprobs
        ]

    return [
        [(sample.token_ids, plain(sample.logprobs), sample.finish_reason) for sample in output.outputs]
        + [([], plain(output.prompt_logprobs), None)]
        for output in outputs
    ]


def generate(model: str, requests: Any, *, alone: bool = False, **options: Any) -> list[Result]:
    prompts, params = requests
    with Engine(str(GOLDEN / model), **options) as engine:
        if alone:
            return results([engine.generate(p, s) for p, s in zip(prompts, params, strict=True)])
        outputs = engine.generate(prompts, params)
        if "kv_cache_tokens" in options:
            assert engine.stats()["preemptions"] > 5, "the small cache must preempt"
        return results(outputs)


VARIANTS: dict[str, dict[str, Any]] = {
    "batched": {"enable_prefix_caching": False},
    "prefix hits": {},
    "preemption": {"kv_cache_tokens": 160, "max_model_len": 144, "enable_prefix_caching": False},
    "preemption and prefix hits": {"kv_cache_tokens": 208, "max_model_len": 144},
    "budget 1": {"max_num_batched_tokens": 1, "max_num_seqs": 5},
    "budget 7": {"max_num_batched_tokens": 7},
    "budget 64": {"max_num_batched_tokens": 64, "max_num_seqs": 17},
    "one thread": {"num_threads": 1},
    "three threads": {"num_threads": 3},
}


@pytest.mark.parametrize(
    ("model", "dtype", "kv_cache_dtype"),
    [("llama", dtype, "auto") for dtype in ("float32", "auto", "bfloat16", "float16")]
    + [("mistral-swa", dtype, "auto") for dtype in ("float32", "auto")]
    + [("astrai-qknorm-gated", dtype, "auto") for dtype in ("float32", "auto")]
    + [(model, "auto", "int8") for model in ("llama", "mistral-swa", "astrai-24q4kv")],
)
def test_batch_invariance(model: str, dtype: str, kv_cache_dtype: str) -> None:
    requests = random_requests()
    always = {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype}
    alone = generate(model, requests, alone=True, enable_prefix_caching=False, **always)
    for name, options in VARIANTS.items():
        given = generate(model, requests, **always, **options)
        different = [index for index in range(REQUESTS) if given[index] != alone[index]]
        assert not different, f"{name}: requests {different[:10]} differ"
