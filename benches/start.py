"""From the start of a Python process to the first token of an answer, and the memory that this takes.

    python benches/start.py [--model MODEL] [--runs 9]

Each run is a fresh process that imports the package, makes an `Engine`, and asks for one token: of a short
chat, or of a short text. A first run, not counted, warms the page cache and compiles Python's byte code.
Prints medians and ends with one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

MARK = "marks: "

CHILD = """
import time
times = {"interpreter": time.monotonic()}
import astrai_rs
times["import astrai_rs"] = time.monotonic()
from astrai_rs import Engine, SamplingParams
times["import Engine"] = time.monotonic()
import sys
kind, model = sys.argv[1:]
if not model:
    from astrai_rs.model import embedded_model
    model = embedded_model()
engine = Engine(model)
times["Engine(model)"] = time.monotonic()
if kind == "chat":
    prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": "Why is the sky blue?"}])
    times["chat template"] = time.monotonic()
else:
    prompt = "Once upon a time"
output = engine.generate(prompt, SamplingParams(max_tokens=1, temperature=0))
times["first token"] = time.monotonic()
assert len(output.token_ids) == 1, output
import json
memory = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("VmHWM", "Rss")))
mib = {name: int(text.split()[0]) >> 10 for name, text in memory.items()}
print("marks: " + json.dumps([times, mib, len(output.prompt_token_ids), engine.num_threads]))
"""


def run(kind: str, model: str) -> tuple[dict[str, float], dict[str, int], int, int]:
    """Seconds of each part, MiB by name (peak; resident at the end), prompt tokens, threads."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    last = time.monotonic()
    command = [sys.executable, "-c", CHILD, kind, model]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    times, memory, tokens, threads = json.loads(done.stdout.partition(MARK)[2])
    seconds = {"total": times["first token"] - last}
    for name, at in times.items():
        seconds[name], last = at - last, at
    return seconds, memory, tokens, threads


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="a model's path; the embedded model without it")
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error(f"--runs must be at least 1; given: {arguments.runs}")
    report = {}
    for kind in ("chat", "text"):
        run(kind, arguments.model)
        runs = [run(kind, arguments.model) for _ in range(arguments.runs)]
        _, _, tokens, threads = runs[0]
        parts = {name: statistics.median(seconds[name] for seconds, *_ in runs) for name in runs[0][0]}
        memory = {name: round(statistics.median(mib[name] for _, mib, *_ in runs)) for name in runs[0][1]}
        fastest = min(seconds["total"] for seconds, *_ in runs)
        print(f"{kind}: {tokens} prompt tokens, {threads} threads, medians of {len(runs)} (ms)")
        for name, value in parts.items():
            print(
                f"  {name:18} {value * 1e3:7.1f}" + (f"  best {fastest * 1e3:.1f}" if name == "total" else "")
            )
        print("  " + ", ".join(f"{name} {mib} MiB" for name, mib in memory.items()))
        report[kind] = {"seconds": parts, "best_s": fastest, "mib": memory, "prompt_tokens": tokens}
    print(json.dumps(report | {"runs": arguments.runs, "threads": threads}))


if __name__ == "__main__":
    main()
