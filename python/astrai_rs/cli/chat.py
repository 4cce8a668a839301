"""`astrai-rs chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from astrai_rs.cli.common import (
    FAILED,
    Device,
    Dtype,
    MaxLen,
    MaxTokens,
    Model,
    Seed,
    Stopwatch,
    System,
    Temperature,
    Threads,
    TopK,
    TopP,
    fail,
    open_engine,
    show,
)

if TYPE_CHECKING:
    from astrai_rs.engine import Engine
    from astrai_rs.request import SamplingParams


def chat(
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    max_model_len: MaxLen = None,
) -> None:
    """Talk to a model. Ctrl-C stops an answer; at the prompt it leaves."""
    from astrai_rs.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    with open_engine(model, device, dtype, threads, max_model_len) as engine:
        if getattr(engine.tokenizer, "chat_template", None) is None:
            fail("the model has no chat template; use: astrai-rs run --raw", FAILED)
        Conversation(engine, params, system).loop()


class Conversation:
    """The chat loop: what was said, and the commands."""

    HELP = "/new starts over · /system TEXT sets the system message · /exit leaves · Ctrl-C stops an answer"

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None) -> None:
        self._engine = engine
        self._params = params
        self._system = system
        self._messages: list[dict[str, str]] = []

    def loop(self) -> None:
        """Until Ctrl-C or Ctrl-D at the prompt, or /exit."""
        sys.stderr.write(self.HELP + "\n")
        for text in _lines():
            if text.startswith("/"):
                if not self._command(text):
                    return
            elif text.strip():
                self._turn(text)

    def _command(self, text: str) -> bool:
        name, _, rest = text.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/new":
            self._messages.clear()
        elif name == "/system":
            self._system = rest.strip() or None
        else:
            sys.stderr.write(self.HELP + "\n")
        return True

    def _turn(self, text: str) -> None:
        """One question and its answer; a stopped answer stays in the history as far as it came."""
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
            return
        self._messages.append({"role": "assistant", "content": said})
        show("\n")
        sys.stderr.write(clock.line() + "\n")


def _lines() -> Iterator[str]:
    """What the user types; Ctrl-C and Ctrl-D end it. Without a terminal: the lines of stdin."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    while True:
        try:
            yield session.prompt("> ")
        except (KeyboardInterrupt, EOFError):
            return
