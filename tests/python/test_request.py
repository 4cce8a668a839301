"""SamplingParams: every wrong type is named; defaults are vLLM's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from astrai_rs import SamplingParams
from astrai_rs.request import core_arguments


def test_defaults():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (256, 0, None)
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), [], ())
    assert params.skip_special_tokens
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2


def test_accepted_forms():
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    params = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        top_p=1,
        stop_token_ids=np.array([1, 2]),
        logit_bias={np.int32(3): 1},
    )
    assert (params.n, params.temperature, params.top_p) == (2, 0.5, 1.0)
    assert type(params.n) is int
    assert type(params.top_p) is float
    assert params.stop_token_ids == [1, 2]
    assert params.logit_bias == {3: 1.0}
    assert SamplingParams(max_tokens=None).max_tokens is None


def test_arguments_of_the_core():
    arguments = core_arguments(SamplingParams(stop="x", bad_words=["y"]))
    left_out = {
        "stop",
        "bad_words",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "structured_outputs",
    }
    assert arguments.keys() == {field.name for field in dataclasses.fields(SamplingParams)} - left_out


INTS = ("n", "top_k", "min_tokens")
INTS_OR_NONE = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
FLOATS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p")
BOOLS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")


@pytest.mark.parametrize("value", [1.5, "1", True, [1]])
@pytest.mark.parametrize("name", [*INTS, *INTS_OR_NONE])
def test_integers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an int.*, not {type(value).__name__}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [*INTS, *FLOATS])
def test_not_none(name):
    with pytest.raises(TypeError, match=f"{name} must be .*, not NoneType None"):
        SamplingParams(**{name: None})


@pytest.mark.parametrize("value", ["0.5", True, [0.5], 1j])
@pytest.mark.parametrize("name", FLOATS)
def test_numbers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number, not {type(value).__name__}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", BOOLS)
def test_flags(name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, not int 1"):
        SamplingParams(**{name: 1})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"stop": 3}, TypeError, "stop must be a string or a list of strings, not int 3"),
        ({"stop": b"x"}, TypeError, "stop must be a string or a list of strings, not bytes"),
        ({"stop": ["a", 3]}, TypeError, "stop must be a string or a list of strings; it has int 3"),
        ({"stop": ""}, ValueError, "stop must not contain an empty string"),
        ({"stop": ["a", ""]}, ValueError, "stop must not contain an empty string"),
        ({"bad_words": "word"}, TypeError, "bad_words must be a list of strings, not str 'word'"),
        ({"bad_words": [1]}, TypeError, "bad_words must be a list of strings; it has int 1"),
        ({"bad_words": [""]}, ValueError, "bad_words must not contain an empty string"),
        ({"stop_token_ids": 3}, TypeError, "stop_token_ids must be a list of token ids, not int 3"),
        ({"stop_token_ids": "12"}, TypeError, "stop_token_ids must be a list of token ids, not str '12'"),
        ({"stop_token_ids": [1, "2"]}, TypeError, "stop_token_ids: each id must be an int, not str '2'"),
        ({"stop_token_ids": [True]}, TypeError, "stop_token_ids: each id must be an int, not bool True"),
        ({"allowed_token_ids": [1.0]}, TypeError, "allowed_token_ids: each id must be an int, not float 1.0"),
        (
            {"allowed_token_ids": {"a": 1}},
            TypeError,
            "allowed_token_ids must be a list of token ids, not dict",
        ),
        ({"logit_bias": [1]}, TypeError, "logit_bias must map token ids to numbers, not list"),
        ({"logit_bias": {"1": 1}}, TypeError, "logit_bias: each key must be an int, not str '1'"),
        ({"logit_bias": {1: "x"}}, TypeError, r"logit_bias\[1\] must be a number, not str 'x'"),
        (
            {"structured_outputs": {"yaml": ""}},
            ValueError,
            "structured_outputs has no field yaml; allowed: json, regex, choice, grammar",
        ),
        ({"best_of": 2}, TypeError, "unexpected keyword argument 'best_of'"),
    ],
)
def test_refusals(fields, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**fields)
