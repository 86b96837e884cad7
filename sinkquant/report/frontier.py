"""Frontier -> a page with a picture and a table."""

from __future__ import annotations

import matplotlib as mpl

from sinkquant.artifacts.frontier import Frontier
from sinkquant.report.drawing import MARKERS, SERIES, STYLE, Plot, drawn, logarithmic, svg
from sinkquant.report.render import environment

WORDS = {"solved": "solved", "uniform": "uniform", "control": "control of the recipe's plan",
         "asked": "the recipe's plan"}
COLUMNS = ["plan", "bits per weight", "bytes", "predicted KL, nats per token", "through sinks"]


def page(found: Frontier) -> str:
    """One self-contained HTML page."""
    return environment().get_template("frontier.html.j2").render(frontier=found, plot=picture(found), rows=rows(found),
                                                                  columns=COLUMNS)


def picture(found: Frontier) -> Plot:
    """Predicted loss against bytes, on a logarithmic axis where all losses are above zero."""
    with mpl.rc_context(STYLE):
        figure, (axis,) = drawn(1, 3.2)
        said = []
        for i, (kind, words) in enumerate(WORDS.items()):
            points = sorted((p.bytes / 1e6, p.kl) for p in found.points if p.kind == kind)
            if not points:
                continue
            line = "-" if kind in ("solved", "uniform") else "none"
            axis.plot(*zip(*points, strict=True), linestyle=line, marker=MARKERS[i], markersize=4, linewidth=1.2,
                      color=SERIES[i % len(SERIES)], label=words)
            said.append(f"{words} from {points[0][1]:.3g} nats at {points[0][0]:.2f} MB to {points[-1][1]:.3g} at "
                        f"{points[-1][0]:.2f} MB" if len(points) > 1 else
                        f"{words} {points[0][1]:.3g} nats at {points[0][0]:.2f} MB")
        if all(p.kl > 0 for p in found.points):
            logarithmic(axis)
        axis.set(xlabel="MB of weights" + (" and KV cache" if found.kv_bytes else ""),
                 ylabel="predicted KL, nats per token")
        axis.legend()
        return Plot("Predicted loss against bytes", svg(figure, "frontier"), f"{'; '.join(said)}.")


def rows(found: Frontier) -> list[list[str]]:
    """One line of cells per plan, in the order of `COLUMNS`."""
    return [[p.name, f"{p.bits_per_weight:.3f}", f"{p.bytes:,}", f"{p.kl:.4g}", f"{p.kl_sinks:.2g}"]
            for p in found.points]
