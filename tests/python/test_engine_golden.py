"""The real core: golden texts and ids, streams, the embedded model."""

from __future__ import annotations

import asyncio
import json

import pytest

from astrai_rs import Engine, SamplingParams
from astrai_rs.model import embedded_model
from conftest import FIXTURES, GLASS

SMOLLM2 = json.loads((FIXTURES / "golden/smollm2-135m/golden.json").read_text(encoding="utf-8"))


def greedy(case, **options):
    return SamplingParams(temperature=0, max_tokens=len(case["greedy_ids"]), **options)


def test_glass_text_ids_and_logprobs(glass, cases):
    outs = glass.generate([case["prompt"] for case in cases], [greedy(case, logprobs=0) for case in cases])
    for case, out in zip(cases, outs, strict=True):
        assert out.prompt_token_ids == case["prompt_ids"]
        assert out.token_ids == case["greedy_ids"]
        assert out.text == case["text"]
        got = [row[token].logprob for row, token in zip(out.logprobs, out.token_ids, strict=True)]
        assert got == pytest.approx(case["logprobs"], abs=2e-3)
        assert out.metrics.finished_time >= out.metrics.first_token_time >= out.metrics.arrival_time


def test_streams_give_the_same(glass, cases):
    case = cases[0]
    assert "".join(piece.text for piece in glass.stream(case["prompt"], greedy(case))) == case["text"]

    async def gather():
        async def one(case):
            return "".join([piece.text async for piece in glass.astream(case["prompt"], greedy(case))])

        return await asyncio.gather(*[one(case) for case in cases])

    assert asyncio.run(gather()) == [case["text"] for case in cases]


def test_max_tokens_none_fills_the_context(glass, cases):
    out = glass.generate(cases[0]["prompt_ids"], SamplingParams(max_tokens=None, ignore_eos=True, seed=1))
    assert len(out.prompt_token_ids) + len(out.token_ids) == glass.max_model_len
    assert out.finish_reason == "length"


def smollm2_errors(**options):
    """Absolute errors of the stored top-5 logprobs, teacher-forced: the stored answer follows the prompt."""
    prompts = [case["prompt_ids"] + case["greedy_ids"] for case in SMOLLM2]
    with Engine(embedded_model(), **options) as engine:
        outs = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=100))
    return [
        abs(entries[token].logprob - logprob)
        for case, out in zip(SMOLLM2, outs, strict=True)
        for entries, top in zip(out.prompt_logprobs[len(case["prompt_ids"]) :], case["logprobs"], strict=True)
        for token, logprob in top
    ]


@pytest.mark.parametrize(
    ("options", "mean", "p99"),
    [({"dtype": "float32"}, 2e-3, 5e-3), ({}, 0.03, 0.15), ({"kv_cache_dtype": "int8"}, 0.045, 0.25)],
)
def test_smollm2_logprobs(options, mean, p99):
    errors = sorted(smollm2_errors(**options))
    assert sum(errors) / len(errors) <= mean
    assert errors[len(errors) * 99 // 100] <= p99


def test_smollm2_chat():
    cases = SMOLLM2
    with Engine(embedded_model(), dtype="float32") as engine:
        params = [greedy(case) for case in cases]
        outs = engine.chat([case["messages"] for case in cases], params)
        for case, out in zip(cases, outs, strict=True):
            assert out.prompt_token_ids == case["prompt_ids"]
            assert out.token_ids == case["greedy_ids"]
            assert out.text == case["text"]


def test_packed_weights_are_kept_where_it_is_said(cases, tmp_path):
    folder, case, written = tmp_path / "packed", cases[0], []
    for _ in range(2):
        with Engine(GLASS, packed_cache=folder) as engine:
            assert engine.generate(case["prompt"], greedy(case)).text == case["text"]
        (file,) = folder.iterdir()
        written.append(file.stat().st_ino)
    assert file.suffix == ".packed"
    assert written[0] == written[1]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="packed_cache: .*file: "):
        Engine(GLASS, packed_cache=tmp_path / "file")
