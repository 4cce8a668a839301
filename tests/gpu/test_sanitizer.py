"""NVIDIA's compute-sanitizer over the kernels' own tests, which `make kit-gpu` has built."""

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2] / "dist/gpu/cuda"
SANITIZER = shutil.which("compute-sanitizer")


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.skipif(not TESTS.exists(), reason="make kit-gpu has not built the kernels' tests")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_kernels_are_clean(tool: str) -> None:
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", TESTS, "--test-threads=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
