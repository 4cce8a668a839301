"""Time to first token of 64 requests that share a 1,000-token prefix, against a cold prompt of that length.

    python benches/prefix.py [--model MODEL]

Each request adds 8 tokens of its own to the prefix. Prints both medians and their ratio, and ends with one
JSON line.
"""

import argparse
import json
import random
import statistics
import time

from astrai_rs import Engine, SamplingParams
from astrai_rs.model import embedded_model

PREFIX, SUFFIX, REQUESTS, COLD_RUNS = 1000, 8, 64, 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None)
    model = parser.parse_args().model
    rng = random.Random(0)

    def ids(length: int) -> list[int]:
        return [rng.randrange(100, 40_000) for _ in range(length)]

    params = SamplingParams(max_tokens=1, temperature=0)
    with Engine(model or str(embedded_model())) as engine:

        def first_token(prompt: list[int]) -> float:
            start = time.perf_counter()
            engine.generate(prompt, params)
            return time.perf_counter() - start

        cold = statistics.median(first_token(ids(PREFIX + SUFFIX)) for _ in range(COLD_RUNS))
        prefix = ids(PREFIX)
        first_token(prefix)
        shared = statistics.median(first_token(prefix + ids(SUFFIX)) for _ in range(REQUESTS))
    print(f"cold {cold * 1e3:.1f} ms, shared prefix {shared * 1e3:.1f} ms: {shared / cold:.3f}x")
    print(
        json.dumps(
            {
                "cold_s": cold,
                "shared_s": shared,
                "ratio": shared / cold,
                "prefix": PREFIX,
                "requests": REQUESTS,
            }
        )
    )


if __name__ == "__main__":
    main()
