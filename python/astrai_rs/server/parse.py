"""A model's text → reasoning, content and tool calls, while it arrives."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass

from astrai_rs.server.tools import ToolFormat


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class ToolCallStart:
    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    index: int
    text: str
    """The next part of the arguments' JSON, as the model wrote it."""


Delta = Content | Reasoning | ToolCallStart | ToolCallArguments


def starts_in_reasoning(prompt: str, markers: tuple[str, str]) -> bool:
    """Whether a rendered prompt ends inside reasoning, which the model then goes on with."""
    return prompt.rstrip().endswith(markers[0])


class OutputParser:
    """Reads one sample's text. What the pieces add up to does not depend on where the text is cut.

    Text is held back only while it may become a marker, white space before a call, or a call whose name is
    not complete. What looked like a call but is none comes out as content; nothing is lost.

    Args:
        tool_format: None: no calls are looked for.
        tool_names: in formats without a marker only objects that name one of these are calls.
        reasoning: the markers around reasoning, which may only begin the text.
        starts_in_reasoning: the text begins inside them.
    """

    def __init__(
        self,
        *,
        tool_format: ToolFormat | None,
        tool_names: Collection[str] = (),
        reasoning: tuple[str, str] | None = None,
        starts_in_reasoning: bool = False,
    ) -> None:
        self._format = tool_format
        self._names = tool_names
        self._reasoning = reasoning or ("", "")
        self._unread = ""
        self._space = ""
        """White space that is dropped if a marker follows."""
        self._skip_space = starts_in_reasoning
        self._calls = 0
        self._call: _Call | None = None
        self._raw = ""
        """The text of a call that has not been given out."""
        self._out: list[Delta] = []
        self._state: Callable[[bool], bool] = self._read_content
        if reasoning is not None:
            self._state = self._read_reasoning if starts_in_reasoning else self._read_start

    def add(self, text: str) -> list[Delta]:
        """What became certain with this text."""
        if self._format is None and self._state == self._read_content and not self._skip_space:
            return [Content(text)] if text else []
        self._unread += text
        return self._read(final=False)

    def flush(self) -> list[Delta]:
        """The rest, once no more text comes."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> list[Delta]:
        while self._state(final):
            pass
        out, self._out = self._out, []
        return out

    # Each state reads from the unread text and says whether the next one may go on.

    def _read_start(self, final: bool) -> bool:
        text, begin = self._unread.lstrip(), self._reasoning[0]
        if text.startswith(begin):
            self._unread, self._skip_space = text[len(begin) :], True
            self._state = self._read_reasoning
        elif begin.startswith(text) and not final:
            return False
        else:
            self._state = self._read_content
        return True

    def _read_reasoning(self, final: bool) -> bool:
        end = self._reasoning[1]
        at = self._unread.find(end)
        if at < 0:
            self._emit_held(Reasoning, end, final)
            return False
        self._emit(Reasoning, self._unread[:at])
        self._unread, self._space, self._skip_space = self._unread[at + len(end) :], "", True
        self._state = self._read_content
        return True

    def _read_content(self, final: bool) -> bool:
        marker = "" if self._format is None else self._format.begin or "{"
        at = self._unread.find(marker) if marker else -1
        if at < 0:
            self._emit_held(Content, marker, final)
            return False
        assert self._format is not None
        self._emit(Content, self._unread[:at])
        begin = self._format.begin
        self._raw, self._space = self._space + begin, ""
        self._unread = self._unread[at + len(begin) :]
        self._state = self._read_call
        return True

    def _read_call(self, final: bool) -> bool:
        assert self._format is not None
        if self._call is None:
            skipped = " \t\r\n[" if self._format.is_list else " \t\r\n"
            body = self._unread.lstrip(skipped)
            self._raw += self._unread[: len(self._unread) - len(body)]
            self._unread = body
            if body:
                self._call = _Call(self._format.arguments)
        if self._call is None:
            return self._give_up() if final and self._raw else False
        before = self._unread
        self._unread = before[self._call.feed(before) :]
        self._raw += before[: len(before) - len(self._unread)]
        return self._follow(self._call, final)

    def _follow(self, call: _Call, final: bool) -> bool:
        """Give out what the call has come to."""
        assert self._format is not None
        is_call = call.name is not None and (bool(self._format.begin) or call.name in self._names)
        if is_call and not call.started:
            assert call.name is not None
            call.started = True
            self._out.append(ToolCallStart(self._calls, call.name))
        if call.started:
            self._raw = ""
            if text := call.take():
                self._out.append(ToolCallArguments(self._calls, text))
        elif call.failed or call.done or final:
            return self._give_up()
        if call.failed or call.done:
            self._calls += 1
            self._call, self._skip_space = None, True
            self._state = self._read_end if call.done else self._read_content
            return True
        return False

    def _give_up(self) -> bool:
        """It was no call: its text is content."""
        raw, self._raw, self._call = self._raw, "", None
        self._emit(Content, raw)
        self._state = self._read_content
        return True

    def _read_end(self, final: bool) -> bool:
        """What stands after a call: its end marker, the list's comma or end, a separator."""
        assert self._format is not None
        text = self._unread.lstrip()
        end = self._format.end or ("]" if self._format.is_list else self._format.separator.strip())
        if self._format.is_list and text.startswith(","):
            self._unread = text[1:]
            self._state = self._read_call
            return True
        if end.startswith(text) and text != end and not final:
            return False
        self._unread = text[len(end) :] if text.startswith(end) else text
        self._state = self._read_content
        return True

    def _emit_held(self, kind: type[Content] | type[Reasoning], marker: str, final: bool) -> None:
        """Give out the unread text but for an end that may become the marker."""
        keep = 0 if final else _overlap(self._unread, marker)
        cut = len(self._unread) - keep
        self._emit(kind, self._unread[:cut])
        self._unread = self._unread[cut:]
        if final and self._space:
            if kind is Content:
                self._out.append(Content(self._space))
            self._space = ""

    def _emit(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        """Give out text; white space at its end is held back."""
        if self._skip_space:
            text = text.lstrip()
        if not text:
            return
        self._skip_space = False
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._out.append(kind(kept))


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[-n:])), 0)


class _Call:
    """A JSON object that may be a call, character by character. Values are delimited, not checked."""

    def __init__(self, arguments_key: str) -> None:
        self.name: str | None = None
        self.started = False
        """The name has been given out."""
        self.done = False
        self.failed = False
        """It is no object, or not a call."""
        self._arguments_key = arguments_key
        self._arguments: list[str] = []
        self._gave_arguments = False
        self._state: Callable[[str], bool] = self._open
        self._key = ""
        self._value: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> int:
        """Read on; how many characters were the object's."""
        for at, character in enumerate(text):
            if self.done or self.failed:
                return at
            if not self._state(character):
                self.failed = True
                return at
        return len(text)

    def take(self) -> str:
        """The arguments' text that has come since the last call of this; `{}` in the end if there is none."""
        text = "".join(self._arguments)
        self._arguments.clear()
        if self.done and not text and not self._gave_arguments:
            text = "{}"
        self._gave_arguments |= bool(text)
        return text

    # Each state takes a character and says whether it may stand there.

    def _open(self, c: str) -> bool:
        self._state = self._before_key
        return c == "{"

    def _before_key(self, c: str) -> bool:
        if c == '"':
            self._value, self._escaped = [c], False
            self._state = self._in_key
        elif c == "}":
            self.done = True
        return c in ' \t\r\n"}'

    def _in_key(self, c: str) -> bool:
        self._value.append(c)
        if self._ends_string(c):
            self._key = _decoded("".join(self._value)) or ""
            self._state = self._before_colon
        return True

    def _before_colon(self, c: str) -> bool:
        if c == ":":
            self._state = self._before_value
        return c in " \t\r\n:"

    def _before_value(self, c: str) -> bool:
        if c in " \t\r\n":
            return True
        self._value = []
        self._depth, self._in_string, self._escaped = 0, False, False
        is_container = c in "{["
        self._state = self._in_container if is_container else self._in_text if c == '"' else self._in_scalar
        if c == '"':
            self._value.append(c)
            return True
        return c not in ",}]" and self._state(c)

    def _in_container(self, c: str) -> bool:
        if self._key == self._arguments_key:
            self._arguments.append(c)
        if self._in_string:
            self._in_string = not self._ends_string(c)
        elif c == '"':
            self._in_string = True
        elif c in "{[":
            self._depth += 1
        elif c in "}]":
            self._depth -= 1
            if not self._depth:
                self._state = self._after_value
                return self._key != "name"
        return True

    def _in_text(self, c: str) -> bool:
        self._value.append(c)
        if self._ends_string(c):
            self._state = self._after_value
            return self._take_value("".join(self._value))
        return True

    def _in_scalar(self, c: str) -> bool:
        if c in " \t\r\n,}":
            self._state = self._after_value
            return self._take_value("".join(self._value)) and self._after_value(c)
        self._value.append(c)
        return c not in '"{[]:'

    def _after_value(self, c: str) -> bool:
        if c == ",":
            self._state = self._before_key
        elif c == "}":
            self.done = True
        return c in " \t\r\n,}"

    def _take_value(self, raw: str) -> bool:
        """A string or scalar is complete."""
        if self._key == "name":
            self.name = _decoded(raw)
            return self.name is not None
        if self._key == self._arguments_key and raw != "null":
            decoded = _decoded(raw)
            self._arguments.append(raw if decoded is None else decoded)
        return True

    def _ends_string(self, c: str) -> bool:
        """Whether a character inside a string ends it."""
        if self._escaped:
            self._escaped = False
        elif c == "\\":
            self._escaped = True
        else:
            return c == '"'
        return False


def _decoded(raw: str) -> str | None:
    """The content of a JSON string; None for anything else."""
    try:
        value = json.loads(raw, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
