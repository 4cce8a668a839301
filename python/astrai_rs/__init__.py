"""LLM inference: a Rust core with paged KV cache and continuous batching, behind a Python `Engine`.

>>> from astrai_rs import Engine, SamplingParams
>>> with Engine("path/to/model") as engine:                        # doctest: +SKIP
...     print(engine.generate("Once upon a time", SamplingParams(max_tokens=64)).text)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astrai_rs._core import CheckpointError as CheckpointError
    from astrai_rs._core import EngineClosed as EngineClosed
    from astrai_rs._core import __version__ as __version__
    from astrai_rs.chat_template import ChatTemplate as ChatTemplate
    from astrai_rs.engine import Engine as Engine
    from astrai_rs.inference import GenerationRequest as GenerationRequest
    from astrai_rs.inference import InferenceEngine as InferenceEngine
    from astrai_rs.model import AutoModel as AutoModel
    from astrai_rs.request import CompletionOutput as CompletionOutput
    from astrai_rs.request import GenerationChunk as GenerationChunk
    from astrai_rs.request import GenerationOutput as GenerationOutput
    from astrai_rs.request import Logprob as Logprob
    from astrai_rs.request import RequestMetrics as RequestMetrics
    from astrai_rs.request import SamplingParams as SamplingParams
    from astrai_rs.request import StructuredOutputsParams as StructuredOutputsParams
    from astrai_rs.tokenizer import AutoTokenizer as AutoTokenizer

_HOME = {
    "AutoModel": "model",
    "AutoTokenizer": "tokenizer",
    "ChatTemplate": "chat_template",
    "CheckpointError": "_core",
    "CompletionOutput": "request",
    "Engine": "engine",
    "EngineClosed": "_core",
    "GenerationChunk": "request",
    "GenerationOutput": "request",
    "GenerationRequest": "inference",
    "InferenceEngine": "inference",
    "Logprob": "request",
    "RequestMetrics": "request",
    "SamplingParams": "request",
    "StructuredOutputsParams": "request",
    "__version__": "_core",
}
"""Public name → its module, imported on first use so that `import astrai_rs` costs nothing."""

__all__ = sorted(set(_HOME) - {"__version__"})


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'astrai_rs' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"astrai_rs.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
