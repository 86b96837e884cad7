"""The depth at which tokens settle -> a page with a picture and a table."""

from __future__ import annotations

import matplotlib as mpl

from sinkquant.artifacts.diagnosis import SettlingDepth
from sinkquant.report.drawing import MARKERS, SERIES, STYLE, Plot, drawn, svg
from sinkquant.report.render import environment


def page(found: SettlingDepth, model: str) -> str:
    """One self-contained HTML page."""
    return environment().get_template("depth.html.j2").render(depth=found, model=model, plot=picture(found))


def picture(found: SettlingDepth) -> Plot:
    """The share of tokens of every kind that have settled, along the blocks."""
    numbers = range(1, found.blocks + 1)
    with mpl.rc_context(STYLE):
        figure, (axis,) = drawn(1, 3.0)
        for index, one in enumerate(found.kinds):
            axis.plot(numbers, one.settled, marker=MARKERS[index], markersize=3, linewidth=1.2,
                      color=SERIES[index % len(SERIES)], label=f"{one.kind} ({one.tokens})")
        axis.set(xlabel="blocks", ylabel=f"share within {found.bound:g} nats", ylim=(-0.02, 1.02))
        axis.legend()
        said = "; ".join(f"{one.kind} settle after {one.depth.value:.1f} of {found.blocks} blocks on average "
                         f"({one.depth.low:.1f} to {one.depth.high:.1f} on halves of the tokens)"
                         for one in found.kinds)
        table = [["blocks", *(str(one.kind) for one in found.kinds)],
                 *([str(number), *(f"{one.settled[number - 1]:.0%}" for one in found.kinds)] for number in numbers)]
        sentence = f"{said[:1].upper()}{said[1:]}."
        return Plot("Depth at which tokens settle", svg(figure, "depth"), sentence, sentence, table)
