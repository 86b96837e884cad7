"""What an importance matrix is worth to llama.cpp's quantizer, and the sinks' weight in it: lines of the race.

    python evals/benchmarks/imatrix_page.py LINES.jsonl [...] [--text wikitext2]

Every line quantizes the same model to the same types; differences are paired by row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measure import RESAMPLES, Line, read
from race import ALIKE

from sinkquant.evaluate import paired_difference

SINK = "imatrix"
HEAD = ("| type | bytes | no matrix | every token alike | the sink weighed | less than alike | 95 % interval |",
        "|---|---:|---:|---:|---:|---:|---|")


def mean_of_kl(line: Line | None) -> str:
    """Nats per token, empty where nothing was measured."""
    return "" if line is None else f"{sum(line.kl) / len(line.kl):.4f}"


def row(kind: str, found: dict[str, Line]) -> str:
    """Markdown of one type. What a quantizer without a matrix writes of some tensors is another type."""
    sizes = dict.fromkeys(f"{line.size:,}" for line in found.values())
    cells = [kind, ", then ".join(sizes), *(mean_of_kl(found.get(name)) for name in ("", ALIKE, SINK)), "", ""]
    if ALIKE in found and SINK in found:
        alike, sink = found[ALIKE], found[SINK]
        ones = [1.0] * len(alike.kl)
        less, low, high = paired_difference("kl", (alike.kl, ones), (sink.kl, ones), RESAMPLES, 0)
        cells[-2:] = [f"{less / (sum(alike.kl) / len(alike.kl)):.1%}", f"{low:.5f} to {high:.5f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--text", help="lines of this text only")
    arguments = parser.parse_args()
    kinds: dict[str, dict[str, Line]] = {}
    for line in read(arguments.files):
        tool, _, name = line.labels["candidate"].partition(" ")
        if tool == "llama.cpp" and arguments.text in (None, line.labels.get("text")):
            kind, _, matrix = name.partition(", ")
            kinds.setdefault(kind, {})[matrix] = line
    print("\n".join([*HEAD, *(row(kind, found) for kind, found in kinds.items())]))


if __name__ == "__main__":
    main()
