"""What the answers of several routes have in common."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any, ClassVar

from astrai_rs.request import Logprob
from astrai_rs.server.generation import Usage


def new_id(kind: str) -> str:
    """`kind` and a random word, as OpenAI's and Anthropic's ids are."""
    separator = "-" if kind in ("cmpl", "chatcmpl") else "_"
    return f"{kind}{separator}{uuid.uuid4().hex[:24]}"


class Reply:
    """The head of an answer: id, kind, time and model are the same in every chunk of it."""

    KIND: ClassVar[str]
    OBJECT: ClassVar[str]
    CHUNK: ClassVar[str | None] = None
    """The `object` of chunks, where it differs."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": new_id(self.KIND),
            "object": self.OBJECT,
            "created": int(time.time()),
            "model": model,
        }

    def head(self) -> dict[str, Any]:
        return dict(self._head)

    def chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": self.CHUNK or self.OBJECT}


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


IdToText = Callable[[int], str]


def token_text(token_id: int, entry: Logprob | None, id_to_text: IdToText | None) -> str:
    """A token as text; its id where there is no tokenizer."""
    if entry is not None and entry.decoded_token is not None:
        return entry.decoded_token
    return f"token_id:{token_id}" if id_to_text is None else id_to_text(token_id)
