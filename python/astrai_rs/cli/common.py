"""What the commands share: options, errors as one line, the engine, speed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from astrai_rs.engine import Engine

USAGE, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: wrong arguments, model or engine failed, Ctrl-C."""

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, .gguf file or hub id (owner/name:Q4_K_M).")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(help="Replays the same answer.")]
System = Annotated[str | None, typer.Option("--system", help="System message.")]


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and out."""
    line = " ".join(message.split())
    sys.stderr.write(f"astrai-rs: error: {line}\n")
    sys.exit(code)


def _engine_options(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, or int8: half the memory; CPU only.")] = "auto",
    num_threads: Annotated[
        int | None, typer.Option("--threads", help="CPU threads; default: all that the process may use.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and output.")] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of a GPU's memory for weights, cache and activations.")
    ] = 0.9,
) -> None:
    """The options of every command that opens an engine."""


_ENGINE_OPTIONS = signature(_engine_options, eval_str=True).parameters


def takes_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of an engine, in its last parameter: `options`."""

    @wraps(command)
    def run(**given: Any) -> None:
        options = {name: given.pop(name) for name in _ENGINE_OPTIONS}
        command(**given, options=options)

    own = signature(command, eval_str=True).parameters.values()
    parameters = [*(each for each in own if each.name != "options"), *_ENGINE_OPTIONS.values()]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def open_engine(model: str | None, options: dict[str, Any]) -> Engine:
    from astrai_rs.engine import Engine
    from astrai_rs.model import embedded_model

    path = embedded_model() if model is None else model
    if model == "":
        fail("--model must not be empty", USAGE)
    if not path:
        fail("no --model given, and no embedded one: pip install 'astrai_rs[demo]'", USAGE)
    return Engine(path, **options, packed_cache=os.environ.get("ASTRAI_PACKED_CACHE") or None)


def model_name(model: str | None) -> str:
    """What clients call the model: a hub id as it is, the last part of a path."""
    from astrai_rs.model import embedded_model

    if model is not None and not Path(model).expanduser().exists():
        return model
    path = Path(model) if model is not None else embedded_model()
    return "model" if path is None else path.expanduser().resolve().name.removesuffix(".gguf")


def prompt_ids(engine: Engine, messages: list[Any], *, raw: bool, text: str | None = None) -> list[int] | str:
    """The conversation through the chat template; the bare text with --raw or without a template."""
    if raw or getattr(engine.tokenizer, "chat_template", None) is None:
        if text is None:
            raise ValueError("messages need a chat template, and --raw is given or the model has none")
        return text
    ids: list[int] = engine.tokenizer.apply_chat_template(messages)
    return ids


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Stopwatch:
    """Time to first token, and tokens per second after it."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: float | None = None
        self._last = self._start
        self._tokens = 0

    def saw(self, tokens: int) -> None:
        self._last = time.perf_counter()
        if tokens and self._first is None:
            self._first = self._last
        self._tokens += tokens

    def figures(self) -> dict[str, float | None]:
        first = None if self._first is None else self._first - self._start
        span = self._last - (self._first or self._start)
        rate = (self._tokens - 1) / span if self._tokens > 1 and span > 0 else None
        return {"time_to_first_token_s": first, "tokens_per_s": rate}

    def line(self) -> str:
        figures = self.figures()
        first, rate = figures["time_to_first_token_s"], figures["tokens_per_s"]
        parts = [f"{self._tokens} tokens"]
        parts += [f"{rate:.1f} tokens/s"] if rate is not None else []
        parts += [f"first token after {first * 1e3:.0f} ms"] if first is not None else []
        return "[" + " · ".join(parts) + "]"
