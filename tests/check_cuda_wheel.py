"""Checks a CUDA wheel: it is not too large, needs no CUDA library, and works where there is none.

python tests/check_cuda_wheel.py WHEEL
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MAX_BYTES = 60 << 20
LIBRARIES = re.compile(r"cuda|cublas|curand|nvrtc|cudart", re.IGNORECASE)
FUNCTIONS = re.compile(r"^(cu[A-Z]|cuda[A-Z]|cublas|curand|nvrtc)")


def run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def check_linking(wheel: Path) -> None:
    size = wheel.stat().st_size
    if size > MAX_BYTES:
        sys.exit(f"{wheel.name} has {size} bytes; allowed: {MAX_BYTES}")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        library = archive.extract(name, folder)
        needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library))
        undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()]
    for kind, found in (
        ("libraries", [each for each in needed if LIBRARIES.search(each)]),
        ("functions", [each for each in undefined if FUNCTIONS.match(each)]),
    ):
        if found:
            sys.exit(f"{wheel.name} needs {kind} of CUDA: {', '.join(found)}")
    print(f"{wheel.name}: {size / 1e6:.1f} MB, needs {', '.join(needed)}")


def check_use(wheel: Path) -> None:
    """Installs it where nothing else is, and uses it."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        # Isolated from the sources here and from PYTHONPATH.
        python = (f"{folder}/bin/python", "-I")
        run(*python, "-m", "pip", "install", "--quiet", str(wheel))
        print(run(*python, str(Path(__file__).with_name("check_installed_wheel.py"))), end="")


def main() -> None:
    wheel = Path(sys.argv[1])
    check_linking(wheel)
    check_use(wheel)


if __name__ == "__main__":
    main()
