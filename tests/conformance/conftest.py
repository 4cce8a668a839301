"""Clients that are too large for the suite, against one server. `make conformance` installs and runs them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "python"))

from astrai_rs import Engine
from astrai_rs.model import embedded_model
from serving import serving


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with Engine(embedded_model()) as engine:
        yield engine


@pytest.fixture(scope="session")
def url(engine) -> Iterator[str]:
    with serving(engine) as (url, _):
        yield url
