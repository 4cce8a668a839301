"""`astrai-rs run`: one prompt, or a JSONL file of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TextIO

import typer

from astrai_rs.cli.common import (
    FAILED,
    USAGE,
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
    prompt_ids,
    show,
    takes_engine_options,
)

if TYPE_CHECKING:
    from astrai_rs.engine import Engine
    from astrai_rs.request import GenerationChunk, SamplingParams
    from astrai_rs.stream import TokenStream


@takes_engine_options
def run(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; stdin if left out.")] = None,
    model: Model = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the text.")] = False,
    system: System = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    input: Annotated[
        Path | None,
        typer.Option("--input", help='JSONL: {"prompt": …} or {"messages": […]} per line; - reads stdin.'),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="JSONL of answers; default stdout.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    *,
    options: dict[str, Any],
) -> None:
    """Answer a prompt, or every line of a JSONL file."""
    from astrai_rs.request import SamplingParams

    if input is not None and prompt is not None:
        fail("give a prompt or --input, not both", USAGE)
    if input is not None and as_json:
        fail("--json is for one prompt; --input writes JSON in any case", USAGE)
    if input is not None and system is not None:
        fail("--system is for one prompt; lines of --input carry their own messages", USAGE)
    if input is None and output is not None:
        fail("--output is for the answers to --input", USAGE)
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    if input is not None:
        lines = read_jsonl(input, params)
        # Opened first: a wrong path must not cost the answers.
        sink = output.open("w", encoding="utf-8") if output is not None else nullcontext(sys.stdout)
        with sink as file, open_engine(model, options) as engine:
            if not run_batch(engine, lines, file, raw=raw):
                raise typer.Exit(FAILED)
        return
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            fail("no prompt: give one as argument or on stdin", USAGE)
        prompt = sys.stdin.read()
    if not prompt.strip():
        fail("the prompt is empty", USAGE)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes that are no UTF-8 come as halves of surrogate pairs
        fail(f"the prompt is not UTF-8 from character {error.start} on", USAGE)
    with open_engine(model, options) as engine:
        messages = [{"role": "system", "content": system}] if system else []
        ids = prompt_ids(engine, [*messages, {"role": "user", "content": prompt}], raw=raw, text=prompt)
        answer(engine, ids, params, as_json=as_json)


def answer(engine: Engine, ids: list[int] | str, params: SamplingParams, *, as_json: bool) -> None:
    """Stream one answer to stdout, its speed to stderr; or everything as one JSON object."""
    clock = Stopwatch()
    text, tokens, reason = "", 0, None
    for piece in engine.stream(ids, params):
        clock.saw(len(piece.token_ids))
        text += piece.text
        tokens += len(piece.token_ids)
        reason = piece.finish_reason
        if not as_json:
            show(piece.text)
    if as_json:
        summary = {"text": text, "finish_reason": reason, "num_tokens": tokens, **clock.figures()}
        sys.stdout.write(json.dumps(summary, ensure_ascii=False) + "\n")
    else:
        show("\n")
        sys.stderr.write(clock.line() + "\n")


class Line(NamedTuple):
    """One request of a JSONL file."""

    where: str
    """`file:number`."""
    fields: dict[str, Any]
    params: SamplingParams


def read_jsonl(path: Path, params: SamplingParams) -> list[Line]:
    """The requests in a file, or on stdin for `-`; a line may set any field of SamplingParams."""
    from dataclasses import fields, replace

    known = {field.name for field in fields(params)} - {"logprobs", "prompt_logprobs"}
    out = []
    for number, raw in enumerate(_read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        try:
            line = json.loads(raw.decode())
        except UnicodeDecodeError as error:
            fail(f"{where}: not UTF-8: byte 0x{raw[error.start]:02x} at {error.start}", USAGE)
        except ValueError as error:
            fail(f"{where}: not valid JSON: {error}", USAGE)
        if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
            fail(f'{where}: each line must be an object with either "prompt" or "messages"', USAGE)
        if "prompt" in line and not isinstance(line["prompt"], str):
            fail(f'{where}: "prompt" must be a string; given: {line["prompt"]!r}', USAGE)
        if "messages" in line and not (isinstance(line["messages"], list) and line["messages"]):
            fail(f'{where}: "messages" must be a list of messages; given: {line["messages"]!r}', USAGE)
        if unknown := sorted(set(line) - known - {"prompt", "messages", "id"}):
            fail(f"{where}: unknown fields: {', '.join(unknown)}", USAGE)
        try:
            own = replace(params, **{k: v for k, v in line.items() if k in known})
            out.append(Line(where, line, own))
        except (TypeError, ValueError, NotImplementedError) as error:
            fail(f"{where}: {error}", USAGE)
    return out


def _read_bytes(path: Path) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read()
    if not path.exists():
        fail(f"{path}: no such file", USAGE)
    return path.read_bytes()


_REFUSED = (TypeError, ValueError, NotImplementedError)


def run_batch(engine: Engine, lines: list[Line], file: TextIO, *, raw: bool) -> bool:
    """Answer every line together; write each row when it and those before it are done. Progress on stderr.

    A line that cannot be answered gets a row with `error`; then the result is False.
    """
    from rich.console import Console
    from rich.progress import track

    def begin(line: Line) -> TokenStream | str:
        text = line.fields.get("prompt")
        messages = line.fields.get("messages") or [{"role": "user", "content": text}]
        try:
            return engine.stream(prompt_ids(engine, messages, raw=raw, text=text), line.params)
        except _REFUSED as error:
            return str(error)

    start, tokens, refused = time.perf_counter(), 0, 0
    begun = [(line, begin(line)) for line in lines]
    for line, stream in track(begun, "generating", console=Console(stderr=True)):
        row = dict(line.fields)
        if isinstance(stream, str):
            refused += 1
            row["error"] = stream
            sys.stderr.write(f"error: {line.where}: {stream}\n")
        else:
            samples = collect(stream, line.params.n)
            tokens += sum(sample["num_tokens"] for sample in samples)
            row |= {**samples[0], **({"outputs": samples} if line.params.n > 1 else {})}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
    seconds = time.perf_counter() - start
    rate = f" · {tokens / seconds:.1f} tokens/s" if seconds else ""
    sys.stderr.write(f"[{len(lines) - refused} prompts · {tokens} tokens{rate}]\n")
    return not refused


def collect(stream: Iterable[GenerationChunk], n: int) -> list[dict[str, Any]]:
    """All `n` samples of a stream, whole."""
    samples: list[dict[str, Any]] = [{"text": "", "finish_reason": None, "num_tokens": 0} for _ in range(n)]
    for piece in stream:
        sample = samples[piece.index]
        sample["text"] += piece.text
        sample["num_tokens"] += len(piece.token_ids)
        sample["finish_reason"] = piece.finish_reason
    return samples
