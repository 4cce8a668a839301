"""Streamed text against whole-text decoding, and stop strings against a naive search."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrai_rs import gguf_tokenizer
from astrai_rs.detokenizer import Detokenizer, StopMatcher
from conftest import FIXTURES


def byte_decode(ids):
    """Byte-level decoding: an incomplete or invalid sequence becomes U+FFFD, as `tokenizers` does it."""
    return bytes(ids).decode("utf-8", "replace")


def tokenizer(kind):
    fixture = json.loads((FIXTURES / f"tokenizers/gguf-{kind}.json").read_text(encoding="utf-8"))
    extra = {"tokenizer.ggml.pre": "smollm"} if kind == "bpe" else {}
    return gguf_tokenizer.build(fixture["metadata"] | extra)


BPE, SPM = tokenizer("bpe"), tokenizer("spm")


def stream(decode, prompt, ids):
    detokenizer = Detokenizer(decode, prompt)
    return [*(detokenizer.add([i]) for i in ids), detokenizer.flush()]


def in_context(decode, prompt, ids):
    return decode([*prompt, *ids])[len(decode(prompt)) :]


LETTERS = "ab é漢字🙂\u200d👍\n ٣ñ"
TEXT = st.text(st.sampled_from(LETTERS + "\ufffd"), max_size=12)
CLEAN = st.text(st.sampled_from(LETTERS), max_size=12)


@settings(max_examples=300, deadline=None)
@given(prompt=TEXT, text=TEXT)
def test_valid_text_streams_exactly(prompt, text):
    pieces = stream(byte_decode, list(prompt.encode()), list(text.encode()))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=500, deadline=None)
@given(
    prompt=TEXT,
    ids=st.lists(st.sampled_from([0x61, 0x80, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0x82, 0xC3]), max_size=40),
)
def test_any_bytes_stream_exactly(prompt, ids):
    assert "".join(stream(byte_decode, list(prompt.encode()), ids)) == byte_decode(ids)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("skip", [True, False])
def test_byte_level_tokenizer_streams_exactly(data, skip):
    ids = data.draw(st.lists(st.integers(0, BPE.get_vocab_size() - 1) | st.integers(0, 270), max_size=30))
    prompt = data.draw(TEXT.map(lambda text: BPE.encode(text).ids))
    decode = lambda ids: BPE.decode(ids, skip_special_tokens=skip)  # noqa: E731
    assert "".join(stream(decode, prompt, ids)) == in_context(decode, prompt, ids)


@settings(max_examples=300, deadline=None)
@given(prompt=CLEAN, text=CLEAN)
@pytest.mark.parametrize("skip", [True, False])
def test_sentencepiece_streams_in_context(prompt, text, skip):
    decode = lambda ids: SPM.decode(ids, skip_special_tokens=skip)  # noqa: E731
    prompt_ids = SPM.encode(prompt).ids
    ids = SPM.encode(" " + text, add_special_tokens=False).ids
    pieces = stream(decode, prompt_ids, ids)
    assert "".join(pieces) == in_context(decode, prompt_ids, ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_space_between_skipped_tokens_survives():
    bos, word = SPM.token_to_id("<s>"), SPM.token_to_id("▁there")
    decode = SPM.decode
    assert "".join(stream(decode, [bos, word], [bos, word, *[bos] * 30, word])) == " there there"
    assert "".join(stream(decode, [bos], [bos, bos, word])) == decode([word])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_prompt_that_ends_inside_a_character(count):
    """vLLM #48853: the whole prompt came out with the first piece."""
    smile = list("🙂".encode())
    prompt = [*b"a long prompt ", *smile[:count]]
    assert stream(byte_decode, prompt, [*smile[count:], *b"!"])[-2:] == ["!", ""]
    assert "".join(stream(byte_decode, prompt, [*smile[count:], *b"!"])) == "🙂!"
    assert "".join(stream(byte_decode, prompt, list(b"no"))) == "no"
    assert "".join(stream(byte_decode, smile[:count], list(b"no"))) in ("no", "\ufffdno")


def test_generation_that_ends_inside_a_character():
    assert stream(byte_decode, [], [0x61, 0xE2, 0x82]) == ["a", "", "", "\ufffd"]


def test_byte_fallback_that_turns_invalid_does_not_repeat_text():
    ids = [SPM.token_to_id(f"<0x{b:02X}>") for b in (0xE2, 0x82, 0xAC, 0x80, 0x80)] + [SPM.token_to_id("a")]
    text = "".join(stream(SPM.decode, [], ids))
    assert text.startswith("€")
    assert text.count("€") == 1
    assert text.endswith("a")


def test_long_invalid_runs_cost_no_more_per_id():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return byte_decode(ids)

    detokenizer = Detokenizer(decode)
    text = "".join(detokenizer.add([0x80]) for _ in range(3000)) + detokenizer.flush()
    assert text == "\ufffd" * 3000
    assert longest < 40


def test_empty_flush():
    assert Detokenizer(byte_decode, list(b"prompt")).flush() == ""
    assert Detokenizer(byte_decode).flush() == ""


def naive(text, stops, include, active_from=0):
    """The first position at which some stop string is complete; of several there, the longest."""
    for end in range(active_from, len(text) + 1):
        matches = [stop for stop in stops if end >= len(stop) and text[:end].endswith(stop)]
        if matches and end > active_from:
            stop = max(matches, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=800, deadline=None)
@given(
    text=st.text(st.sampled_from("ab"), max_size=20),
    stops=st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=4), max_size=3, unique=True),
    cuts=st.lists(st.integers(0, 20)),
    include=st.booleans(),
    minimum=st.integers(0, 6),
)
def test_stop_matcher_against_naive(text, stops, cuts, include, minimum):
    want, want_stop = naive(text, stops, include, minimum)
    bounds = sorted({0, len(text), minimum, *cuts} & set(range(len(text) + 1)))
    matcher, got, stop = StopMatcher(stops, include=include), "", None
    for start, end in itertools.pairwise(bounds):
        piece, stop = matcher.add(text[start:end], active=end > minimum)
        got += piece
        assert want.startswith(got), "nothing comes out that a stop string takes back"
        if stop is not None:
            break
    if stop is None:
        got += matcher.flush()
    assert (got, stop) == (want, want_stop)


def test_hold_back_is_no_longer_than_needed():
    matcher = StopMatcher(["</answer>"])
    assert matcher.add("some text") == ("some text", None)
    assert matcher.add("</ans") == ("", None)
    assert matcher.add("x") == ("</ansx", None)
    assert matcher.add("</answer> more") == ("", "</answer>")
