"""Ids to text while they arrive: whole characters only, and stop strings cut exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_LOST = "\ufffd"
_MAX_PENDING = 3
"""An incomplete UTF-8 character shows as one to three U+FFFD (byte-fallback decoders give one per byte)."""
_WINDOW = 8
"""Pending ids after which a run of invalid bytes is split."""
_PROMPT_TAIL = 8
"""Prompt ids that are enough context for the first generated one."""


class Detokenizer:
    """Turns ids into text piece by piece.

    Let `tail` be the last few prompt ids from a character boundary on. The pieces, joined, are
    `decode(tail + ids)` without its first `len(decode(tail))` characters: the text in its context, so a
    leading space survives decoders that strip it. No piece holds U+FFFD for a character that later ids
    complete; bytes that never become a character appear as U+FFFD. If the prompt ends inside a character and
    the first ids complete it, that character is the first text.

    Only `decode` of a short window is called, so the cost per id does not grow with the text, and any
    tokenizer will do.
    """

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = _tail(decode, prompt_token_ids)
        """Context ids whose text is complete, then pending ones."""
        self._clean = len(self._window)
        """How many ids of the window are context."""
        self._shown = decode(self._window) if self._window else ""
        """The part of the window's text that is not to be given out (again)."""
        self._dangling = self._shown.endswith(_LOST)

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these ids; may be empty."""
        return "".join([self._add(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """The rest of the text at the end: incomplete characters as U+FFFD."""
        if len(self._window) == self._clean:
            return ""
        text = self._text()
        return text[len(self._shown) :]

    def _add(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._text()
        held = len(text) - len(text.rstrip(_LOST))
        stable = len(text) - min(held, _MAX_PENDING)
        start = len(self._shown)
        if self._shown and text == self._shown and not self._dangling:
            self._window.pop()  # no text, such as a skipped special token: the context stays what it was
            return ""
        if stable <= start:
            if len(self._window) - self._clean > _WINDOW:
                self._split(text)
            return ""
        piece = text[start:stable]
        if held:
            self._shown = text[:stable]
            if len(self._window) - self._clean > _WINDOW:
                self._split(text)
        else:
            self._advance()
        return piece

    def _text(self) -> str:
        """The window's text. Keeps `_shown` a prefix of it."""
        text = self._decode(self._window)
        if text.startswith(self._shown):
            return text
        if self._dangling:  # the prompt's last character is complete now, and belongs to the generated text
            self._shown = self._shown.rstrip(_LOST)
            self._dangling = False
            if text.startswith(self._shown):
                return text
        # A byte-fallback decoder takes back a character when an invalid byte follows. It is given out
        # already: decode what is pending alone.
        del self._window[: self._clean]
        self._clean, self._shown = 0, ""
        return self._decode(self._window)

    def _advance(self) -> None:
        """All of the window is out: what was pending is context for what comes."""
        del self._window[: self._clean]
        self._clean = len(self._window)
        self._shown = self._decode(self._window)
        self._dangling = False

    def _split(self, text: str) -> None:
        """Drop the front of a window that never completes, where this does not change the text."""
        for cut in range(len(self._window) - _MAX_PENDING, 0, -1):
            front, back = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if front + back == text and len(front) <= len(self._shown):
                self._window = self._window[cut:]
                self._shown = self._shown[len(front) :]
                self._clean, self._dangling = 0, False
                return


def _tail(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The shortest end of the prompt that has text and does not begin inside a character."""
    for count in range(1, min(_PROMPT_TAIL, len(prompt)) + 1):
        tail = list(prompt[-count:])
        text = decode(tail)
        if text.strip(_LOST) and not text.startswith(_LOST):
            return tail
    return []


class StopMatcher:
    """Finds stop strings in text that arrives in pieces and holds back what may become one.

    The match that completes first wins; of matches that complete together, the longest. So the result does
    not depend on where the pieces are cut.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def add(self, text: str, *, active: bool = True) -> tuple[str, str | None]:
        """`(text to give out, the stop string that matched or None)`.

        With `active=False` (fewer than min_tokens so far) a match may begin in this text but not complete in
        it.
        """
        if not self._stops:
            return text, None
        seen = len(self._held)
        text = self._held + text
        match = _first_match(text, self._stops, seen) if active else None
        if match is not None:
            end, stop = match
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        keep = _open_suffix(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What is held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _first_match(text: str, stops: Sequence[str], seen: int) -> tuple[int, str] | None:
    """The match that ends first and after `seen`; ties go to the longest."""
    best: tuple[int, str] | None = None
    for stop in stops:
        at = text.find(stop, max(0, seen - len(stop) + 1))
        end = at + len(stop)
        if at >= 0 and (best is None or (end, -len(stop)) < (best[0], -len(best[1]))):
            best = end, stop
    return best


def _open_suffix(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string without completing it."""
    longest = min(len(text), max(map(len, stops)) - 1)
    return next(
        (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) and n < len(s) for s in stops)), 0
    )
