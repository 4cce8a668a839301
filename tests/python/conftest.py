from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

import fake_core

# The same examples in every run: a red test is somebody's change, not luck.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder for the fake core."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.fixture
def make_engine(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes `Engine`s over the fake core; `.core` is the fake. Closed at the end."""
    from astrai_rs import engine as module

    monkeypatch.setattr(module._core, "Engine", fake_core.FakeEngine)
    monkeypatch.setattr(fake_core.FakeEngine, "step_seconds", 0.0)
    engines = []

    def make(**options):
        options.setdefault("tokenizer", fake_core.ByteTokenizer())
        engine = module.Engine(folder, **options)
        engine.core = engine._core
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(make_engine):
    return make_engine()


@pytest.fixture
def slow_engine(make_engine, monkeypatch: pytest.MonkeyPatch):
    """Each step takes 5 ms."""
    monkeypatch.setattr(fake_core.FakeEngine, "step_seconds", 0.005)
    return make_engine()
