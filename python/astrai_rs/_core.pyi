"""The Rust core: token ids, numbers, paths and errors. It knows nothing about text."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Self, final

__all__ = [
    "CheckpointError",
    "Engine",
    "EngineClosed",
    "Event",
    "Grammar",
    "GrammarCompiler",
    "__version__",
    "gguf_metadata",
    "inspect",
    "merge_pairs",
    "system_info",
]

__version__: str

class CheckpointError(ValueError):
    """A model file is missing something, holds too much, or is damaged. The message names it."""

class EngineClosed(RuntimeError):
    """The engine was closed before or while the call ran."""

@final
class Event:
    """What one step produced for one sample of one request."""

    @property
    def request_id(self) -> int: ...
    @property
    def sample(self) -> int:
        """Which of the request's `n` samples, from 0."""
    @property
    def token_ids(self) -> list[int]:
        """The new tokens, in order; may be empty in the last event."""
    @property
    def logprobs(self) -> list[list[tuple[int, float, int]]] | None:
        """Per new token `(id, logprob, rank)`: the sampled token first, then the top ones."""
    @property
    def num_cached_tokens(self) -> int | None:
        """With the sample's first token: prompt tokens that came from the prefix cache."""
    @property
    def prompt_logprobs(self) -> list[list[tuple[int, float, int]] | None] | None:
        """Per prompt token as `logprobs`, None for the first; once, with the first event of sample 0."""
    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length`, `abort` or `error` in the sample's last event, else None."""
    @property
    def stop_reason(self) -> int | None:
        """The stop token when it was one of `stop_token_ids`; None for an end-of-text token."""
    @property
    def ends_with_stop_token(self) -> bool:
        """The sample is over and its last token, an end-of-text or stop token, is not part of the text."""
    @property
    def error(self) -> tuple[str, str] | None:
        """`(kind, message)` when finish_reason is `error`."""
    @property
    def metrics(self) -> dict[str, float | int] | None:
        """With the last event: arrival_time, first_scheduled_time, first_token_time, finished_time (seconds
        on one clock), num_cached_tokens, num_preemptions."""

@final
class Engine:
    """A loaded model and the thread that runs it. Every method may be called from any thread."""

    def __new__(
        cls,
        path: str,
        eos_token_ids: Callable[[], Sequence[int]],
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        gpu_memory_utilization: float = 0.9,
        kv_cache_tokens: int | None = None,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        num_threads: int | None = None,
        packed_cache: str | PathLike[str] | None = None,
        seed: int | None = None,
    ) -> Self:
        """Load the model. `eos_token_ids` is called meanwhile, on this thread; what it raises ends the
        loading."""
    def submit(
        self,
        prompt_token_ids: Sequence[int],
        *,
        n: int = 1,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        max_tokens: int = 256,
        min_tokens: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        logit_bias: dict[int, float] | None = None,
        allowed_token_ids: Sequence[int] | None = None,
        bad_words: Sequence[Sequence[int]] = (),
        frequency_window: int = 0,
        grammar: Grammar | None = None,
    ) -> int:
        """Queue a request, return its id. ValueError for a value out of range or a prompt that never fits."""
    def abort(self, request_id: int, sample: int | None = None) -> None:
        """Stop a request, or one sample of it. Unknown and finished ids are ignored."""
    def poll(self, timeout: float) -> list[Event]:
        """Wait up to `timeout` seconds for events; empty when there were none. EngineClosed after close."""
    def stats(self) -> dict[str, float | int]: ...
    def clear_prefix_cache(self) -> None: ...
    def close(self) -> None:
        """Stop the engine thread; live requests get an error event. Idempotent."""
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def kv_cache_dtype(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def kv_cache_tokens(self) -> int: ...

@final
class Grammar:
    """A compiled grammar. Any number of requests may use it."""

@final
class GrammarCompiler:
    """The vocabulary of a model as grammars need it; some 0.2 s of work for 50,000 tokens.

    Args:
        tokens: each id's bytes; empty for an id without text.
        special_ids: ids of control tokens, which text never holds.
        eos_token_ids: ids that may end a complete output.
        vocab_size: how many ids the model has.
    """

    def __new__(
        cls,
        tokens: Sequence[bytes],
        *,
        special_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        vocab_size: int,
    ) -> Self: ...
    def compile(self, kind: str, source: str, *, any_whitespace: bool = False) -> Grammar:
        """Compile a grammar; `kind` is `json`, `regex` or `lark`. ValueError names what is not supported."""

def gguf_metadata(path: str) -> dict[str, Any]:
    """Every metadata key of a GGUF file, arrays as lists."""

def merge_pairs(merges: Sequence[Any]) -> list[tuple[str, str]]:
    """The two tokens of each merge of byte-pair encoding, `"left right"`. CheckpointError names one that is
    something else."""

def inspect(path: str) -> dict[str, Any]:
    """What a model is: vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads,
    head_dim, max_positions, rope_theta, tie_embeddings, and `tensors`: `(canonical name, shape, encoding,
    bytes)` of each. No weight is read. CheckpointError names what is wrong with a file."""

def system_info() -> dict[str, Any]:
    """`tier` (SIMD level), `num_threads`, `cuda` (built with it) and `version`. ValueError names
    what is wrong with the environment variable ASTRAI_CPU_TIER, which forces a tier."""
