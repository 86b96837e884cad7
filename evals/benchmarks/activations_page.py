"""What the sink costs under rounded inputs: the table and the picture of lines that `activations.py` kept.

    python evals/benchmarks/activations_page.py LINES.jsonl [...] [--text wikitext2] [--plot fp4.svg]

Every kind of inputs stands beside the same with the sink exact; "none" is what the weights lose alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from measure import RESAMPLES, Line, bounds, read, shown
from race_page import COLOURS, kl

from sinkquant.evaluate import paired_difference
from sinkquant.report.drawing import SERIES, SOFT, STYLE, drawn, logarithmic, svg

EXACT = {"all": "exact", "token": "token-exact", "block": "block-exact"}
"""Scales -> the same with the sink exact."""
WORDS = {"int8": "int8", "fp8": "FP8", "nvfp4": "NVFP4", "mxfp4": "MXFP4"}
SCALES = {"all": ", stored", "token": ", per token", "block": ""}
WEIGHTS = {"16": "weights left alone", "4": "weights of 4 bits"}

Pairs = dict[tuple[str, str, str], tuple[Line, Line]]


def pairs(lines: Sequence[Line]) -> Pairs:
    """(weights, inputs, scales) -> as it is, and with the sink exact."""
    known = {(line.labels["weights"], line.labels["inputs"], line.labels["scales"]): line for line in lines
             if "transform" not in line.labels}
    return {(bits, inputs, scale): (line, known[bits, inputs, EXACT[scale]]) for (bits, inputs, scale), line in
            known.items() if scale in EXACT and (bits, inputs, EXACT[scale]) in known}


def alone(lines: Sequence[Line]) -> dict[tuple[str, str], Line]:
    """(weights, inputs that they would take) -> the weights with inputs of 16 bits."""
    return {(line.labels["weights"], line.labels["inputs"]): line for line in lines if line.labels["scales"] == "none"
            and "transform" not in line.labels}


def table(lines: Sequence[Line]) -> str:
    """Markdown."""
    rows = [["weights", "inputs", "inputs of 16 bits", "as they are", "with the sink exact", "what the sink costs",
             "share"], ["---", "---", "---:", "---:", "---:", "---", "---:"]]
    weights, tasks = alone(lines), list(dict.fromkeys(task for line in lines for task in line.scores or ()))
    rows[0] += tasks
    rows[1] += ["---"] * len(tasks)
    for (bits, inputs, scale), (line, exact) in pairs(lines).items():
        ones = [1.0] * len(line.kl)
        cost, low, high = paired_difference("kl", (line.kl, ones), (exact.kl, ones), RESAMPLES, 0)
        base = weights.get((bits, inputs))
        rows.append([bits, WORDS[inputs] + SCALES[scale], "" if base is None else f"{kl(base):.3g}", _interval(line),
                     _interval(exact), f"{cost:.3g}, {low:.3g} to {high:.3g}", f"{cost / kl(line):.0%}",
                     *(_task(line, exact, task) for task in tasks)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _interval(line: Line) -> str:
    ones, zeros = [1.0] * len(line.kl), [0.0] * len(line.kl)
    mean, low, high = paired_difference("kl", (line.kl, ones), (zeros, ones), RESAMPLES, 0)
    return f"{mean:.3g} ({low:.3g} to {high:.3g})"


def _task(line: Line, exact: Line, task: str) -> str:
    """As it is, with the sink exact, and the interval of the difference, paired by document: percent, or nats."""
    mine, other = ((one.scores or {}).get(task) for one in (line, exact))
    if not mine or not other:
        return ""
    mine, other = shown(task, mine), shown(task, other)
    means = (sum(one) / len(one) for one in (mine, other))
    return "{:.3g}, {:.3g} ({:+.2g} to {:+.2g})".format(*means, *bounds(mine, other))


def picture(lines: Sequence[Line]) -> str:
    """A line from what is lost to what would be with the sink exact, for every kind of inputs: SVG."""
    found, weights = pairs(lines), alone(lines)
    panels = [bits for bits in WEIGHTS if any(key[0] == bits for key in found)]
    with mpl.rc_context(STYLE):
        figure, axes = drawn(len(panels), 2.6)
        figure.set_size_inches(4 * len(panels), 2.6)
        for axis, bits in zip(axes, panels, strict=True):
            kinds = [key for key in found if key[0] == bits]
            for place, key in enumerate(kinds):
                lost, exact = (kl(line) for line in found[key])
                axis.plot([exact, lost], [place, place], color=SOFT, linewidth=1)
                axis.plot([lost], [place], "o", color=SERIES[0], markersize=5, label="as it is" if not place else None)
                axis.plot([exact], [place], "o", color=SERIES[1], markersize=4, fillstyle="none",
                          label="the sink exact" if not place else None)
                if (base := weights.get(key[:2])) is not None:
                    axis.plot([kl(base)], [place], "|", color=SOFT, markersize=9,
                              label="inputs of 16 bits" if not place else None)
            axis.set_yticks(range(len(kinds)), [WORDS[inputs] + SCALES[scale] for _, inputs, scale in kinds])
            axis.invert_yaxis()
            axis.set(title=WEIGHTS[bits], xlabel="KL divergence, nats per token")
            logarithmic(axis, "x")
        figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        text = svg(figure, "fp4")
    for variable, colour in COLOURS.items():
        text = text.replace(f"var({variable})", colour)
    return text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ',
                        1)


def main() -> None:
    """Print the table as Markdown, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--text")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    lines = [line for line in read(arguments.files) if arguments.text in (None, line.labels.get("text"))]
    print(table(lines))
    if arguments.plot:
        arguments.plot.write_text(picture(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
