"""Checks an installed CUDA wheel: the CPU answers as ever, and a GPU that cannot be used is explained.

Run by check_cuda_wheel.py, with the Python of an environment that has the wheel and what it depends on.
"""

import ctypes
import json
import re
import sys
from pathlib import Path

from astrai_rs import Engine, SamplingParams, _core

MODEL = Path(__file__).parent / "fixtures/golden/glass-llama"
DRIVER = "libcuda.so.1"
LIBRARIES = re.compile(r"cuda|cublas|curand|nvrtc", re.IGNORECASE)


def loaded_libraries() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if ".so" in line}


def has_driver() -> bool:
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True


def check_answers(device: str) -> None:
    cases = json.loads((MODEL / "golden.json").read_text(encoding="utf-8"))
    params = [SamplingParams(temperature=0, max_tokens=len(case["greedy_ids"])) for case in cases]
    with Engine(MODEL, device=device, dtype="float32") as engine:
        outputs = engine.generate([case["prompt_ids"] for case in cases], params)
        if engine.device != "cpu":
            sys.exit(f'device="{device}" took {engine.device}')
    for case, output in zip(cases, outputs, strict=True):
        if output.token_ids != case["greedy_ids"]:
            sys.exit(f'device="{device}" gave {output.token_ids}, not {case["greedy_ids"]}')


def check_without_driver() -> None:
    check_answers("auto")
    try:
        Engine(MODEL, device="cuda")
    except RuntimeError as error:
        if f"no NVIDIA driver: {DRIVER} was not found" not in str(error):
            sys.exit(f'device="cuda" does not name the missing driver: {error}')
    else:
        sys.exit('device="cuda" works without a driver')


def main() -> None:
    if not _core.system_info()["cuda"]:
        sys.exit("built without CUDA")
    check_answers("cpu")
    if found := [name for name in loaded_libraries() if LIBRARIES.search(name)]:
        sys.exit(f"the CPU needs libraries of CUDA: {', '.join(found)}")
    if has_driver():
        print("built with CUDA, answers on the CPU")
    else:
        check_without_driver()
        print("built with CUDA, answers on the CPU, names the missing driver")


if __name__ == "__main__":
    main()
