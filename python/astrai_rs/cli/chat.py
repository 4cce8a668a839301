"""`astrai-rs chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astrai_rs.cli.common import (
    FAILED,
    MaxTokens,
    Model,
    Seed,
    Stopwatch,
    System,
    Temperature,
    TopK,
    TopP,
    fail,
    open_engine,
    show,
    takes_engine_options,
)

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from astrai_rs.engine import Engine
    from astrai_rs.request import SamplingParams


@takes_engine_options
def chat(
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    *,
    options: dict[str, Any],
) -> None:
    """Talk to a model. Ctrl-C stops an answer; at the prompt it leaves."""
    from astrai_rs.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    with open_engine(model, options) as engine:
        if getattr(engine.tokenizer, "chat_template", None) is None:
            fail("the model has no chat template; use: astrai-rs run --raw", FAILED)
        Conversation(engine, params, system).loop()


class Conversation:
    """The chat loop: what was said, and the commands."""

    HELP = """\
/new              start over
/retry            answer the last question again
/undo             forget the last question and its answer
/system TEXT      set the system message; without text, none
/set NAME VALUE   set a sampling parameter, such as: /set temperature 0.2
/save FILE        write the conversation as JSON
/exit             leave
Alt+Enter starts a new line; Ctrl-C stops an answer, at the prompt it leaves."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None) -> None:
        self._engine = engine
        self._params = params
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._commands = {
            "/new": self._new,
            "/retry": self._retry,
            "/undo": self._undo,
            "/system": self._set_system,
            "/set": self._set,
            "/save": self._save,
        }

    def loop(self) -> None:
        """Until Ctrl-C or Ctrl-D at the prompt, or /exit."""
        sys.stderr.write(self.HELP + "\n")
        for text in _lines([*self._commands, "/exit"]):
            if text.split(maxsplit=1)[:1] in (["/exit"], ["/quit"]):
                return
            if text.startswith("/"):
                self._command(text)
            elif text.strip():
                self._turn(text)

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        command = self._commands.get(name)
        if command is None:
            sys.stderr.write(f"error: no command {name}\n{self.HELP}\n")
            return
        try:
            command(rest.strip())
        except (OSError, TypeError, ValueError) as error:
            sys.stderr.write(f"error: {error}\n")

    def _new(self, _: str) -> None:
        self._messages.clear()

    def _undo(self, _: str) -> str | None:
        """The question that was taken back."""
        if not self._messages:
            raise ValueError("nothing was said yet")
        del self._messages[-1]
        return self._messages.pop()["content"]

    def _retry(self, _: str) -> None:
        before = list(self._messages)
        if not self._turn(self._undo("") or ""):
            self._messages = before

    def _set_system(self, text: str) -> None:
        self._system = text or None

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        known = [field.name for field in fields(self._params)]
        if name not in known:
            raise ValueError(f"no such parameter: {name or 'none given'}; known: {', '.join(known)}")
        if name == "n":
            raise ValueError("n stays 1: one conversation has one answer")
        params = replace(self._params, **{name: _value(value)})
        with self._engine.stream("a", replace(params, max_tokens=1)):  # refuses what is out of range
            self._params = params

    def _save(self, path: str) -> None:
        if not path:
            raise ValueError("/save needs the name of a file")
        system = [{"role": "system", "content": self._system}] if self._system else []
        text = json.dumps([*system, *self._messages], ensure_ascii=False, indent=2)
        Path(path).expanduser().write_text(text + "\n", encoding="utf-8")

    def _turn(self, text: str) -> bool:
        """One question and its answer; a stopped answer stays in the history as far as it came. False if
        there can be none."""
        self._messages.append({"role": "user", "content": text})
        system = [{"role": "system", "content": self._system}] if self._system else []
        clock, said = Stopwatch(), ""
        try:
            ids = self._engine.tokenizer.apply_chat_template([*system, *self._messages])
            with self._engine.stream(ids, self._params) as stream:
                for piece in stream:
                    clock.saw(len(piece.token_ids))
                    said += piece.text
                    show(piece.text)
        except KeyboardInterrupt:
            show(" …")
        except ValueError as error:  # such as a conversation longer than the context
            self._messages.pop()
            sys.stderr.write(f"error: {error}\n")
            return False
        self._messages.append({"role": "assistant", "content": said})
        show("\n")
        sys.stderr.write(clock.line() + "\n")
        return True


def _value(text: str) -> Any:
    """JSON, or a bare word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _lines(commands: list[str]) -> Iterator[str]:
    """What the user types; Ctrl-C and Ctrl-D end it. Without a terminal: the lines of stdin."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    session = _session(commands)
    while True:
        try:
            yield session.prompt("> ")
        except (KeyboardInterrupt, EOFError):
            return


def _session(commands: list[str]) -> PromptSession[str]:
    """A prompt with several lines, completion of commands, and the history of earlier sessions."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "astrai_rs"
    history: History = InMemoryHistory()
    with suppress(OSError):  # such as a home that cannot be written
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "chat_history"
        file.touch()
        history = FileHistory(str(file))
    return PromptSession(
        multiline=True,
        key_bindings=keys,
        history=history,
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
    )
