"""The engine's view of a tokenizer: the model's own, or any object with `encode` and `decode`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from astrai_rs.request import check_ids
from astrai_rs.tokenizer import AutoTokenizer


def load_tokenizer(path: Path, tokenizer: Any) -> Any:
    """The tokenizer to use for a model at `path`; None if it has none."""
    if isinstance(tokenizer, (str, Path)):
        return AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer is not None:
        for name in ("encode", "decode"):
            if not callable(getattr(tokenizer, name, None)):
                raise TypeError(
                    f"tokenizer must have encode and decode; {type(tokenizer).__name__} has no {name}"
                )
        return tokenizer
    if path.suffix == ".gguf":
        return AutoTokenizer.from_gguf(path)
    if (path / "tokenizer.json").exists() or (path / "tokenizer.model").exists():
        return AutoTokenizer.from_pretrained(path)
    return None


def stop_ids(tokenizer: Any) -> list[int]:
    """Ids that end a text, as far as the tokenizer says."""
    if isinstance(tokenizer, AutoTokenizer):
        return tokenizer.stop_ids
    ids = getattr(tokenizer, "eos_token_id", None)
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


class Codec:
    """Any tokenizer as the engine uses it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        return self._ids(self._tokenizer.encode(text))

    def encode_word(self, text: str) -> list[int]:
        """Without a begin token. A tokenizer whose encode takes only the text is taken as it is."""
        try:
            return self._ids(self._tokenizer.encode(text, add_special_tokens=False))
        except TypeError:
            return self.encode(text)

    def chat(self, messages: Sequence[Any], options: Mapping[str, Any]) -> list[int]:
        """The ids of a conversation. Other tokenizers render text: what they give as ids differs in form."""
        template = getattr(self._tokenizer, "apply_chat_template", None)
        if template is None:
            raise ValueError(
                "chat needs a tokenizer with a chat template; this one has no apply_chat_template"
            )
        if isinstance(self._tokenizer, AutoTokenizer):
            return check_ids("a prompt", template(messages, **options))
        return self.encode_word(template(messages, tokenize=False, **options))

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        try:
            return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
        except TypeError:
            return str(self._tokenizer.decode(ids))

    def id_to_text(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id], False)
        return text

    def bad_word_ids(self, words: Iterable[str]) -> list[list[int]]:
        """Each word at the start of text, and after a space where that gives as many ids."""
        found = []
        for word in words:
            bare = self.encode_word(word.lstrip())
            spaced = self.encode_word(" " + word.lstrip())
            found.append(bare)
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                found.append(spaced)
        return found

    @staticmethod
    def _ids(encoded: Any) -> list[int]:
        return check_ids("the tokenizer's encode", getattr(encoded, "ids", encoded))
