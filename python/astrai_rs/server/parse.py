"""A model's text → reasoning, content and tool calls, while it arrives."""

from __future__ import annotations

import json
import re
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


_SPACE = " \t\r\n"
_NEVER = r"(?!)"


def starts_in_reasoning(prompt: str, markers: tuple[str, str]) -> bool:
    """Whether a rendered prompt ends inside reasoning, which the model then goes on with."""
    return prompt.rstrip().endswith(markers[0])


class OutputParser:
    """Reads one sample's text. What the pieces add up to does not depend on where the text is cut.

    Text is held back only while it may become a marker, white space before a call, or a call whose name is
    not complete. What looked like a call but is none comes out as content; nothing is lost. The cost is
    linear in the text's length, whatever the text.

    Args:
        tool_format: None: no calls are looked for.
        tool_names: in formats without a marker only objects that name one of these are calls; None: all
            objects that have a name and arguments.
        reasoning: the markers around reasoning, which may only begin the text.
        starts_in_reasoning: the text begins inside them.
    """

    def __init__(
        self,
        *,
        tool_format: ToolFormat | None,
        tool_names: Collection[str] | None = None,
        reasoning: tuple[str, str] | None = None,
        starts_in_reasoning: bool = False,
    ) -> None:
        self._format = tool_format or ToolFormat("none", begin="")
        self._markers: tuple[str, ...] = ()
        """What a call may begin with."""
        if tool_format is not None:
            self._markers = tuple(filter(None, (tool_format.prefix, tool_format.begin or "{")))
        self._names = tool_names
        self._reasoning = reasoning or ("", "")
        self._text = ""
        self._at = 0
        """How much of the text is read."""
        self._space: list[str] = []
        """White space that is dropped if a marker follows."""
        self._skip_space = starts_in_reasoning
        self._calls = 0
        self._call: _Call | None = None
        self._marked = False
        """A marker says that a call follows."""
        self._raw: list[str] = []
        """The text of a call that has not been given out."""
        self._out: list[Delta] = []
        self._state: Callable[[bool], bool] = self._read_content
        if reasoning is not None:
            self._state = self._read_reasoning if starts_in_reasoning else self._read_start

    def add(self, text: str) -> list[Delta]:
        """What became certain with this text."""
        self._text, self._at = self._text[self._at :] + text, 0
        return self._read(final=False)

    def flush(self) -> list[Delta]:
        """The rest, once no more text comes."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> list[Delta]:
        while self._state(final):
            pass
        out, self._out = self._out, []
        return out

    # Each state reads on in the text and says whether the next one may go on.

    def _read_start(self, final: bool) -> bool:
        self._space += self._take_space(_SPACE)
        begin = self._reasoning[0]
        if self._text.startswith(begin, self._at):
            self._at += len(begin)
            self._space.clear()
            self._skip_space = True
            self._state = self._read_reasoning
            return True
        if begin.startswith(self._text[self._at : self._at + len(begin)]) and not final:
            return False
        self._state = self._read_content
        return True

    def _read_reasoning(self, final: bool) -> bool:
        marker = self._read_until(Reasoning, self._reasoning[1:], final)
        if marker is None:
            return False
        self._at += len(marker)
        self._space.clear()
        self._skip_space = True
        self._state = self._read_content
        return True

    def _read_content(self, final: bool) -> bool:
        marker = self._read_until(Content, self._markers, final)
        if marker is None:
            return False
        self._raw, self._space = self._space, []
        self._marked = marker != "{"
        if self._marked:
            self._raw.append(marker)
            self._at += len(marker)
        self._state = self._read_call
        return True

    def _read_until(
        self, kind: type[Content] | type[Reasoning], markers: tuple[str, ...], final: bool
    ) -> str | None:
        """Give out the text up to the first marker, and that marker, which is not read yet; if there is
        none, all text but what may become one."""
        pattern = "|".join(map(re.escape, markers)) or _NEVER
        if found := re.compile(pattern).search(self._text, self._at):
            self._emit(kind, found.start())
            return found[0]
        self._emit(kind, len(self._text) - (0 if final else _open_end(self._text, self._at, markers)))
        if final:
            if kind is Content and self._space:
                self._out.append(Content("".join(self._space)))
            self._space.clear()
        return None

    def _read_call(self, final: bool) -> bool:
        if self._call is None:
            self._raw += self._take_space(_SPACE + "[" if self._format.is_list else _SPACE)
            if self._at == len(self._text):
                return self._give_up() if final and self._raw else False
            self._call = _Call(self._format)
        start, self._at = self._at, self._call.feed(self._text, self._at)
        self._raw.append(self._text[start : self._at])
        if final:
            self._call.cut_off()
        return self._follow(self._call, final)

    def _follow(self, call: _Call, final: bool) -> bool:
        """Give out what the call has come to."""
        if not call.started and call.name is not None and self._is_call(call):
            call.started = True
            self._out.append(ToolCallStart(self._calls, call.name))
        if call.started:
            self._raw.clear()
            if text := call.take():
                self._out.append(ToolCallArguments(self._calls, text))
        elif call.failed or call.done or final:
            return self._give_up()
        if call.failed or call.done:
            self._calls += 1
            self._call, self._skip_space = None, True
            self._state = self._read_end
            return True
        return False

    def _is_call(self, call: _Call) -> bool:
        """Whether an object with a name is a call."""
        if self._marked:
            return True
        return call.has_arguments if self._names is None else call.name in self._names

    def _give_up(self) -> bool:
        """It was no call: its text is content."""
        self._call = None
        self._put(Content, "".join(self._raw))
        self._raw.clear()
        self._state = self._read_content
        return True

    def _read_end(self, final: bool) -> bool:
        """What stands after a call: its end marker, the list's comma or end, a separator."""
        self._take_space(_SPACE)
        is_list = self._format.is_list
        if is_list and self._text.startswith(",", self._at):
            self._at += 1
            self._state = self._read_call
            return True
        end = self._format.end or ("]" if is_list else self._format.separator.strip())
        if self._text.startswith(end, self._at):
            self._at += len(end)
        elif end.startswith(self._text[self._at : self._at + len(end)]) and not final:
            return False
        self._state = self._read_content
        return True

    def _take_space(self, characters: str) -> list[str]:
        """Read on over white space; what was read, in no or one part."""
        start, end = self._at, len(self._text)
        while self._at < end and self._text[self._at] in characters:
            self._at += 1
        return [self._text[start : self._at]] if self._at > start else []

    def _emit(self, kind: type[Content] | type[Reasoning], end: int) -> None:
        """Give out the text up to `end`."""
        start, self._at = self._at, end
        self._put(kind, self._text[start:end])

    def _put(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        """Give out a text; white space at its end is held back where a marker may follow."""
        if self._skip_space:
            text = text.lstrip()
        if not text:
            return
        self._skip_space = False
        kept = text.rstrip() if self._markers or kind is Reasoning else text
        if kept:
            self._out.append(kind("".join([*self._space, kept])))
            self._space.clear()
        if len(kept) < len(text):
            self._space.append(text[len(kept) :])


def _open_end(text: str, start: int, markers: Collection[str]) -> int:
    """Length of the longest end of `text[start:]` that begins a marker without completing it."""
    longest = min(len(text) - start, max(map(len, markers), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(m.startswith(text[-n:]) for m in markers)), 0)


class _Call:
    """An object that may be a call, character by character. Values are delimited, not checked."""

    def __init__(self, tool_format: ToolFormat) -> None:
        self.name: str | None = None
        self.started = False
        """The name has been given out."""
        self.done = False
        self.failed = False
        """It is no object, or not a call, or not complete."""
        self.has_arguments = False
        """Arguments have begun, as an object or in a string."""
        self._arguments_key = tool_format.arguments
        self._name_end = tool_format.name_end
        self._arguments: list[str] = []
        self._gave_arguments = False
        self._in_arguments = False
        """The current value is the arguments'."""
        self._state: Callable[[str], bool] = self._in_bare_name if self._name_end else self._open
        self._key = ""
        self._value: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str, start: int) -> int:
        """Read on from `start`; where the object, or what may be one, ends."""
        for at in range(start, len(text)):
            if self.done or self.failed:
                return at
            if not self._state(text[at]):
                self.failed = True
                return at
        return len(text)

    def cut_off(self) -> None:
        """No more text comes: arguments that are given out whole are as complete as they will be."""
        if not self._in_arguments:
            return
        raw = "".join(self._value)
        if self._state == self._in_text:
            lengths = range(len(raw), len(raw) - len(r"\uFFF") - 1, -1)  # an escape may be incomplete
            texts = (_decoded(raw[:length] + '"') for length in lengths)
            self._arguments.append(next((text for text in texts if text is not None), raw))
        elif self._state == self._in_scalar:
            self._take_value(raw)

    def take(self) -> str:
        """The arguments' text that has come since the last call of this; `{}` in the end if there is none."""
        text = "".join(self._arguments)
        self._arguments.clear()
        if (self.done or self.failed) and not text and not self._gave_arguments:
            text = "{}"
        self._gave_arguments |= bool(text)
        return text

    # Each state takes a character and says whether it may stand there.

    def _open(self, c: str) -> bool:
        self._state = self._before_key
        return c == "{"

    def _in_bare_name(self, c: str) -> bool:
        self._value.append(c)
        end = self._name_end
        if c == end[-1] and "".join(self._value[-len(end) :]) == end:
            name = "".join(self._value).partition(end[0])[0]
            self.name = name or None  # the marker of an id may follow it
            self._key, self._state = self._arguments_key, self._before_bare_arguments
            return bool(name)
        return c not in _SPACE + '{"'

    def _before_bare_arguments(self, c: str) -> bool:
        return c in "{" + _SPACE and self._before_value(c)

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
        self._in_arguments = self._key == self._arguments_key and not self.has_arguments
        if self._in_arguments:
            self.has_arguments = c in '{"'
        is_container = c in "{["
        self._state = self._in_container if is_container else self._in_text if c == '"' else self._in_scalar
        if c == '"':
            self._value.append(c)
            return True
        return c not in ",}]" and self._state(c)

    def _in_container(self, c: str) -> bool:
        if self._in_arguments:
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
                self.done = bool(self._name_end)
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
        if self._in_arguments and raw != "null":
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
    """The content of a JSON string; None for anything else. Half a surrogate pair becomes U+FFFD."""
    try:
        value = json.loads(raw, strict=False)
    except ValueError:
        return None
    if not isinstance(value, str):
        return None
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
