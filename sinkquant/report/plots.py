"""The pictures of a report: inline SVG, deterministic, on a transparent ground, each with an alternative text."""

from __future__ import annotations

import io
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sinkquant.artifacts import Plan, Report, SinkMap

INK = "#6b7280"
ACCENT, SECOND = "#2563eb", "#d97706"
STYLE = {"svg.hashsalt": "sinkquant", "svg.fonttype": "path", "font.size": 9, "axes.edgecolor": INK,
         "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 10}


@dataclass(frozen=True)
class Plot:
    """A picture and what it says in words."""

    title: str
    svg: str
    alt: str


def all_plots(report: Report, sink_map: SinkMap, plan: Plan, after: SinkMap | None) -> dict[str, Plot]:
    """Every picture that these artifacts give, by name."""
    plots = {"sinks": sink_heatmap(sink_map, after), "massive": massive_along_depth(sink_map, after),
             "bits": bits_per_module(plan)}
    if any("divergence" in row.tasks for row in report.rows):
        plots["accuracy"] = accuracy_against_bytes([(row.name, row.weight_bytes, row.tasks["divergence"]["kl"].value,
                                                     row.tasks["divergence"]["kl"].stderr)
                                                    for row in report.rows if "divergence" in row.tasks])
    return plots


def sink_heatmap(sink_map: SinkMap, after: SinkMap | None) -> Plot:
    """Attention mass on the sinks per layer and head; a cross marks no-op heads."""
    with mpl.rc_context(STYLE):
        maps = [("unquantized", sink_map)] + ([("quantized", after)] if after else [])
        layers, heads = len(sink_map.heads), max((len(layer) for layer in sink_map.heads), default=1)
        figure, axes = _figure(len(maps), width=min(9, 2.2 + 0.35 * heads * len(maps)),
                               height=min(9, 1.4 + 0.3 * layers))
        for axis, (title, one) in zip(axes, maps, strict=True):
            grid = np.array([[head.sink_score for head in layer] for layer in one.heads])
            image = axis.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
            for row, layer in enumerate(one.heads):
                for column, head in enumerate(layer):
                    if head.no_op:
                        axis.text(column, row, "x", ha="center", va="center", color="white")
            axis.set(title=title, xlabel="head", ylabel="layer")
            figure.colorbar(image, ax=axis, label="attention on sinks")
        scores = [head.sink_score for layer in sink_map.heads for head in layer]
        alt = (f"Attention mass on the sinks for {layers} layers of {heads} heads: mean "
               f"{sum(scores) / max(len(scores), 1):.2f}, largest {max(scores, default=0):.2f}.")
        return Plot("Attention on sinks, per layer and head", _svg(figure), alt)


def massive_along_depth(sink_map: SinkMap, after: SinkMap | None) -> Plot:
    """The largest |h| of the massive channels after every sub-block."""
    with mpl.rc_context(STYLE):
        figure, (axis,) = _figure(1, width=7, height=2.8)
        for one, style in ((sink_map, "-"), (after, "--")):
            for i, channel in enumerate((one.channels if one else [])[:4]):
                suffix = " (quantized)" if style == "--" else ""
                axis.plot(np.maximum(channel.profile, 1e-2), style, marker="os^D"[i], markersize=3,
                          label=f"channel {channel.channel}{suffix}")
        axis.set(yscale="log", ylabel="largest |h|", xlabel="sub-block")
        ticks = range(0, len(sink_map.depth), max(1, len(sink_map.depth) // 12))
        axis.set_xticks(list(ticks), [sink_map.depth[i] for i in ticks], rotation=40, ha="right")
        if not sink_map.channels:
            axis.text(0.5, 0.5, "no massive activation was found", transform=axis.transAxes, ha="center")
            return Plot("Massive activations along depth", _svg(figure), "No massive activation was found.")
        axis.legend(frameon=False, fontsize=8)
        first = sink_map.channels[0]
        alt = (f"Channel {first.channel} reaches {first.peak:.0f}, {first.ratio:.0f} times the median; it is born in "
               f"{first.born} and {'ends in ' + first.ended if first.ended else 'lasts to the end'}.")
        return Plot("Massive activations along depth", _svg(figure), alt)


def bits_per_module(plan: Plan) -> Plot:
    """Bits of every linear: blocks across, kinds of linear down, the number in every cell."""
    with mpl.rc_context(STYLE):
        places = {name: _place(name) for name in plan.modules}
        blocks = sorted({block for block, _ in places.values()})
        kinds = list(dict.fromkeys(kind for _, kind in places.values()))
        grid = np.full((len(kinds), len(blocks)), np.nan)
        for name, (block, kind) in places.items():
            grid[kinds.index(kind), blocks.index(block)] = plan.modules[name].bits
        figure, (axis,) = _figure(1, width=min(12, 2.5 + 0.4 * len(blocks)), height=1.2 + 0.28 * len(kinds))
        axis.imshow(grid, vmin=2, vmax=16, cmap="viridis", aspect="auto")
        if len(blocks) <= 40:
            for (row, column), bits in np.ndenumerate(grid):
                if not np.isnan(bits):
                    axis.text(column, row, f"{int(bits)}", ha="center", va="center", fontsize=7,
                              color="white" if bits < 10 else "black")
        axis.set_yticks(range(len(kinds)), kinds)
        axis.set(xlabel="block")
        counts = {bits: sum(d.bits == bits for d in plan.modules.values()) for bits in
                  sorted({d.bits for d in plan.modules.values()})}
        alt = "Linears by bits: " + ", ".join(f"{count} at {bits} bits" for bits, count in counts.items()) + "."
        return Plot("Bits per module", _svg(figure), alt)


def accuracy_against_bytes(points: list[tuple[str, int, float, float | None]]) -> Plot:
    """KL divergence against size; bars of two standard errors. points: (name, bytes, KL, standard error)."""
    with mpl.rc_context(STYLE):
        figure, (axis,) = _figure(1, width=5.5, height=2.8)
        for i, (name, size, kl, stderr) in enumerate(points):
            axis.errorbar([size / 1e6], [kl], yerr=[2 * (stderr or 0)], marker="os^Dvp*"[i % 7], capsize=3, label=name)
        axis.set(xlabel="checkpoint, MB", ylabel="KL divergence, nats per token")
        axis.legend(frameon=False, fontsize=8)
        alt = "; ".join(f"{name}: {kl:.4g} nats at {size / 1e6:.2f} MB" for name, size, kl, _ in points) + "."
        return Plot("Divergence against size", _svg(figure), alt)


def _place(name: str) -> tuple[int, str]:
    """(block, kind) of a module name: the first number is the block, what follows it the kind."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[i + 1:])
    return 0, name


def _figure(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(width, 3.2 * count), max(height, 1.8)), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = list(np.atleast_1d(figure.subplots(1, count)))
    for axis in axes:
        axis.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg"):]
