"""Structured outputs of a model that writes nonsense: whatever it wants to say, it keeps to the form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import jsonschema
import pytest

from astrai_rs import AutoTokenizer, Engine, SamplingParams, StructuredOutputsParams
from astrai_rs.grammar import token_bytes
from astrai_rs.model import embedded_model
from conftest import FIXTURES, GLASS, assert_idle
from fake_core import ByteTokenizer

PERSON = {
    "type": "object",
    "properties": {
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "größer"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["zip", "age", "tags"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", 'may"be\n', "größer"]
FORMS = {
    "json": {"json": PERSON},
    "json text": {"json": json.dumps(PERSON)},
    "spaced json": {"json": PERSON, "disable_any_whitespace": False},
    "regex": {"regex": "[A-Z][a-z]{2,5} ([0-9]{2}:){2}🙂"},
    "choice": {"choice": CHOICES},
    "grammar": {"grammar": 'start: "(" start ")" | /[0-9]{1,3}/'},
}


def keeps(form: str, text: str) -> bool:
    """Whether a complete text has its form, by Python's own means."""
    if form in ("json", "json text", "spaced json"):
        value = json.loads(text)
        fits = list(value) == ["zip", "age", "tags"] and bool(re.fullmatch("[0-9]{5}", value["zip"]))
        tags = value["tags"]
        fits &= 0 <= value["age"] <= 120 and 1 <= len(tags) <= 3 and set(tags) <= {"a", "größer"}
        return fits and (form == "spaced json" or not re.search(r"\s", text))
    if form == "regex":
        return bool(re.fullmatch(FORMS["regex"]["regex"], text))
    if form == "choice":
        return text in CHOICES
    inner = text.strip("()")
    depth = text.count("(")
    return text == "(" * depth + inner + ")" * depth and bool(re.fullmatch("[0-9]{1,3}", inner))


@pytest.fixture(scope="module")
def engine(random_folder) -> Iterator[Engine]:
    with Engine(random_folder, tokenizer=embedded_model(), kv_cache_tokens=4096) as engine:
        yield engine
        assert_idle(engine)


def params(form: str, **more) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 200, "structured_outputs": FORMS[form], **more})


@pytest.mark.parametrize("form", FORMS)
def test_outputs_keep_their_form(engine, form):
    output = engine.generate("Say", params(form, n=32, seed=1))
    complete = [sample for sample in output.outputs if sample.finish_reason == "stop"]
    if form == "spaced json":  # as small models do, it goes on with white space for ever
        assert any(re.search(r"\s", sample.text) for sample in output.outputs)
    else:
        assert len(complete) >= 16
    for sample in complete:
        assert keeps(form, sample.text), sample.text
        # Nothing of the text is lost, not even of the token that completes it.
        assert engine.tokenizer.decode(sample.token_ids) == sample.text


SCHEMAS = [
    json.loads(line) for line in (FIXTURES / "json_schemas.jsonl").read_text(encoding="utf-8").splitlines()
]


def in_order(value: object, schema: object) -> bool:
    """Whether the properties of an object come as its schema lists them, as far as that is plain to see."""
    if not (isinstance(value, dict) and isinstance(schema, dict) and "properties" in schema):
        return True
    listed = [name for name in schema["properties"] if name in value]
    inner = all(in_order(value[name], schema["properties"][name]) for name in listed)
    return inner and [name for name in value if name in listed] == listed


def test_150_schemas(engine):
    """Every complete output is valid, by another implementation of JSON schema."""
    assert len(SCHEMAS) > 150
    # Whoever says random things rarely comes to an end: what ends strings and objects gets a push.
    table = engine.token_bytes()
    bias = {i: 9.0 for i, token in enumerate(table) if token in (b'"', b"}", b"]", b'"}', b"]}", b'",')}
    wanted = [
        SamplingParams(n=4, seed=i, max_tokens=120, logit_bias=bias, structured_outputs={"json": schema})
        for i, schema in enumerate(SCHEMAS)
    ]
    outputs = engine.generate(["Say"] * len(SCHEMAS), wanted)
    complete = 0
    for schema, output in zip(SCHEMAS, outputs, strict=True):
        kind = jsonschema.Draft202012Validator
        validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
        ended = [sample.text for sample in output.outputs if sample.finish_reason == "stop"]
        complete += bool(ended)
        for text in ended:
            value = json.loads(text)
            validator.validate(value)
            assert in_order(value, schema), text
    assert complete > 0.95 * len(SCHEMAS), complete


def test_any_json_object(engine):
    wanted = SamplingParams(n=32, seed=3, max_tokens=60, structured_outputs={"json_object": True})
    for sample in engine.generate("Say", wanted).outputs:
        assert sample.text.startswith("{")
        if sample.finish_reason == "stop":
            assert isinstance(json.loads(sample.text), dict)


def test_the_batch_changes_nothing(random_folder):
    """Alone and together, with other requests, several samples, and blocks taken away in between."""
    forms = [*FORMS, None]
    wanted = [
        SamplingParams(max_tokens=40, seed=i, n=1 + i % 3, ignore_eos=True, temperature=i % 2)
        if form is None
        else params(form, max_tokens=40, seed=i, n=1 + i % 3, temperature=i % 2, logprobs=1)
        for i, form in enumerate(forms * 4)
    ]
    prompts = [f"Prompt number {i}" for i in range(len(wanted))]

    def texts(engine, together):
        if together:
            return [[s.text for s in o.outputs] for o in engine.generate(prompts, wanted)]
        return [[s.text for s in engine.generate(p, w).outputs] for p, w in zip(prompts, wanted, strict=True)]

    with Engine(random_folder, tokenizer=embedded_model(), kv_cache_tokens=4096) as engine:
        alone = texts(engine, together=False)
        assert texts(engine, together=True) == alone
    with Engine(random_folder, tokenizer=embedded_model(), kv_cache_tokens=320) as engine:
        assert texts(engine, together=True) == alone
        assert engine.stats()["preemptions"] > 0


def test_with_other_parameters(engine):
    stopped = engine.generate("Say", params("json", seed=1, stop=['"age"']))
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", '"age"')
    assert re.fullmatch(r'\{"zip":"[0-9]{5}",', stopped.text)
    scored = engine.generate("Say", params("choice", seed=1, logprobs=2))
    assert len(scored.logprobs) == len(scored.token_ids)
    assert scored.text in CHOICES
    going_on = engine.generate("Say", params("choice", seed=1, ignore_eos=True))
    assert (going_on.text, going_on.finish_reason) == (scored.text, "stop")
    pieces = list(engine.stream("Say", params("json", seed=1)))
    assert keeps("json", "".join(piece.text for piece in pieces))
    with pytest.raises(ValueError, match="no token is left to sample: structured_outputs,"):
        engine.generate("Say", params("choice", allowed_token_ids=[5]))


def test_params_may_be_an_object(engine):
    wanted = StructuredOutputsParams(choice=["only"])
    out = engine.generate("Say", SamplingParams(structured_outputs=wanted))
    assert (out.text, out.finish_reason) == ("only", "stop")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ValueError, "exactly one of json, regex, choice, grammar, json_object; given: none"),
        ({"regex": "a", "choice": ["b"]}, ValueError, "exactly one of .*; given: regex, choice"),
        ({"yaml": "a"}, ValueError, "structured_outputs has no field yaml; allowed: json, regex"),
        ({"regex": 3}, TypeError, "structured_outputs.regex must be a non-empty string, not int 3"),
        ({"grammar": ""}, ValueError, "structured_outputs.grammar must be a non-empty string"),
        ({"json": {"$ref": "#"}}, ValueError, "structured_outputs.json: no output satisfies it"),
        ({"choice": []}, ValueError, "structured_outputs.choice must have at least one string; given:"),
        ({"choice": "yes"}, TypeError, "structured_outputs.choice must be a list of strings"),
        ({"choice": [""]}, ValueError, "structured_outputs.choice must not contain an empty string"),
        ({"json": 3}, TypeError, "structured_outputs.json must be a JSON schema, not int 3"),
        ({"json": {"a": {1, 2}}}, ValueError, "structured_outputs.json cannot be written as JSON"),
        ({"json_object": False}, ValueError, "structured_outputs.json_object must be True; given: False"),
        ({"json": "{"}, ValueError, "structured_outputs.json: the schema is not valid JSON"),
        ({"json": {"uniqueItems": True, "type": "array"}}, ValueError, "uniqueItems"),
        ({"json": {"not": {}}}, ValueError, 'Unimplemented keys: \\["not"\\]'),
        ({"json": {"contains": {}}}, ValueError, "contains"),
        ({"json": {"dependentRequired": {}}}, ValueError, "dependentRequired"),
        ({"json": {"type": "string", "format": "colour"}}, ValueError, "Unknown format: colour"),
        ({"json": {"$ref": "https://a.example/b"}}, ValueError, "ref"),
        ({"regex": "("}, ValueError, "structured_outputs.regex: .*unclosed group"),
        ({"regex": r"\bword"}, ValueError, "lookarounds not supported"),
        ({"grammar": "start: nothing"}, ValueError, 'structured_outputs.grammar: .*unknown name: "nothing"'),
    ],
    ids=str,
)
def test_refusals(engine, fields, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        engine.generate("a", SamplingParams(structured_outputs=fields))


def test_models_without_a_vocabulary_to_read(random_folder):
    wanted = SamplingParams(structured_outputs={"choice": ["a"]})
    with (
        Engine(random_folder) as engine,
        pytest.raises(ValueError, match="structured outputs need a tokenizer"),
    ):
        engine.generate([5], wanted)
    with (
        Engine(random_folder, tokenizer=ByteTokenizer()) as engine,
        pytest.raises(NotImplementedError, match="structured outputs need the vocabulary: .* not ByteTok"),
    ):
        engine.generate([5], wanted)


TEXTS = ["Hello, world!", "  two  spaces\n\ttab", "größer 東京 🙂👩‍👩‍👧", '{"a": [1, 2.5e-3]}', "\x00\x7f"]


@pytest.mark.parametrize("path", [embedded_model(), *(FIXTURES / "tokenizers").glob("*/")], ids=str)
def test_token_bytes_spell_texts(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    table = token_bytes(tokenizer.backend)
    assert len(table) == tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer.encode(text, False)
        spelled = b"".join(table[i] for i in ids)
        if path == embedded_model():
            assert spelled == text.encode()
        else:  # characters that the vocabulary lacks have no bytes; SentencePiece begins with a space
            assert spelled.decode().strip() == tokenizer.decode(ids, skip_special_tokens=False).strip()


def test_glass_follows_a_schema():
    """A SentencePiece vocabulary."""
    with Engine(GLASS) as engine:
        wanted = SamplingParams(structured_outputs={"choice": ["once upon a time", "never"]}, n=8, seed=1)
        for sample in engine.generate("Once", wanted).outputs:
            assert sample.text.strip() in ("once upon a time", "never")
            assert sample.finish_reason == "stop"
