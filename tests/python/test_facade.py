"""`Engine` over the story model: forms of prompts, samples, texts and stops, streams, chat."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from astrai_rs import Engine, GenerationOutput, SamplingParams
from conftest import FIXTURES, GLASS, assert_idle, wait_until

EOS = 3
LONG = SamplingParams(max_tokens=30_000)
ENDS_AT_ONCE = {"logit_bias": {EOS: 100.0}}


def greedy(case, **fields):
    return SamplingParams(**({"temperature": 0, "max_tokens": len(case["greedy_ids"])} | fields))


@pytest.fixture
def case(cases):
    return cases[0]


def test_one_prompt_gives_one_output(glass, case):
    out = glass.generate(case["prompt"], greedy(case))
    assert isinstance(out, GenerationOutput)
    assert (out.prompt, out.prompt_token_ids) == (case["prompt"], case["prompt_ids"])
    assert (out.text, out.token_ids) == (case["text"], case["greedy_ids"])
    assert (out.finish_reason, out.stop_reason) == ("length", None)
    assert out.metrics.finished_time >= out.metrics.first_token_time >= out.metrics.arrival_time
    assert (out.logprobs, out.prompt_logprobs) == (None, None)
    assert len(glass.generate(case["prompt"]).outputs) == 1


def test_ids_as_prompt(glass, case):
    ids, params = case["prompt_ids"], greedy(case)
    for prompt in (ids, tuple(ids), np.array(ids), range(*ids[:2])):
        out = glass.generate(prompt, params)
        assert out.prompt is None
        assert out.text == case["text"] or isinstance(prompt, range)
    outs = glass.generate([np.array(ids), np.array(ids[:1])], params)
    assert [out.prompt_token_ids for out in outs] == [ids, ids[:1]]


def test_list_keeps_order_and_mixes_texts_and_ids(glass, case):
    prompts = [f"Once {'upon ' * (i % 7)}{i}" for i in range(50)] + [case["prompt_ids"]]
    params = greedy(case, max_tokens=5)
    outs = glass.generate(prompts, params)
    assert [out.token_ids for out in outs] == [glass.generate(p, params).token_ids for p in prompts]
    assert [out.prompt for out in outs] == [*prompts[:-1], None]
    assert glass.generate([]) == []


def test_params_one_each(glass):
    outs = glass.generate(["a", "b"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)])
    assert [len(out.token_ids) for out in outs] == [2, 3]


def test_n_samples(glass):
    params = SamplingParams(n=3, seed=5, max_tokens=12)
    out = glass.generate("Once", params)
    assert [sample.index for sample in out.outputs] == [0, 1, 2]
    assert len({sample.text for sample in out.outputs}) == 3
    assert out.text == out.outputs[0].text
    texts = ["", "", ""]
    for piece in glass.stream("Once", params):
        texts[piece.index] += piece.text
    assert texts == [sample.text for sample in out.outputs]


def test_logprobs(glass, case):
    out = glass.generate(case["prompt"], greedy(case, logprobs=2, prompt_logprobs=0))
    assert len(out.logprobs) == len(out.token_ids)
    for token, entries in zip(out.token_ids, out.logprobs, strict=True):
        first, *others = entries.items()
        assert (first[0], first[1].rank) == (token, 1)
        assert first[1].decoded_token == glass.tokenizer.id_to_text(token)
        assert [entry.rank for _, entry in others] == [2]
        assert 0 >= first[1].logprob >= others[0][1].logprob
    assert out.prompt_logprobs[0] is None
    assert [list(entries) for entries in out.prompt_logprobs[1:]] == [[id] for id in case["prompt_ids"][1:]]


def test_text_ends_before_the_stop_token(glass, case):
    ids = case["greedy_ids"]
    decode = glass.tokenizer.decode
    out = glass.generate(case["prompt"], greedy(case, stop_token_ids=[ids[4]]))
    assert (out.finish_reason, out.stop_reason, out.token_ids) == ("stop", ids[4], ids[:5])
    assert out.text == decode(ids[:4])
    included = greedy(case, stop_token_ids=[ids[4]], include_stop_str_in_output=True)
    assert glass.generate(case["prompt"], included).text == decode(ids[:5])


def test_end_of_text(glass, case):
    out = glass.generate(case["prompt"], greedy(case, **ENDS_AT_ONCE, skip_special_tokens=False))
    assert (out.text, out.token_ids, out.finish_reason, out.stop_reason) == ("", [EOS], "stop", None)
    shown = greedy(case, **ENDS_AT_ONCE, skip_special_tokens=False, include_stop_str_in_output=True)
    assert glass.generate(case["prompt"], shown).text == "<eos>"
    goes_on = greedy(case, **ENDS_AT_ONCE, ignore_eos=True, skip_special_tokens=False, max_tokens=3)
    assert glass.generate(case["prompt"], goes_on).text == "<eos>" * 3
    later = glass.generate(case["prompt"], greedy(case, **ENDS_AT_ONCE, min_tokens=4))
    assert later.token_ids == [*case["greedy_ids"][:4], EOS]


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_cuts_text_ids_and_logprobs(glass, case, include):
    stop = case["text"][10:16]
    fields = {"stop": ["zzz", stop], "include_stop_str_in_output": include, "logprobs": 0, "n": 2}
    for out in glass.generate(case["prompt"], greedy(case, **fields)).outputs:
        assert out.text == case["text"][: case["text"].index(stop) + include * len(stop)]
        assert (out.finish_reason, out.stop_reason) == ("stop", stop)
        assert out.token_ids == case["greedy_ids"][: len(out.token_ids)]
        assert stop in glass.tokenizer.decode(out.token_ids)
        assert len(out.logprobs) == len(out.token_ids) < len(case["greedy_ids"])
        assert out.metrics is not None, "the last event after the abort brings the metrics"
    assert_idle(glass)


def test_min_tokens_delays_stop_strings(glass, case):
    text, stop = case["text"], " the"
    first = glass.generate(case["prompt"], greedy(case, stop=stop))
    assert first.text == text[: text.index(stop)]
    needed = len(first.token_ids)
    same = glass.generate(case["prompt"], greedy(case, stop=stop, min_tokens=needed - 1))
    assert same.text == first.text
    second = glass.generate(case["prompt"], greedy(case, stop=stop, min_tokens=needed))
    assert second.text == text[: text.index(stop, text.index(stop) + 1)]


def test_bad_words_with_and_without_a_space_before(glass, case):
    words = ["the", "table"]
    assert all(word in case["text"].split() for word in ("the",))
    out = glass.generate(case["prompt"], greedy(case, bad_words=words))
    assert not set(out.text.replace(",", " ").split()) & set(words)


def test_stream(glass, cases):
    for case in cases:
        pieces = list(glass.stream(case["prompt"], greedy(case)))
        assert "".join(piece.text for piece in pieces) == case["text"]
        assert [token for piece in pieces for token in piece.token_ids] == case["greedy_ids"]
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == "length"
        assert pieces[-1].metrics is not None
    assert_idle(glass)


def test_no_part_of_a_stop_string_is_streamed(glass, case):
    stop = case["text"][20:40]
    seen = ""
    for piece in glass.stream(case["prompt"], greedy(case, stop=stop)):
        seen += piece.text
        assert case["text"][:20].startswith(seen)
    assert seen == case["text"][:20]


def test_progress(glass, case, capsys):
    seen = []
    glass.generate(["a", "b", "c"], greedy(case), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    glass.generate(["a", "b"], greedy(case), progress=True)
    assert "2/2 prompts" in capsys.readouterr().err


def test_an_exception_in_a_progress_function_aborts(endless):
    def report(done, total):
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        endless.generate(["a", "b"], [SamplingParams(max_tokens=1), LONG], progress=report)
    assert caught.value.args == ("mine",)
    assert endless._dispatcher._routes == {}, "at once, though the exception holds the frames"
    assert_idle(endless)


def test_a_refused_prompt_leaves_none_of_the_others(endless):
    with pytest.raises(ValueError, match="temperature"):
        endless.generate(["a", "b"], [LONG, SamplingParams(temperature=-1)])
    with pytest.raises(ValueError, match="prompt"):
        endless.generate([[1], []], LONG)
    assert_idle(endless)


def test_prefix_cache(glass):
    prompt = [index % 1000 for index in range(40)]
    glass.clear_prefix_cache()
    few = SamplingParams(max_tokens=2)
    assert [glass.generate(prompt, few).metrics.num_cached_tokens for _ in range(2)] == [0, 32]
    glass.clear_prefix_cache()
    wait_until(lambda: glass.stats()["kv_blocks_cached"] == 0)
    assert glass.generate(prompt, few).metrics.num_cached_tokens == 0


def test_stats(glass):
    before = glass.stats()
    glass.generate("Once upon a time", SamplingParams(max_tokens=7, ignore_eos=True))
    after = glass.stats()
    assert after["prompt_tokens_total"] == before["prompt_tokens_total"] + 6
    assert after["generation_tokens_total"] == before["generation_tokens_total"] + 7
    assert after["steps"] > before["steps"]
    assert after["uptime_s"] > before["uptime_s"]
    names = Engine.stats.__doc__.split(":")[1].replace(".", "").split(",")
    assert {name.strip() for name in names} <= after.keys()


def test_without_tokenizer(case):
    with Engine(FIXTURES / "golden/llama") as engine:
        assert engine.tokenizer is None
        out = engine.generate([97, 98], SamplingParams(logprobs=0, max_tokens=3))
        assert (out.text, len(out.token_ids)) == ("", 3)
        assert out.logprobs[0][out.token_ids[0]].decoded_token is None
        assert [piece.text for piece in engine.stream([97], SamplingParams(max_tokens=2))] == ["", ""]


@pytest.mark.parametrize("given", ["path", "object"])
def test_another_tokenizer(given, case):
    from astrai_rs import AutoTokenizer

    tokenizer = GLASS if given == "path" else AutoTokenizer.from_pretrained(GLASS)
    with Engine(GLASS, tokenizer=tokenizer, dtype="float32") as engine:
        assert engine.generate(case["prompt"], greedy(case)).text == case["text"]


def test_chat(glass, case):
    content = [{"role": "user", "content": case["prompt"]}]
    few = SamplingParams(max_tokens=4)
    assert glass.chat(content, few).prompt_token_ids == glass.tokenizer.encode(case["prompt"] + " ")
    both = glass.chat([[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]], few)
    assert [out.prompt_token_ids for out in both] == [glass.tokenizer.encode(t) for t in ("a ", "b ")]
    template = "{{ messages[0].content }}{% if tools %} {{ tools[0].name }}{% endif %}{{ mood }}"
    options = {"chat_template": template, "chat_template_kwargs": {"mood": " glad"}, "tools": [{"name": "f"}]}
    assert glass.chat(content, few, **options).prompt_token_ids == glass.tokenizer.encode(
        case["prompt"] + " f glad"
    )
    answer = [*content, {"role": "assistant", "content": "the"}]
    template = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    for options, text in (
        ({"continue_final_message": True}, f"<{case['prompt']}><the"),
        ({"add_generation_prompt": False}, f"<{case['prompt']}><the>"),
        ({}, f"<{case['prompt']}><the>!"),
    ):
        out = glass.chat(answer, few, chat_template=template, **options)
        assert out.prompt_token_ids == glass.tokenizer.encode(text)


def test_stop_ids_are_the_union_of_all_files(tmp_path, case):
    for file in GLASS.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    config["eos_token_id"] = [case["greedy_ids"][2], EOS]
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    with Engine(tmp_path, dtype="float32") as engine:
        out = engine.generate(case["prompt"], greedy(case))
    assert (out.token_ids, out.finish_reason) == (case["greedy_ids"][:3], "stop")


def test_properties_and_repr():
    with Engine(GLASS, dtype="float32", num_threads=1, kv_cache_tokens=256, max_model_len=64) as engine:
        assert (engine.vocab_size, engine.max_model_len, engine.num_threads) == (1024, 64, 1)
        assert (engine.device, engine.dtype, engine.kv_cache_tokens) == ("cpu", "float32", 256)
        assert repr(engine) == "<astrai_rs.Engine cpu float32 max_model_len=64 open>"
    assert "closed" in repr(engine)
