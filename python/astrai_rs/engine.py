"""`Engine`: text in, text out, over the Rust core."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

from astrai_rs import _core
from astrai_rs.codec import Codec, load_tokenizer, stop_ids
from astrai_rs.dispatch import Dispatcher
from astrai_rs.grammar import Grammars
from astrai_rs.model import resolve
from astrai_rs.output import Request
from astrai_rs.request import (
    GenerationOutput,
    SamplingParams,
    StructuredOutputsParams,
    check_bool,
    check_ids,
    core_arguments,
)
from astrai_rs.stream import Prepared, RequestGroup, TokenStream
from astrai_rs.tokenizer import AutoTokenizer, model_stop_ids

if TYPE_CHECKING:
    from astrai_rs.async_stream import AsyncRequestGroup, AsyncTokenStream

Prompt = str | Sequence[int]
"""Text, or token ids."""

Progress = bool | Callable[[int, int], None]
"""True prints to stderr; a function gets (finished prompts, all prompts)."""

_LAST_EVENT_SECONDS = 0.25
"""How long `generate` waits for the metrics, which come with the core's last event, after a stop string."""


class Engine:
    """A model, ready to generate. Threads and asyncio tasks may share it; requests are batched as they come.

    >>> with Engine("path/to/model") as engine:                                          # doctest: +SKIP
    ...     print(engine.generate("Once upon a time", SamplingParams(max_tokens=16)).text)

    Args:
        model: a folder, a `.gguf` file, or a hub id (`owner/name`, `owner/name:Q4_K_M`).
        tokenizer: None takes the model's own; else a path, an `AutoTokenizer`, or any object with `encode`
            and `decode`, such as one of transformers. A model without tokenizer serves token ids only.
        device: `auto` (the first GPU if it can be used, else the CPU), `cpu` or `cuda`.
        dtype: `auto` (the fastest form that keeps quality), `bfloat16`, `float16`, or `float32` (exact
            everywhere).
        max_model_len: the most tokens of prompt and output together; None takes the model's own.
        max_num_seqs: the most sequences in one step.
        max_num_batched_tokens: the most tokens in one step; longer prompts are computed in chunks.
        kv_cache_tokens: size of the cache in tokens; None derives it from memory.
        kv_cache_dtype: `auto` (as `dtype`), or `int8`: about half of bf16's memory, on the CPU only, which
            `device="auto"` then is.
        enable_prefix_caching: reuse the cache of equal beginnings of prompts.
        gpu_memory_utilization: share of a GPU's memory for weights, cache and activations.
        num_threads: CPU threads; None takes the CPUs that the process may use.
        packed_cache: folder where weights are kept in the form that the CPU's kernels take (about the size
            of the model), so that the next load need not make it; None keeps nothing.
        seed: seeds requests that bring none.

    Raises:
        FileNotFoundError: there is no such model.
        CheckpointError: a file is damaged or incomplete; the message names what.
        NotImplementedError: a model, tokenizer or cache of a kind that is not supported.
        ValueError: an argument is out of range.
        OSError: `packed_cache` cannot be read or written.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: Any = None,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        kv_cache_tokens: int | None = None,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        gpu_memory_utilization: float = 0.9,
        num_threads: int | None = None,
        packed_cache: str | Path | None = None,
        seed: int | None = None,
    ) -> None:
        path = resolve(model)
        self.tokenizer: Any = None
        """The `AutoTokenizer` (or the object given as `tokenizer`); None without one."""
        eos_token_ids: list[int] = []

        def load_eos_token_ids() -> list[int]:
            self.tokenizer = load_tokenizer(path, tokenizer)
            eos_token_ids.extend(stop_ids(self.tokenizer))
            if tokenizer is not None or self.tokenizer is None:
                eos_token_ids.extend(i for i in model_stop_ids(path) if i not in eos_token_ids)
            return eos_token_ids

        self._core = _core.Engine(
            str(path),
            load_eos_token_ids,  # while the core packs the weights
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_tokens=kv_cache_tokens,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=enable_prefix_caching,
            gpu_memory_utilization=gpu_memory_utilization,
            num_threads=num_threads,
            packed_cache=_folder(packed_cache),
            seed=seed,
        )
        self._codec = None if self.tokenizer is None else Codec(self.tokenizer)
        self._grammars = Grammars(self.tokenizer, eos_token_ids, self._core.vocab_size)
        self._dispatcher = Dispatcher(self._core)
        # Runs when the engine and its requests are dropped and at interpreter exit, whichever comes first.
        self._finalizer = weakref.finalize(self, self._dispatcher.close)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is also a sequence of str
        self,
        prompts: str | list[int],
        sampling_params: SamplingParams | None = ...,
        *,
        progress: Progress = ...,
    ) -> GenerationOutput: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = ...,
        *,
        progress: Progress = ...,
    ) -> list[GenerationOutput]: ...
    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress = False,
    ) -> GenerationOutput | list[GenerationOutput]:
        """Generate for one prompt, or for a list of prompts in their order.

        An exception, Ctrl-C included, aborts every request of the call.

        Args:
            prompts: a text, a list of token ids, or a list of texts and lists of ids.
            sampling_params: one for all, or one per prompt.
            progress: True shows a counter on stderr; a function is called with (finished, all).

        Raises:
            TypeError, ValueError: a prompt or parameter is not usable; nothing was generated.
            EngineClosed: the engine was closed.
            MemoryError, RuntimeError: the step failed.
        """
        single, items = _as_list(prompts)
        outputs = self._generate(items, _one_each(sampling_params, len(items)), progress)
        return outputs[0] if single else outputs

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: Progress = False,
    ) -> Any:
        """Answer a conversation (a list of messages), or each of a list of conversations.

        Args:
            messages: dicts with `role` and `content`.
            tools: JSON schemas of functions that the model may call.
            chat_template: Jinja text instead of the model's template.
            continue_final_message: go on with the last message instead of starting an answer.
            chat_template_kwargs: variables for the template, such as `enable_thinking`.

        Returns:
            A `GenerationOutput`, or a list of them. Errors as `generate`; ValueError without a chat template.
        """
        self._dispatcher.check_process()
        if self._codec is None:
            raise ValueError("chat needs a tokenizer with a chat template, and this model has none")
        if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
            kind = type(chat_template_kwargs).__name__
            raise TypeError(f"chat_template_kwargs must be a mapping, not {kind} {chat_template_kwargs!r}")
        check_bool("add_generation_prompt", add_generation_prompt)
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt and not continue_final_message
        }
        if chat_template is not None:
            options["chat_template"] = chat_template
        if continue_final_message:
            options["continue_final_message"] = True
        single = not (messages and isinstance(messages[0], (list, tuple)))
        conversations = [messages] if single else messages
        options |= {"tools": tools, **(chat_template_kwargs or {})}
        prompts = [self._codec.chat(conversation, options) for conversation in conversations]
        outputs = self._generate(prompts, _one_each(sampling_params, len(prompts)), progress)
        return outputs[0] if single else outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> TokenStream:
        """Pieces as they are generated. The request starts now; dropping or closing the stream aborts it."""
        request, arguments = self._request(prompt, _params(sampling_params))
        return TokenStream(self._dispatcher, request, arguments)

    def astream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> AsyncTokenStream:
        """`stream` for asyncio; call it where a loop runs. The request starts now."""
        import asyncio

        from astrai_rs.async_stream import AsyncTokenStream

        sink = self._dispatcher.loop_sink(asyncio.get_running_loop())
        request, arguments = self._request(prompt, _params(sampling_params))
        return AsyncTokenStream(self._dispatcher, sink, request, arguments)

    def astream_group(
        self, prompts: Sequence[Prompt], sampling_params: Sequence[SamplingParams]
    ) -> AsyncRequestGroup:
        """`astream` for several prompts at once: `async for index, piece in …`, as pieces come."""
        import asyncio

        from astrai_rs.async_stream import AsyncRequestGroup

        sink = self._dispatcher.loop_sink(asyncio.get_running_loop())
        pairs = zip(prompts, sampling_params, strict=True)
        return AsyncRequestGroup(self._dispatcher, sink, [self._request(prompt, p) for prompt, p in pairs])

    def compile_grammars(self, sampling_params: Iterable[SamplingParams]) -> None:
        """Compile what `structured_outputs` ask for, so that submitting these parameters takes no time."""
        for params in sampling_params:
            if params.structured_outputs is not None:
                self._grammars.compile(StructuredOutputsParams.of(params.structured_outputs))

    def id_to_text(self, token_id: int) -> str:
        """One token alone as text, special tokens included. ValueError without a tokenizer."""
        if self._codec is None:
            raise ValueError("this model has no tokenizer")
        return self._codec.id_to_text(token_id)

    def token_bytes(self) -> list[bytes]:
        """What each id adds to a text, in UTF-8; empty for ids without text.

        Raises:
            NotImplementedError: the tokenizer is of a kind whose tokens have no bytes of their own.
        """
        return self._grammars.token_bytes()

    def stats(self) -> dict[str, float | int]:
        """Counters and gauges: num_requests_running, num_requests_waiting, kv_blocks_used, kv_blocks_total,
        kv_blocks_cached, prefix_cache_queries, prefix_cache_hits, preemptions, prompt_tokens_total,
        generation_tokens_total, uptime_s, steps."""
        self._dispatcher.check_process()
        return self._core.stats()

    def clear_prefix_cache(self) -> None:
        """Forget every cached beginning of a prompt."""
        self._dispatcher.check_process()
        self._core.clear_prefix_cache()

    def close(self) -> None:
        """Stop the engine and free the model. Live requests end with EngineClosed. Idempotent."""
        self._dispatcher.check_process()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "open" if self._finalizer.alive else "closed"
        return f"<astrai_rs.Engine {self.device} {self.dtype} max_model_len={self.max_model_len} {state}>"

    @property
    def vocab_size(self) -> int:
        return self._core.vocab_size

    @property
    def max_model_len(self) -> int:
        """The most tokens of prompt and output together."""
        return self._core.max_model_len

    @property
    def max_num_seqs(self) -> int:
        """The most sequences in one step."""
        return self._core.max_num_seqs

    @property
    def is_running(self) -> bool:
        """Whether requests are taken: not after `close`, nor after a failed step."""
        return self._dispatcher.is_running

    @property
    def device(self) -> str:
        return self._core.device

    @property
    def dtype(self) -> str:
        return self._core.dtype

    @property
    def kv_cache_dtype(self) -> str:
        return self._core.kv_cache_dtype

    @property
    def num_threads(self) -> int:
        return self._core.num_threads

    @property
    def kv_cache_tokens(self) -> int:
        return self._core.kv_cache_tokens

    def _generate(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], progress: Progress
    ) -> list[GenerationOutput]:
        pairs = zip(self._encoded(prompts), params, strict=True)
        prepared = [self._request(prompt, one) for prompt, one in pairs]
        for (request, _), prompt in zip(prepared, prompts, strict=True):
            request.prompt = prompt if isinstance(prompt, str) else None
        return self._finish(prepared, progress)

    def _finish(self, prepared: Sequence[Prepared], progress: Progress = False) -> list[GenerationOutput]:
        """Submit the requests together and wait for all of them."""
        report, done = _reporter(progress), 0
        running = [request.params.n for request, _ in prepared]
        """Samples of each request that are not complete."""
        group = RequestGroup(self._dispatcher, prepared)
        try:
            for index, chunk in group:
                running[index] -= chunk.finish_reason is not None
                if chunk.finish_reason is not None and not running[index]:
                    done += 1
                    report(done, len(prepared))
            group.settle(_LAST_EVENT_SECONDS)
        finally:
            group.close()
        return [request.output() for request, _ in prepared]

    def _encoded(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Texts as ids, encoded as one batch where the tokenizer can."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < 2 or not isinstance(self.tokenizer, AutoTokenizer):
            return list(prompts)
        encoded = iter(self.tokenizer.encode(texts))
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _request(self, prompt: Prompt, params: SamplingParams, **extra: Any) -> Prepared:
        """A request and the arguments of its submit; `extra` are more of these, for AstrAI's surface."""
        self._dispatcher.check_process()
        ids = self._prompt_ids(prompt)
        if params.stop and self._codec is None:
            raise ValueError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
        arguments = core_arguments(params) | extra
        if params.max_tokens is None:
            arguments["max_tokens"] = max(1, self.max_model_len - len(ids))
        if params.bad_words:
            if self._codec is None:
                raise ValueError("bad_words need a tokenizer, and this model has none")
            arguments["bad_words"] = self._codec.bad_word_ids(params.bad_words)
        if params.structured_outputs is not None:
            arguments["grammar"] = self._grammars.compile(
                StructuredOutputsParams.of(params.structured_outputs)
            )
        text = prompt if isinstance(prompt, str) else None
        request = Request(text, ids, params, self._codec, self._dispatcher.stop_sample, engine=self)
        return request, arguments

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return check_ids("a prompt", prompt)
        if self._codec is None:
            raise ValueError("a text prompt needs a tokenizer, and this model has none; pass token ids")
        return self._codec.encode(prompt)


def _folder(given: str | Path | None) -> str | Path | None:
    """With the home for `~`. What is no path is for the core to refuse."""
    if given == "":
        raise ValueError("packed_cache must not be empty")
    return Path(given).expanduser() if isinstance(given, str | Path) else given


def _as_list(prompts: Any) -> tuple[bool, list[Prompt]]:
    """`(was it one prompt, the prompts)`."""
    if isinstance(prompts, str):
        return True, [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not hasattr(prompts, "__iter__"):
        kind = type(prompts).__name__
        raise TypeError(f"prompts must be a string, a list of token ids, or a list of these, not {kind}")
    items = list(prompts)
    # Arrays have __index__, too, but a number has no length.
    single = bool(items) and all(hasattr(i, "__index__") and not hasattr(i, "__len__") for i in items)
    return single, [items] if single else items


def _one_each(params: Any, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [_params(params)] * count
    if isinstance(params, (str, Mapping)) or not hasattr(params, "__iter__"):
        raise TypeError(
            f"sampling_params must be SamplingParams or a list of them, not {type(params).__name__}"
        )
    items = [_params(item) for item in params]
    if len(items) != count:
        raise ValueError(
            f"sampling_params: {len(items)} given for {count} prompts; give one for all or one each"
        )
    return items


def _params(params: Any) -> SamplingParams:
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be SamplingParams, not {type(params).__name__}")
    return params


def _reporter(progress: Progress) -> Callable[[int, int], None]:
    if callable(progress):
        return progress
    if not isinstance(progress, bool):
        raise TypeError(
            f"progress must be True, False or a function, not {type(progress).__name__} {progress!r}"
        )
    if not progress:
        return lambda done, total: None
    start = time.monotonic()

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        sys.stderr.write(f"\r{done}/{total} prompts, {time.monotonic() - start:.1f} s{end}")
        sys.stderr.flush()

    return show
