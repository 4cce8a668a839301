"""Draws the results of `peers.py`: ratios to llama.cpp, a group of bars for each test.

    python benches/plot.py RESULTS.jsonl DRAWING.svg

RESULTS has the last line that `peers.py` printed of each run. Where several lines have a test of a model, the
last one counts; runs that were cut short may be added by hand.
"""

import argparse
import json
from pathlib import Path

NAMES = {
    "decode": "decode, 128 tokens",
    "decode_4096": "decode at 4,096 tokens",
    "prefill": "prefill, 512 tokens",
    "prefill_4096": "prefill, 4,096 tokens",
    "batch": "32 requests of 128 in, 64 out",
}
COLOURS = ["#3565a5", "#7aa6d8", "#4c9a6a", "#a7cf9f"]
LEFT, UNIT, BAR, GAP, HEAD = 210, 110, 13, 14, 34
"""Pixels: room for names, length of 1.0, height of a bar, between groups, of the key."""


def read(path: Path) -> tuple[dict[str, dict[str, float]], str]:
    """Ratios by model and test, and what was measured on."""
    ratios: dict[str, dict[str, float]] = {}
    machine = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        model = run["model"].removesuffix(".gguf").upper()
        ratios.setdefault(model, {}).update({test: run[test]["ratio"] for test in NAMES if test in run})
        machine = f"{run['threads']} threads, {run['machine']}"
    return ratios, machine


def draw(ratios: dict[str, dict[str, float]], machine: str) -> str:
    parts, y = [], HEAD
    for i, model in enumerate(ratios):
        x = LEFT + 90 * i
        parts.append(f'<rect x="{x}" y="9" width="{BAR}" height="{BAR}" fill="{COLOURS[i % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 19}" y="20">{model}</text>')
    for test in NAMES:
        bars = [(i, run[test]) for i, run in enumerate(ratios.values()) if test in run]
        middle = y + len(bars) * BAR / 2 + 4
        parts.append(f'<text x="{LEFT - 8}" y="{middle:.0f}" text-anchor="end">{NAMES[test]}</text>')
        for i, ratio in bars:
            colour, width = COLOURS[i % len(COLOURS)], ratio * UNIT
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{width:.0f}" height="{BAR - 1}" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + width + 4:.0f}" y="{y + 10}" font-size="10">{ratio:.2f}</text>')
            y += BAR
        y += GAP if bars else 0
    line = LEFT + UNIT
    parts.append(f'<path d="M{line} {HEAD - 4}V{y - 8}" stroke="#888" stroke-dasharray="3 3"/>')
    parts.append(f'<text x="{line}" y="{y + 6}" text-anchor="middle">llama.cpp = 1</text>')
    parts.append(f'<text x="{LEFT + 3 * UNIT}" y="{y + 6}" fill="#666">{machine}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {y + 16}" font-family="sans-serif"'
    return f'{head} font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("drawing", type=Path)
    arguments = parser.parse_args()
    arguments.drawing.write_text(draw(*read(arguments.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
