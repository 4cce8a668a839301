"""Structured outputs: the vocabulary as bytes, and grammars compiled from it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from astrai_rs import _core
from astrai_rs.request import StructuredOutputsParams

_CACHED_GRAMMARS = 64


class Grammars:
    """Compiles the grammars of one model. The vocabulary is read with the first. Threads may share it.

    Args:
        tokenizer: an `AutoTokenizer`, a fast tokenizer of transformers, or None.
        stop_ids: ids that may end a complete output.
        vocab_size: how many ids the model has.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._compiler: _core.GrammarCompiler | None = None
        self._compile = lru_cache(_CACHED_GRAMMARS)(self._compile_source)

    def compile(self, params: StructuredOutputsParams) -> _core.Grammar:
        """The grammar of a request.

        Raises:
            ValueError: the schema or grammar is wrong or uses something that is not supported.
            NotImplementedError: the tokenizer is of a kind whose tokens have no known bytes.
        """
        name, kind, source = _source(params)
        try:
            return self._compile(kind, source, not params.disable_any_whitespace)
        except ValueError as error:
            raise ValueError(f"structured_outputs.{name}: {error}") from error

    def _compile_source(self, kind: str, source: str, any_whitespace: bool) -> _core.Grammar:
        return self._made().compile(kind, source, any_whitespace=any_whitespace)

    def token_bytes(self) -> list[bytes]:
        """The vocabulary as `token_bytes` gives it."""
        return token_bytes(_backend(self._tokenizer))

    def _made(self) -> _core.GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                backend = _backend(self._tokenizer)
                added = backend.get_added_tokens_decoder()
                self._compiler = _core.GrammarCompiler(
                    token_bytes(backend),
                    special_ids=[i for i, token in added.items() if token.special],
                    eos_token_ids=self._stop_ids,
                    vocab_size=self._vocab_size,
                )
            return self._compiler


def _source(params: StructuredOutputsParams) -> tuple[str, str, str]:
    """`(field, kind for the core, source)`."""
    if params.json is not None:
        return "json", "json", str(params.json)
    if params.regex is not None:
        return "regex", "regex", params.regex
    if params.grammar is not None:
        return "grammar", "lark", params.grammar
    if params.choice is not None:
        return "choice", "lark", "start: " + " | ".join(map(json.dumps, params.choice))
    return "json_object", "json", '{"type": "object"}'


def _backend(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` below any of the supported tokenizers."""
    if tokenizer is None:
        raise ValueError("structured outputs need a tokenizer, and this model has none")
    for name in ("backend", "backend_tokenizer"):
        backend = getattr(tokenizer, name, None)
        if hasattr(backend, "get_added_tokens_decoder"):
            return backend
    raise NotImplementedError(
        "structured outputs need the vocabulary: an AutoTokenizer or a fast tokenizer of transformers, "
        f"not {type(tokenizer).__name__}"
    )


def token_bytes(backend: Any) -> list[bytes]:
    """What each id of a `tokenizers.Tokenizer` adds to a text, in UTF-8; empty for unused ids.

    Raises:
        NotImplementedError: the decoder is not one whose tokens have bytes of their own.
    """
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=False)
    added = backend.get_added_tokens_decoder()
    table = [b""] * (max([*vocabulary.values(), *added]) + 1)
    convert = _converter(json.loads(backend.to_str())["decoder"])
    for text, token_id in vocabulary.items():
        if not text.startswith("\0"):  # stand-ins for tokens of a GGUF file that are not text
            table[token_id] = convert(text)
    for token_id, token in added.items():
        table[token_id] = token.content.encode()
    return table


def _converter(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """How the decoder of a tokenizer.json makes bytes of a token."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level
    spaces = [step["pattern"].get("String") for step in steps if step["type"] == "Replace"]
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and (
        "Metaspace" in kinds or spaces == ["\u2581"]
    ):
        return _sentencepiece if "ByteFallback" in kinds else lambda token: _spaced(token).encode()
    raise NotImplementedError(
        f"structured outputs are not supported for tokenizers with the decoder {sorted(kinds) or None}; "
        "supported: ByteLevel, SentencePiece's"
    )


def _spaced(token: str) -> str:
    return token.replace("\u2581", " ")


def _sentencepiece(token: str) -> bytes:
    """`▁` is a space, `<0x0A>` a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return _spaced(token).encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()


def _byte_level(token: str) -> bytes:
    """A token with a character outside the table, such as a GGUF stand-in, has no text."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return b""
