"""The race's table, its picture, and who wins at equal bytes.

    python evals/benchmarks/race_page.py LINES.jsonl [...] [--text wikitext2] [--by size] [--plot race.svg]
                                         [--frontier frontier.json] [--beside CANDIDATE]

Equal bytes: of all candidates that take at most 1 % more, the one with the least divergence. `--by blocks` counts the
blocks alone, so that who leaves the token embedding in 16 bits does not pay for it. `--frontier`, of `quantize-model
plan --frontier -o`, is drawn as a line: what solved budgets are predicted to lose on their calibration text. Tasks of
the lines stand as means; with `--beside` the 95 % interval of the difference from that candidate follows, paired by
document.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from measure import RESAMPLES, Line, read, task_cell

from sinkquant.artifacts import Frontier
from sinkquant.evaluate import paired_difference
from sinkquant.report.drawing import INK, LINE, MARKERS, SERIES, SOFT, STYLE, drawn, svg

OURS = "sinkquant"
SLACK = 1.01
COLOURS = {"--ink": INK, "--soft": SOFT, "--line": LINE, "--card": "#ffffff",
           **{f"--series-{i}": colour for i, colour in enumerate(SERIES)}}


def kl(line: Line) -> float:
    """Nats per token, the mean of its rows."""
    return sum(line.kl) / len(line.kl)


def tool(line: Line) -> str:
    """Whose it is."""
    return re.split(r"[ ,]", line.labels["candidate"])[0]


def size(line: Line, by: str) -> int:
    """Bytes of the whole, or of the blocks."""
    found: int = getattr(line, by)
    return found


def raced(lines: Sequence[Line], beside: str | None = None) -> str:
    """Markdown: every candidate, the interval of its divergence by bootstrap over rows, and its tasks."""
    tasks = list(dict.fromkeys(task for line in lines for task in line.scores or ()))
    other = next((line for line in lines if line.labels["candidate"] == beside), None)
    rows = [["candidate", "bits", "MB", "of the blocks", "KL, nats", "95 % interval", "perplexity", "CPU s", "peak MB",
             *tasks], ["---", *["---:"] * 4, "---", *["---:"] * 3, *["---"] * len(tasks)]]
    for line in lines:
        others = (other.scores if other and line is not other else None) or {}
        ones, zeros = [1.0] * len(line.kl), [0.0] * len(line.kl)
        mean, low, high = paired_difference("kl", (line.kl, ones), (zeros, ones), RESAMPLES, 0)
        perplexity = math.exp(sum(line.loss) / len(line.loss))
        rows.append([line.labels["candidate"], line.labels["bits"], f"{size(line, 'size') / 1e6:.1f}",
                     f"{size(line, 'blocks') / 1e6:.1f}", f"{mean:.4f}", f"{low:.4f} to {high:.4f}",
                     f"{perplexity:.2f}",
                     *("" if value is None else f"{value:,.0f}" for value in (line.seconds, line.memory)),
                     *(task_cell(task, (line.scores or {}).get(task), others.get(task)) for task in tasks)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def beaten(lines: Sequence[Line], by: str) -> str:
    """Markdown: the best of ours at the bytes of every peer's best line, and the ratio of their divergences."""
    ours = [line for line in lines if tool(line) == OURS and "control" not in line.labels["candidate"]]
    peers = sorted((line for line in lines if tool(line) != OURS and kl(line) > 0), key=lambda line: size(line, by))
    rows = [["peer", "MB", "KL", "ours, of at most 1 % more bytes", "MB", "KL", "ratio"],
            ["---", "---:", "---:", "---", "---:", "---:", "---:"]]
    least = float("inf")
    for peer in peers:
        if kl(peer) >= least:  # a smaller peer loses less
            continue
        least = kl(peer)
        fits = [line for line in ours if size(line, by) <= SLACK * size(peer, by)]
        best = min(fits, key=kl, default=None)
        ratio = "" if best is None else f"{kl(best) / kl(peer):.2f}"
        rows.append([*_cells(peer, by), *(["none", "", ""] if best is None else _cells(best, by)), ratio])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(line: Line, by: str) -> list[str]:
    return [f"{line.labels['candidate']}, {line.labels['bits']} bits", f"{size(line, by) / 1e6:.1f}", f"{kl(line):.4f}"]


def picture(lines: Sequence[Line], by: str, frontier: Frontier | None = None) -> str:
    """Divergence against bytes, every quantized candidate a point, what was predicted a line: SVG."""
    lines = [line for line in lines if kl(line) > 0]
    with mpl.rc_context(STYLE):
        figure, (axis,) = drawn(1, 4.2)
        for i, name in enumerate(sorted({tool(line) for line in lines}, key=lambda name: (name != OURS, name))):
            _points(axis, [line for line in lines if tool(line) == name], by, name, i)
        if frontier is not None:
            least, most = (found(size(line, "size") for line in lines) for found in (min, max))
            solved = [point for point in frontier.points if point.kind == "solved" and least <= point.bytes <= most]
            axis.plot([point.bytes / 1e6 for point in solved], [point.kl for point in solved], linestyle="--",
                      linewidth=1, color=SOFT, label="solved budgets, predicted on calibration text")
        axis.set(yscale="log", ylabel="KL divergence, nats per token",
                 xlabel="MB of the blocks" if by == "blocks" else "MB of the whole checkpoint")
        axis.legend()
        text = svg(figure, "race")
    for variable, colour in COLOURS.items():
        text = text.replace(f"var({variable})", colour)
    return text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ',
                        1)


def _points(axis: Axes, lines: Sequence[Line], by: str, name: str, place: int) -> None:
    axis.plot([size(line, by) / 1e6 for line in lines], [kl(line) for line in lines], linestyle="none",
              marker=MARKERS[place % len(MARKERS)], markersize=6 if name == OURS else 4, label=name,
              color=SERIES[place % len(SERIES)], fillstyle="full" if place < len(SERIES) else "none")


def main() -> None:
    """Print the tables as Markdown, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--text", help="lines of this text only")
    parser.add_argument("--by", choices=["size", "blocks"], default="size")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--beside", help="a candidate whose tasks the others are compared with")
    parser.add_argument("--frontier", type=Path, help="drawn as a line; with --by size")
    arguments = parser.parse_args()
    lines = [line for line in read(arguments.files) if arguments.text in (None, line.labels.get("text"))]
    lines.sort(key=lambda line: size(line, arguments.by))
    print(raced(lines, arguments.beside))
    print("\n" + beaten(lines, arguments.by))
    if arguments.plot:
        solved = Frontier.load(arguments.frontier) if arguments.frontier else None
        arguments.plot.write_text(picture(lines, arguments.by, solved), encoding="utf-8")


if __name__ == "__main__":
    main()
