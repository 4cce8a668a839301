"""NVIDIA's compute-sanitizer over the kernels' own tests, which `make kit-gpu` has built."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2] / "dist/gpu/cuda"
SANITIZER = shutil.which("compute-sanitizer")
SECONDS = int(os.environ.get("ASTRAI_SANITIZER_SECONDS", "400"))


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.skipif(not TESTS.exists(), reason="make kit-gpu has not built the kernels' tests")
@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "racecheck", "synccheck"])
def test_kernels_are_clean(tool: str) -> None:
    assert SANITIZER is not None
    # Errors that a test provokes count as well.
    tests = [TESTS, "--test-threads=1", "--skip", "what_the_gpu_cannot_do"]
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", *tests]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"not done after {SECONDS} s:\n{output[-2000:]}")
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device")
    assert process.returncode == 0, output[-6000:]
