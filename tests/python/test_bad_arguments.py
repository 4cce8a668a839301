"""Every argument of the Python surface has a case here that is refused with a message that helps.

`SamplingParams` checks types at once (test_request.py); values are refused when a request is made.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import shutil

import pytest

from astrai_rs import ChatTemplate, CheckpointError, Engine, SamplingParams
from astrai_rs.model import AutoModel
from conftest import FIXTURES, GLASS, NO_CUDA, assert_idle, unless_cuda_works

ENGINE = [
    ({"model": 3}, TypeError, "model must be a path or a hub id, not int"),
    ({"model": "/no/such"}, FileNotFoundError, "/no/such: no such file or folder"),
    ({"tokenizer": 3}, TypeError, "tokenizer must have encode and decode; int has no encode"),
    ({"tokenizer": "/no/such"}, FileNotFoundError, "/no/such: no such file or folder"),
    ({"device": "tpu"}, ValueError, 'device must be one of auto, cpu, cuda; given: "tpu"'),
    ({"device": 5}, TypeError, "device: 'int' object is not an instance of 'str'; given: 5"),
    ({"dtype": "int3"}, ValueError, 'dtype must be one of auto, float32, bfloat16, float16; given: "int3"'),
    ({"dtype": None}, TypeError, "dtype: 'None' is not an instance of 'str'; given: None"),
    ({"max_model_len": 129}, ValueError, "max_model_len must be at most 128"),
    ({"max_model_len": -1}, ValueError, "max_model_len must be at least 1; given: -1"),
    ({"max_model_len": 1.5}, TypeError, "max_model_len must be an integer; given: 1.5"),
    ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be at least 1; given: 0"),
    ({"max_num_seqs": None}, TypeError, "max_num_seqs must be an integer; given: None"),
    (
        {"gpu_memory_utilization": 1.5},
        ValueError,
        "gpu_memory_utilization must be above 0 and at most 1; given: 1.5",
    ),
    ({"max_num_batched_tokens": -3}, ValueError, "max_num_batched_tokens must be at least 1; given: -3"),
    ({"kv_cache_tokens": 10**13}, MemoryError, "a KV cache of 10000000000000 tokens needs"),
    (
        {"kv_cache_dtype": "fp8"},
        ValueError,
        'kv_cache_dtype must be one of auto, int8; given: "fp8"',
    ),
    ({"kv_cache_tokens": 0}, ValueError, "kv_cache_tokens must be at least 1; given: 0"),
    ({"enable_prefix_caching": "no"}, TypeError, "enable_prefix_caching: 'str' object is not an instance of"),
    ({"num_threads": 0}, ValueError, "num_threads must be at least 1; given: 0"),
    ({"num_threads": 10**9}, ValueError, "num_threads must be at most 1024; given: 1000000000"),
    (
        {"max_num_seqs": 2**64},
        ValueError,
        "max_num_seqs must be at most 9223372036854775807; given: 18446744073709551616",
    ),
    ({"num_threads": True}, TypeError, "num_threads must be an integer; given: True"),
    ({"packed_cache": ""}, ValueError, "packed_cache must not be empty"),
    (
        {"packed_cache": 5},
        TypeError,
        "packed_cache: expected str, bytes or os.PathLike object, not int; given: 5",
    ),
    ({"seed": -5}, ValueError, "seed must be between 0 and 18446744073709551615"),
    ({"seed": 2**64}, ValueError, "seed must be between 0 and 18446744073709551615"),
    ({"gpu_memory": 1}, TypeError, "unexpected keyword argument 'gpu_memory'"),
]

VOCABULARY = "must hold token ids between 0 and 1023; given: "
UP_TO_ALL = "must be between 0 and 1024 (the vocabulary), or -1 for all of it; given: "

SAMPLING = [
    ({"n": 0}, "n must be between 1 and 1024; given: 0"),
    ({"n": 10**6}, "n must be between 1 and 1024; given: 1000000"),
    ({"presence_penalty": 3.0}, "presence_penalty must be between -2 and 2; given: 3"),
    ({"frequency_penalty": -3.0}, "frequency_penalty must be between -2 and 2; given: -3"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and finite; given: 0"),
    ({"temperature": -0.1}, "temperature must be a finite number of at least 0; given: -0.1"),
    ({"temperature": float("nan")}, "temperature must be a finite number of at least 0; given: NaN"),
    ({"top_p": 0}, "top_p must be above 0 and at most 1; given: 0"),
    ({"top_p": 1.1}, "top_p must be above 0 and at most 1; given: 1.1"),
    ({"top_k": -2}, "top_k must be at least 1, or 0 or -1 for all ids; given: -2"),
    ({"min_p": 1.1}, "min_p must be between 0 and 1; given: 1.1"),
    ({"seed": -2}, "seed must be between 0 and 18446744073709551615, or -1 for a random one; given: -2"),
    ({"seed": 2**64}, "seed must be between 0 and 18446744073709551615"),
    ({"stop": ""}, "stop must not contain an empty string"),
    ({"stop_token_ids": [-1]}, f"stop_token_ids {VOCABULARY}-1"),
    ({"max_tokens": 0}, "max_tokens must be at least 1; given: 0"),
    ({"min_tokens": -1}, "min_tokens must be at least 0; given: -1"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be at most max_tokens (8); given: 9"),
    ({"logprobs": 1025}, f"logprobs {UP_TO_ALL}1025"),
    ({"prompt_logprobs": -2}, f"prompt_logprobs {UP_TO_ALL}-2"),
    ({"logit_bias": {10**6: 1.0}}, f"logit_bias {VOCABULARY}1000000"),
    ({"logit_bias": {5: 101}}, "logit_bias[5] must be between -100 and 100; given: 101"),
    ({"allowed_token_ids": []}, "allowed_token_ids must hold at least one id; given: []"),
    ({"allowed_token_ids": [1024]}, f"allowed_token_ids {VOCABULARY}1024"),
    ({"bad_words": [""]}, "bad_words must not contain an empty string"),
]

PROMPTS = [
    (3, TypeError, "prompts must be a string, a list of token ids, or a list of these, not int"),
    (b"x", TypeError, "prompts must be a string, a list of token ids, or a list of these, not bytes"),
    ({"a": 1}, TypeError, "prompts must be a string, a list of token ids, or a list of these, not dict"),
    (["a", None], TypeError, "a prompt must be a list of token ids, not NoneType None"),
    ([["a"]], TypeError, "a prompt: each id must be an int, not str 'a'"),
    ([[1, True]], TypeError, "a prompt: each id must be an int, not bool True"),
    ([[1.0]], TypeError, "a prompt: each id must be an int, not float 1.0"),
    ("", ValueError, "the prompt must hold at least one token"),
    ([[]], ValueError, "the prompt must hold at least one token"),
    ([-1], ValueError, "prompt token ids must be between 0 and 1023; given: -1"),
    ([1024], ValueError, "prompt token ids must be between 0 and 1023; given: 1024"),
    ([2**40], ValueError, "prompt token ids must be between 0 and 1023; given: 1099511627776"),
    ([2**70], ValueError, "a prompt: 1180591620717411303424 is not a token id"),
    ([5] * 128, ValueError, "at most 127 tokens; given: 128"),
    ("word " * 200, ValueError, "at most 127 tokens; given: "),
]

USER = [{"role": "user", "content": "a"}]
CALLS = [
    ("generate", {"prompts": "a", "sampling_params": {"n": 1}}, TypeError,
     "sampling_params must be SamplingParams or a list of them, not dict"),
    ("generate", {"prompts": "a", "sampling_params": ["n"]}, TypeError,
     "sampling_params must be SamplingParams, not str"),
    ("generate", {"prompts": ["a"], "sampling_params": [SamplingParams()] * 2}, ValueError,
     "2 given for 1 prompts; give one for all or one each"),
    ("generate", {"prompts": "a", "progress": 3}, TypeError,
     "progress must be True, False or a function, not int 3"),
    ("stream", {"prompt": 3}, TypeError, "a prompt must be a list of token ids, not int 3"),
    ("stream", {"prompt": []}, ValueError, "the prompt must hold at least one token"),
    ("stream", {"prompt": "a", "sampling_params": {"n": 1}}, TypeError,
     "sampling_params must be SamplingParams, not dict"),
    ("stream", {"prompt": "a", "sampling_params": SamplingParams(top_p=2)}, ValueError, "top_p must be"),
    ("astream", {"prompt": 3}, TypeError, "a prompt must be a list of token ids, not int 3"),
    ("astream", {"prompt": "a", "sampling_params": SamplingParams(top_p=2)}, ValueError, "top_p must be"),
    ("chat", {"messages": "hello"}, TypeError, "messages must be a list of dicts, not str"),
    ("chat", {"messages": []}, ValueError, "messages is empty: a chat template needs at least one message"),
    ("chat", {"messages": ["hello"]}, TypeError, "each message must be a dict with 'role' and 'content'"),
    ("chat", {"messages": USER, "sampling_params": 1}, TypeError,
     "sampling_params must be SamplingParams or a list of them, not int"),
    ("chat", {"messages": USER, "tools": ["f"]}, TypeError, "each of tools must be a dict, not str"),
    ("chat", {"messages": USER, "chat_template": "{% if"}, ValueError, "the chat template failed: "),
    ("chat", {"messages": USER, "chat_template": "{{ raise_exception('no users') }}"}, ValueError,
     "the chat template failed: no users"),
    ("chat", {"messages": USER, "chat_template": "{{ messages.nothing.more }}"}, ValueError,
     "the chat template failed: "),
    ("chat", {"messages": USER, "chat_template": "{{ ''.__class__ }}{{ [].append(1) }}"}, ValueError,
     "the chat template failed: "),
    ("chat", {"messages": [{"role": "user"}], "continue_final_message": True}, ValueError,
     "the final message has no 'content'"),
    ("chat", {"messages": USER, "chat_template_kwargs": 3}, TypeError,
     "chat_template_kwargs must be a mapping, not int 3"),
    ("chat", {"messages": USER, "add_generation_prompt": 3}, TypeError,
     "add_generation_prompt must be True or False, not int 3"),
    ("chat", {"messages": USER, "progress": "yes"}, TypeError,
     "progress must be True, False or a function, not str 'yes'"),
]  # fmt: skip

WITHOUT_TOKENIZER = [
    (lambda e: e.generate("text"), "a text prompt needs a tokenizer, and this model has none"),
    (lambda e: e.generate([97], SamplingParams(stop="x")), "stop strings need a tokenizer, and this model"),
    (lambda e: e.generate([97], SamplingParams(bad_words=["x"])), "bad_words need a tokenizer, and this"),
    (lambda e: e.chat(USER), "chat needs a tokenizer with a chat template, and this model has none"),
]


@pytest.mark.parametrize(("options", "error", "message"), ENGINE, ids=str)
def test_engine(options, error, message):
    with pytest.raises(error) as caught:
        Engine(**({"model": GLASS} | options))
    assert message in str(caught.value)


@unless_cuda_works
def test_a_gpu_that_cannot_be_used():
    error, message = NO_CUDA
    with pytest.raises(error, match=message):
        Engine(GLASS, device="cuda")


@pytest.mark.parametrize(("fields", "message"), SAMPLING, ids=str)
def test_sampling_params(glass, fields, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        glass.generate("a", SamplingParams(**fields))
    assert message in str(caught.value)


@pytest.mark.parametrize(("prompt", "error", "message"), PROMPTS, ids=lambda value: str(value)[:40])
def test_prompts(glass, prompt, error, message):
    with pytest.raises(error) as caught:
        glass.generate(prompt)
    assert message in str(caught.value)


@pytest.mark.parametrize(("method", "arguments", "error", "message"), CALLS, ids=str)
def test_calls(glass, method, arguments, error, message):
    async def call():
        return getattr(glass, method)(**arguments)

    with pytest.raises(error) as caught:
        asyncio.run(call())
    assert message in str(caught.value)


def test_refusals_leave_nothing(glass):
    assert_idle(glass)


@pytest.mark.parametrize(("call", "message"), WITHOUT_TOKENIZER)
def test_without_tokenizer(call, message):
    with Engine(FIXTURES / "golden/llama") as engine, pytest.raises(ValueError) as caught:  # noqa: PT011
        call(engine)
    assert message in str(caught.value)


def arguments(function):
    return set(inspect.signature(function).parameters) - {"self", "cls"}


def test_every_argument_has_a_case():
    assert {name for options, *_ in ENGINE for name in options} >= arguments(Engine)
    not_values = {"include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "structured_outputs"}
    fields = {field.name for field in dataclasses.fields(SamplingParams)} - not_values
    assert {name for given, _ in SAMPLING for name in given} == fields
    for method in ("generate", "stream", "astream", "chat"):
        tried = {name for called, given, *_ in CALLS if called == method for name in given}
        assert tried >= arguments(getattr(Engine, method)), method


# Files


@pytest.fixture
def copy(tmp_path):
    for file in GLASS.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def edit(file, **changes):
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def cut(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: (p / "config.json").write_text("{"), ValueError, "config.json: "),
        (lambda p: edit(p / "config.json", hidden_size=None), CheckpointError, 'config.json: "hidden_size"'),
        (lambda p: edit(p / "config.json", model_type="mamba"), NotImplementedError, "mamba"),
        (lambda p: edit(p / "config.json", intermediate_size=300), CheckpointError, "mlp."),
        (lambda p: cut(p / "model.safetensors"), CheckpointError, "model.safetensors: "),
        (lambda p: (p / "model.safetensors").unlink(), CheckpointError, "neither model.safetensors nor"),
        (lambda p: cut(p / "tokenizer.json"), ValueError, "tokenizer.json: "),
        (lambda p: cut(p / "tokenizer_config.json"), ValueError, "tokenizer_config.json: not valid JSON"),
        (lambda p: cut(p / "generation_config.json"), ValueError, "generation_config.json: not valid JSON"),
        (lambda p: edit(p / "tokenizer_config.json", chat_template=3), ValueError,
         "tokenizer_config.json: chat_template must be a string or a list of named templates; given: 3"),
        (lambda p: edit(p / "tokenizer_config.json", chat_template=[3]), ValueError,
         "tokenizer_config.json: chat_template"),
        (lambda p: edit(p / "tokenizer_config.json", added_tokens_decoder={"x": {}}), ValueError,
         "tokenizer_config.json: added_tokens_decoder"),
        (lambda p: edit(p / "tokenizer_config.json", added_tokens_decoder=[3]), ValueError,
         "tokenizer_config.json: added_tokens_decoder"),
        (lambda p: edit(p / "config.json", text_config=3), ValueError, "config.json: "),
    ],
)  # fmt: skip
def test_broken_folders(copy, change, error, message):
    change(copy)
    with pytest.raises(error) as caught:
        Engine(copy)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", CheckpointError, "m.gguf"),
        (b"GGUF\x03", CheckpointError, "m.gguf"),
        (b"not a model", CheckpointError, "m.gguf"),
        (b"GGUF" + bytes([3, 0, 0, 0]) + bytes(16), ValueError, "m.gguf"),
    ],
)
def test_broken_gguf_files(tmp_path, content, error, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(error) as caught:
        Engine(tmp_path / "m.gguf")
    assert message in str(caught.value)


def test_a_config_that_is_no_object(copy):
    (copy / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: .*object"):
        AutoModel.from_pretrained(copy)


def test_a_broken_chat_template_does_not_stop_the_engine(copy):
    edit(copy / "tokenizer_config.json", chat_template="{% for")
    with Engine(copy) as engine:
        assert engine.generate("Once", SamplingParams(max_tokens=3)).text
        with pytest.raises(ValueError, match="the chat template failed"):
            engine.chat(USER)
    with pytest.raises(ValueError, match="the chat template failed"):
        ChatTemplate("{% for").render(USER)


def test_integers_of_other_libraries_are_taken():
    class Two:
        def __index__(self):
            return 2

    with Engine(GLASS, num_threads=Two(), max_num_seqs=Two()) as engine:
        assert engine.num_threads == 2
