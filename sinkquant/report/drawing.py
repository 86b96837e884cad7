"""What all pictures share: inline SVG, deterministic, coloured by the page's own variables so that it is legible on
light and dark ground, with an alternative text."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

VARIABLES = {"#101010": "--ink", "#606060": "--soft", "#d0d0d0": "--line", "#fefefe": "--card",
             "#2563eb": "--series-0", "#d97706": "--series-1", "#0d9488": "--series-2", "#be185d": "--series-3"}
"""Colour that matplotlib draws with -> variable of the page that replaces it."""
INK, SOFT, LINE, CARD, *SERIES = VARIABLES
MARKERS = "os^Dvp*"
STYLE = {"svg.hashsalt": "sinkquant", "svg.fonttype": "path", "font.size": 9, "axes.edgecolor": SOFT,
         "axes.labelcolor": SOFT, "text.color": INK, "xtick.color": SOFT, "ytick.color": SOFT, "axes.titlesize": 9.5,
         "axes.titlecolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
         "legend.fontsize": 8}
WIDTH = 4.6
"""Inches: on a phone the picture is a little smaller than drawn, on a desktop a little larger."""
MAX_VECTOR_CELLS = 4000


@dataclass(frozen=True)
class Plot:
    """A picture, and what it says in words."""

    title: str
    svg: str
    alt: str
    """What the picture shows, with its figures, for those who cannot see it."""
    caption: str = ""
    """How to read it, for those who can."""
    table: list[list[str]] = field(default_factory=list)
    """What the picture shows, in cells; the first line names the columns."""


def drawn(count: int, height: float, one_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels side by side, height in inches; `one_y`: they share the vertical axis."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = list(np.atleast_1d(figure.subplots(1, count, sharey=one_y)))
    for axis in axes:
        axis.patch.set_alpha(0)
    return figure, axes


def logarithmic(axis: Axes, which: Literal["x", "y"] = "y") -> None:
    """A logarithmic axis whose ticks are numbers as people write them, 0.01 and 3, and few enough to be read."""
    axis.set(**{f"{which}scale": "log"})

    def words(value: float, _: object) -> str:
        low, high = axis.get_xlim() if which == "x" else axis.get_ylim()
        digit = round(value / 10 ** np.floor(np.log10(value)))
        shown = (1,) if high > 100 * low else (1, 2, 5) if high > 10 * low else range(10)
        return f"{value:g}" if digit in shown else ""

    one = axis.xaxis if which == "x" else axis.yaxis
    one.set_major_formatter(FuncFormatter(words))
    one.set_minor_formatter(FuncFormatter(words))


def cells(axis: Axes, grid: np.ndarray, low: float, high: float, colours: str | Colormap) -> mpl.cm.ScalarMappable:
    """A grid of coloured cells, first row on top."""
    rows, columns = (np.arange(count + 1) - 0.5 for count in grid.shape)
    mesh = axis.pcolormesh(columns, rows, grid, vmin=low, vmax=high, cmap=colours, edgecolors=CARD, linewidth=0.8,
                           rasterized=grid.size > MAX_VECTOR_CELLS)
    axis.invert_yaxis()
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return mesh


def svg(figure: Figure, prefix: str) -> str:
    """The figure as SVG to stand inside HTML: the page's colours and size, ids of its own, nothing from outside."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    text = f'<svg {view.group(0) if view else ""} aria-hidden="true">' + text[text.index(">") + 1:]
    # matplotlib's ids depend on digits of the layout that are not written; numbers in their order do not.
    names = dict.fromkeys(re.findall(r'(?:href="#|url\(#)([\w-]+)', text))
    used = {name: f"{prefix}-{i}" for i, name in enumerate(names)}
    text = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{used[m[1]]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)([\w-]+)', lambda m: m[1] + used[m[2]], text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text
