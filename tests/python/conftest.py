from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest

import astrai_rs
from astrai_rs import Engine, _core
from random_model import write_random_model

# The same examples in every run: a red test is somebody's change, not luck.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")

FIXTURES = Path(__file__).parent.parent / "fixtures"
GLASS = FIXTURES / "golden/glass-llama"

LIMIT = 60
"""Seconds after which something hangs; nothing here takes more than a few."""


def has_driver() -> bool:
    """Whether NVIDIA's is installed."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


IS_CUDA_BUILD = _core.system_info()["cuda"]
NO_CUDA = (
    (RuntimeError, "no NVIDIA driver: libcuda.so.1 was not found")
    if IS_CUDA_BUILD
    else (NotImplementedError, "this build has no CUDA")
)
"""What `device="cuda"` raises."""
unless_cuda_works = pytest.mark.skipif(
    IS_CUDA_BUILD and has_driver(), reason="built with CUDA, and an NVIDIA driver is here"
)


@pytest.fixture
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture(scope="session")
def cases() -> list[dict]:
    """Prompts of the story model and its greedy answers."""
    return json.loads((GLASS / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def glass() -> Iterator[Engine]:
    """The story model. Exact, so that its answers can be compared with the golden ones."""
    with Engine(GLASS, dtype="float32") as engine:
        yield engine


ENDLESS_TOKENS = 2**16
"""A cache for the endless model; the default has room for 64 whole contexts."""


@pytest.fixture(scope="session")
def endless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The story model without an end: no end-of-text token, and a context that takes minutes to fill."""
    folder = tmp_path_factory.mktemp("endless")
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copyfile(GLASS / name, folder / name)
    config = json.loads((GLASS / "config.json").read_text(encoding="utf-8"))
    config |= {"eos_token_id": None, "max_position_embeddings": 2**15}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((GLASS / "tokenizer_config.json").read_text(encoding="utf-8"))
    del tokenizer["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes nonsense of every kind, for SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("random")
    write_random_model(folder)
    return folder


@pytest.fixture
def endless(endless_folder: Path) -> Iterator[Engine]:
    with Engine(endless_folder, kv_cache_tokens=ENDLESS_TOKENS) as engine:
        yield engine


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


GAUGES = ("num_requests_running", "num_requests_waiting", "kv_blocks_used")


def assert_idle(engine: Engine) -> None:
    """Nothing is held or queued in the core, nothing is routed in Python, and the engine answers."""
    wait_until(lambda: not any(engine.stats()[name] for name in GAUGES))
    assert engine._dispatcher._routes == {}
    assert (
        len(engine.generate("Once", astrai_rs.SamplingParams(max_tokens=3, ignore_eos=True)).token_ids) == 3
    )


@contextmanager
def python(
    *arguments: str, env: Mapping[str, str] | None = None, **options
) -> Iterator[subprocess.Popen[str]]:
    """A Python process that finds this astrai_rs; its streams are text. Killed at the end."""
    environment = {**os.environ, "PYTHONPATH": str(Path(astrai_rs.__file__).parent.parent), **(env or {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen([sys.executable, *arguments], text=True, env=environment, **options) as process:
        try:
            yield process
        finally:
            process.kill()


INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""First line of a process that shall take Ctrl-C: a CI may start us with SIGINT ignored."""
