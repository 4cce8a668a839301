"""Every sampling field through the whole engine, against the numpy reference."""

from collections.abc import Iterator

import numpy as np
import pytest

from astrai_rs import Engine, SamplingParams
from reference import GOLDEN, Filters, Llama, chi_square_fits, log_softmax, read_safetensors

DRAWS = 3000


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(str(GOLDEN / "llama"), dtype="float32", kv_cache_tokens=16384) as engine:
        yield engine


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama()


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    ids = read_safetensors(GOLDEN / "llama" / "golden.safetensors")["input_ids"]
    return [int(token) for token in ids[0][:20]]


def test_the_reference_agrees_with_the_golden_logits(model: Llama) -> None:
    golden = read_safetensors(GOLDEN / "llama" / "golden.safetensors")
    logits = model.logits([int(token) for token in golden["input_ids"][0]])
    assert np.abs(logits - golden["logits"][0, -1]).max() < 1e-4


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.3},
        {"top_p": 0.9, "temperature": 1.7},
        {"min_p": 0.2},
        {"min_p": 0.05, "top_k": 12, "top_p": 0.8, "temperature": 1.3},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "top_k": 20},
        {"logit_bias": {3: 4.0, 100: -7.5}},
        {"allowed_token_ids": [1, 5, 9, 77, 127]},
        {"allowed_token_ids": [1, 5, 9], "logit_bias": {5: 2.0}, "top_p": 0.7},
    ],
    ids=str,
)
def test_first_draws_follow_the_filtered_distribution(
    engine: Engine, model: Llama, prompt: list[int], fields: dict
) -> None:
    params = [SamplingParams(max_tokens=1, seed=seed, ignore_eos=True, **fields) for seed in range(DRAWS)]
    outputs = engine.generate([prompt] * DRAWS, params)
    expected = Filters(**fields).probabilities(model.logits(prompt), prompt)
    assert chi_square_fits([output.token_ids[0] for output in outputs], expected)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"frequency_penalty": -0.4, "presence_penalty": 2.0},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.8, "frequency_penalty": 1.0, "presence_penalty": 0.5},
        {"logit_bias": {17: 3.0}, "frequency_penalty": 0.5},
    ],
    ids=str,
)
def test_greedy_honours_penalties_at_every_step(
    engine: Engine, model: Llama, prompt: list[int], fields: dict
) -> None:
    output = engine.generate(prompt, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, **fields))
    for step, token in enumerate(output.token_ids):
        seen = output.token_ids[:step]
        logits = Filters(**fields).penalised(model.logits(prompt + seen), prompt, seen)
        assert logits[token] >= logits.max() - 1e-4, f"step {step}"


def test_draws_of_later_tokens_follow_the_penalised_distribution(
    engine: Engine, model: Llama, prompt: list[int]
) -> None:
    fields = {"presence_penalty": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.3}
    forced = {"allowed_token_ids": [40, 41]}
    params = [
        SamplingParams(max_tokens=4, seed=seed, ignore_eos=True, **fields, **forced) for seed in range(DRAWS)
    ]
    outputs = engine.generate([prompt] * DRAWS, params)
    by_history: dict[tuple[int, ...], list[int]] = {}
    for output in outputs:
        by_history.setdefault(tuple(output.token_ids[:3]), []).append(output.token_ids[3])
    for history, drawn in by_history.items():
        filters = Filters(**fields, **forced)
        expected = filters.probabilities(model.logits([*prompt, *history]), prompt, history)
        assert chi_square_fits(drawn, expected), history


def test_logprobs_are_natural_logs_of_the_raw_softmax(
    engine: Engine, model: Llama, prompt: list[int]
) -> None:
    params = SamplingParams(max_tokens=8, seed=3, temperature=1.9, top_k=9, logprobs=-1, ignore_eos=True)
    output = engine.generate(prompt, params)
    assert output.logprobs is not None
    for step, entries in enumerate(output.logprobs):
        expected = log_softmax(model.logits(prompt + output.token_ids[:step]))
        given = np.array([entries[token].logprob for token in range(len(expected))])
        assert abs(np.log(np.exp(given).sum())) < 1e-5  # natural logs, of the whole softmax
        assert np.abs(given - expected).max() < 1e-4  # the forward passes differ by float32's rounding
        ranks = np.array([entries[token].rank for token in range(len(expected))])
        assert sorted(ranks)[0] == 1
        assert ranks[int(given.argmax())] == 1


def test_top_logprobs_hold_the_best_and_the_sampled_token(
    engine: Engine, model: Llama, prompt: list[int]
) -> None:
    output = engine.generate(
        prompt, SamplingParams(max_tokens=6, seed=1, temperature=3.0, logprobs=3, ignore_eos=True)
    )
    assert output.logprobs is not None
    for step, entries in enumerate(output.logprobs):
        expected = log_softmax(model.logits(prompt + output.token_ids[:step]))
        best = {int(token) for token in np.argsort(-expected)[:3]}
        assert set(entries) == best | {output.token_ids[step]}


def test_prompt_logprobs_score_every_prompt_token(engine: Engine, model: Llama, prompt: list[int]) -> None:
    output = engine.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=2))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for position in range(1, len(prompt)):
        entries = output.prompt_logprobs[position]
        expected = log_softmax(model.logits(prompt[:position]))
        assert entries is not None
        assert abs(entries[prompt[position]].logprob - expected[prompt[position]]) < 1e-4
        assert {int(token) for token in np.argsort(-expected)[:2]} <= set(entries)


def test_min_tokens_forbids_stop_ids_until_reached(engine: Engine, model: Llama, prompt: list[int]) -> None:
    greedy = engine.generate(prompt, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)).token_ids
    stop = greedy[2]
    params = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[stop], ignore_eos=True)
    early = engine.generate(prompt, params)
    assert early.finish_reason == "stop"
    assert early.stop_reason == stop
    assert early.token_ids == greedy[: greedy.index(stop) + 1]
    late = engine.generate(
        prompt,
        SamplingParams(max_tokens=12, min_tokens=8, temperature=0, stop_token_ids=[stop], ignore_eos=True),
    )
    assert stop not in late.token_ids[:8]
    filters = Filters(forbidden=[stop])
    for step in range(8):
        logits = filters.penalised(
            model.logits(prompt + late.token_ids[:step]), prompt, late.token_ids[:step]
        )
        assert logits[late.token_ids[step]] >= logits.max() - 1e-4


def test_samples_of_one_request_differ_and_replay(engine: Engine, prompt: list[int]) -> None:
    params = SamplingParams(n=8, max_tokens=10, temperature=2.0, seed=5, ignore_eos=True)
    first = engine.generate(prompt, params)
    again = engine.generate(prompt, params)
    ids = [output.token_ids for output in first.outputs]
    assert ids == [output.token_ids for output in again.outputs]
    assert len({tuple(sample) for sample in ids}) > 4
