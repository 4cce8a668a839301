"""For tests on a GPU, real or emulated (`ASTRAI_GPU=emulated`, where large models would take hours)."""

import os
from pathlib import Path

import pytest

from random_model import ASTRAI_1B, TINY, Shape, write_model

IS_EMULATED = os.environ.get("ASTRAI_GPU") == "emulated"


@pytest.fixture(scope="session")
def shape() -> Shape:
    return TINY if IS_EMULATED else ASTRAI_1B


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, shape: Shape) -> Path:
    folder = tmp_path_factory.mktemp("random")
    write_model(folder, shape)
    return folder
