"""Control tokens that somebody typed: `<|im_end|>` in a message must reach the model as plain text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode's noncharacters: no text needs them."""


def mark_control_tokens(value: Any, tokens: Collection[str]) -> tuple[Any, str | None]:
    """`value` with a mark inside every control token that its strings contain, and the mark.

    Text rendered of it, cut at the marks and encoded part by part, has no control token but the template's
    own. The mark is None where there was nothing to mark.

    Raises:
        ValueError: the text uses every possible mark itself.
    """
    texts = list(_strings(value))
    if not any(token in text for text in texts for token in tokens):
        return value, None
    mark = next((mark for mark in _MARKS if not any(mark in text for text in texts)), None)
    if mark is None:
        raise ValueError("the messages contain all of Unicode's noncharacters U+FDD0 to U+FDEF")
    longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)

    def marked(text: str) -> str:
        for token in longest_first:
            text = text.replace(token, token[0] + mark + token[1:])
        return text

    return _mapped(value, marked), mark


def _strings(value: Any) -> Any:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, change) for item in value]
    return value
