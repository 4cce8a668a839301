"""AutoTokenizer: GGUF vocabularies against llama.cpp, folders against their golden ids, the file rules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from astrai_rs import AutoTokenizer, CheckpointError, gguf_tokenizer
from astrai_rs.model import embedded_model
from conftest import FIXTURES

GLASS = FIXTURES / "tokenizers/glass-llama"


def fixture(kind):
    return json.loads((FIXTURES / f"tokenizers/gguf-{kind}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("pre", fixture("bpe")["ids"])
def test_byte_level_pre_tokenizers_as_llama_cpp(pre):
    data = fixture("bpe")
    tokenizer = gguf_tokenizer.build(data["metadata"] | {"tokenizer.ggml.pre": pre})
    assert [tokenizer.encode(text).ids for text in data["texts"]] == data["ids"][pre]
    for text, ids in zip(data["texts"], data["ids"][pre], strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_as_llama_cpp(prefix):
    data = fixture("spm")
    tokenizer = gguf_tokenizer.build(data["metadata"] | {"tokenizer.ggml.add_space_prefix": prefix})
    assert [tokenizer.encode(text).ids for text in data["texts"]] == data["ids"][str(prefix)]


def test_gguf_special_tokens_and_ends():
    metadata = fixture("bpe")["metadata"] | {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.eot_token_id": 0,
    }
    del metadata["tokenizer.ggml.add_bos_token"]
    tokenizer = gguf_tokenizer.build(metadata)
    assert tokenizer.encode("a").ids[0] == 1, "llama-bpe puts the begin token first unless the file says no"
    assert tokenizer.decode(tokenizer.encode("a<tool>").ids) == "a<tool>", "user-defined tokens are text"
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>").ids) == "a"
    metadata |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    assert gguf_tokenizer.build(metadata).encode("a").ids[-1] == 2
    assert gguf_tokenizer.stop_ids(metadata) == [2, 0]
    assert gguf_tokenizer.special_tokens(metadata)["eos_token"] == "<|im_end|>"


def test_gguf_tokens_that_are_not_text():
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", b"\xff\xfe", "b", "a", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    tokenizer = gguf_tokenizer.build(metadata)
    assert tokenizer.get_vocab_size() == 5
    assert tokenizer.encode("aba").ids == [4, 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"tokenizer.ggml.pre": "brand-new"},
            NotImplementedError,
            "pre-tokenizer 'brand-new' is not supported",
        ),
        ({"tokenizer.ggml.model": "bert"}, NotImplementedError, "model 'bert' is not supported"),
        ({"tokenizer.ggml.model": None}, CheckpointError, "no tokenizer.ggml.model"),
        ({"tokenizer.ggml.tokens": None}, CheckpointError, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, CheckpointError, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["ab"]}, CheckpointError, "merges has 'ab'"),
        ({"tokenizer.ggml.merges": ["a b", "a b a", "b"]}, CheckpointError, "merges has 'a b a'"),
        ({"tokenizer.ggml.merges": ["a b", "a "]}, CheckpointError, "merges has 'a '"),
        ({"tokenizer.ggml.merges": [b"a \xff"]}, CheckpointError, r"merges has b'a \\xff'"),
        ({"tokenizer.ggml.model": "llama"}, CheckpointError, "no tokenizer.ggml.scores"),
    ],
)
def test_gguf_refusals(change, error, message):
    metadata = {k: v for k, v in (fixture("bpe")["metadata"] | change).items() if v is not None}
    with pytest.raises(error, match=message):
        gguf_tokenizer.build(metadata)


def test_smollm2():
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    for case in json.loads(
        (FIXTURES / "golden" / "smollm2-135m" / "golden.json").read_text(encoding="utf-8")
    ):
        assert tokenizer.apply_chat_template(case["messages"], tokenize=False) == case["prompt"]
        assert tokenizer.apply_chat_template(case["messages"]) == case["prompt_ids"]
        assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
        assert tokenizer.decode(case["greedy_ids"]) == case["text"]
    assert tokenizer.stop_ids == [2]
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.vocab_size) == (
        "<|im_end|>",
        "<|im_start|>",
        49152,
    )


def test_glass_llama():
    tokenizer = AutoTokenizer.from_pretrained(GLASS)
    for case in json.loads((GLASS / "golden.json").read_text(encoding="utf-8")):
        assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
        assert tokenizer.decode(case["greedy_ids"]) == case["text"]
    assert (tokenizer.stop_ids, tokenizer.eos_token_ids, tokenizer.eos_token_id) == ([3], [3], 3)
    assert (tokenizer.bos_token_id, tokenizer.pad_token, tokenizer.unk_token_id) == (2, "<pad>", 1)
    assert len(tokenizer) == tokenizer.vocab_size == 1024
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi "
    batch = tokenizer.encode(["Once", "upon"])
    assert batch == [tokenizer.encode("Once"), tokenizer.encode("upon")]
    assert tokenizer.encode("Once", out_ids=False) == [
        tokenizer.id_to_text(i).replace(" ", "▁") for i in batch[0]
    ]


@pytest.fixture
def glass(tmp_path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        shutil.copyfile(GLASS / name, tmp_path / name)
    return tmp_path


def edit(path, **changes):
    data = json.loads(path.read_text(encoding="utf-8"))
    data.update(changes)
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}), encoding="utf-8")


def test_save_and_load(glass, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(glass)
    tokenizer.set_chat_template({"default": "d", "tool_use": "t"})
    tokenizer.save_pretrained(tmp_path / "copy")
    again = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.stop_ids == [3]
    assert again.encode("Once upon") == tokenizer.encode("Once upon")
    assert again.apply_chat_template([{"role": "u"}], tools=[{}], tokenize=False) == "t"


def test_stop_ids_are_the_union_of_all_eos(glass):
    edit(glass / "config.json", eos_token_id=[7, 8])
    edit(glass / "generation_config.json", eos_token_id=[8, 9])
    assert AutoTokenizer.from_pretrained(glass).stop_ids == [7, 8, 9, 3]
    edit(glass / "config.json", eos_token_id=None, text_config={"eos_token_id": 5})
    assert AutoTokenizer.from_pretrained(glass).stop_ids == [5, 8, 9, 3]


def test_truncation_and_padding_are_off(glass):
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    edit(glass / "tokenizer.json", truncation=truncation, padding=padding)
    assert len(AutoTokenizer.from_pretrained(glass).encode("Once upon a time")) == 6


def test_added_tokens_of_the_config(glass):
    entry = {"content": "<|tool|>", "special": True}
    edit(glass / "tokenizer_config.json", added_tokens_decoder={"1024": entry, "0": {"content": "<pad>"}})
    tokenizer = AutoTokenizer.from_pretrained(glass)
    assert tokenizer.encode("<|tool|>") == [1024]
    assert tokenizer.decode([1024]) == ""
    edit(glass / "tokenizer_config.json", added_tokens_decoder={"2000": entry})
    with pytest.raises(CheckpointError, match=r"'<\|tool\|>' at id 2000, but tokenizer.json at 1024"):
        AutoTokenizer.from_pretrained(glass)


def test_special_tokens_map_of_older_folders(glass):
    edit(glass / "tokenizer_config.json", eos_token=None, pad_token={"content": "<unk>"})
    (glass / "special_tokens_map.json").write_text('{"eos_token": {"content": "<bos>"}}')
    tokenizer = AutoTokenizer.from_pretrained(glass)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<unk>")


def test_chat_template_files(glass):
    user = [{"role": "user", "content": "x"}]

    def render(**kwargs):
        return AutoTokenizer.from_pretrained(glass).apply_chat_template(user, tokenize=False, **kwargs)

    edit(glass / "tokenizer_config.json", chat_template=[{"name": "default", "template": "listed"}])
    assert render() == "listed"
    edit(glass / "tokenizer_config.json", chat_template=None)
    (glass / "chat_template.json").write_text('{"chat_template": "json file"}')
    assert render() == "json file"
    (glass / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert render() == "file <bos>"
    (glass / "additional_chat_templates").mkdir()
    (glass / "additional_chat_templates/tool_use.jinja").write_text("tools")
    assert render() == "file <bos>"
    assert render(tools=[{}]) == "tools"
    assert render(chat_template="tool_use") == "tools"
    assert render(chat_template="own {{ messages[0].content }}") == "own x"


def test_astrai_folder(glass):
    names = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "im_start": "<bos>", "im_end": "<unk>"}
    template = "{% for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (glass / "tokenizer_config.json").write_text(
        json.dumps({"special_tokens": names, "chat_template": template})
    )
    for name in ("config.json", "generation_config.json"):
        (glass / name).unlink()
    tokenizer = AutoTokenizer.from_pretrained(glass)
    assert tokenizer.stop_ids == [3, 1], "what ends something, not begin and padding tokens"
    assert (tokenizer.eos, tokenizer.eos_id, tokenizer.im_end_id, tokenizer.pad_id) == ("<eos>", 3, 1, 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.nothing_id) == ("<eos>", 3, None)
    user = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(user, tokenize=False) == "\nuser: x\n"
    for text in (
        tokenizer.apply_chat_template(user, "be good", tokenize=False),
        tokenizer.apply_chat_template(user, system_prompt="be good", tokenize=False),
    ):
        assert text == "\nsystem: be good\n\nuser: x\n"
    assert tokenizer.apply_chat_template([user, user], tokenize=False) == ["\nuser: x\n"] * 2
    tokenizer.save_pretrained(glass / "copy")
    assert AutoTokenizer.from_pretrained(glass / "copy").stop_ids == [3, 1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.encode(3), TypeError, "a string or a list of strings, not int"),
        (lambda t: t.encode(["a", 3]), TypeError, "the list has int"),
        (lambda t: t.no_such, AttributeError, "no attribute 'no_such'"),
        (lambda t: t.set_chat_template(3), TypeError, "a string or a dict of strings"),
        (lambda t: AutoTokenizer(t.backend).apply_chat_template([{}]), ValueError, "has no chat template"),
        (
            lambda t: AutoTokenizer.from_pretrained("/no/such/folder"),
            FileNotFoundError,
            "/no/such/folder: no such",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(AutoTokenizer.from_pretrained(GLASS))


def test_ids_that_do_not_exist_have_no_text():
    tokenizer = AutoTokenizer.from_pretrained(GLASS)
    ids = tokenizer.encode("Once upon", False)
    for strange in (-1, 5000, 2**32, 2**70):
        assert tokenizer.decode([*ids, strange]) == tokenizer.decode(ids)


def test_saved_stop_ids_are_read_back(tmp_path):
    tokenizer = AutoTokenizer(AutoTokenizer.from_pretrained(GLASS).backend, stop_ids=[3, 7])
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).stop_ids == [3, 7]
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.5


def test_half_a_surrogate_pair_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(GLASS)
    for text in ("a\ud800", ["fine", "a\udfff"]):
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            tokenizer.encode(text)


def test_broken_folders(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_text("")
    with pytest.raises(NotImplementedError, match="only tokenizer.json and GGUF"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json: "):
        AutoTokenizer.from_pretrained(tmp_path)
    shutil.copyfile(GLASS / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer_config.json: not valid JSON"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="tokenizer_config.json: not valid JSON"):
        AutoTokenizer.from_pretrained(tmp_path)
