"""The pictures of a report: inline SVG, deterministic, coloured by the page's own variables so that they are legible on
light and dark ground, each with an alternative text."""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import dataclass, field

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from sinkquant.artifacts import Channel, Measure, Plan, Report, SinkMap
from sinkquant.artifacts.fidelity import SpreadCurve

VARIABLES = {"#101010": "--ink", "#606060": "--soft", "#d0d0d0": "--line", "#fefefe": "--card",
             "#2563eb": "--series-0", "#d97706": "--series-1", "#0d9488": "--series-2", "#be185d": "--series-3"}
"""Colour that matplotlib draws with -> variable of the page that replaces it."""
INK, SOFT, LINE, CARD, *SERIES = VARIABLES
ROW_COLOURS = {"unquantized": SERIES[2], "sink_aware": SERIES[0], "control": SERIES[1]}
MARKERS = "os^Dvp*"
STYLE = {"svg.hashsalt": "sinkquant", "svg.fonttype": "path", "font.size": 9, "axes.edgecolor": SOFT,
         "axes.labelcolor": SOFT, "text.color": INK, "xtick.color": SOFT, "ytick.color": SOFT, "axes.titlesize": 9.5,
         "axes.titlecolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
         "legend.fontsize": 8}
WIDTH = 5.2
MAX_LABELLED_BLOCKS = 24
MAX_MARKED_CELLS = 600
MAX_VECTOR_CELLS = 4000
SHOWN_CHANNELS = 4
ROLE_MARKS = {"mixing": "m", "switched": "s", "positional": "p", "information": ""}
DODGE = 7
"""Points between the markers of neighbouring rows."""


@dataclass(frozen=True)
class Plot:
    """A picture and what it says in words."""

    title: str
    svg: str
    alt: str
    table: list[list[str]] = field(default_factory=list)
    """What the picture shows, in cells; the first line names the columns."""


def all_plots(report: Report, sink_map: SinkMap, plan: Plan, after: SinkMap | None) -> dict[str, Plot]:
    """Every picture that these artifacts give, by name."""
    plots = {}
    if points := accuracy_points(report):
        plots["accuracy"] = accuracy_against_bytes(points)
    aware = report.fidelity.comparisons.get("sink_aware") if report.fidelity else None
    if aware is not None and aware.spread:
        plots["spread"] = perturbation_spread(aware.spread)
    return plots | {"sinks": sink_heatmap(sink_map, after), "massive": massive_along_depth(sink_map, after),
                    "bits": bits_per_module(plan)}


Points = dict[str, list[tuple[str, int, Measure]]]
"""Metric in words -> (row, bytes, value) of every row that has it."""


def accuracy_points(report: Report, prefix: str = "") -> Points:
    """What `accuracy_against_bytes` draws of a report: divergence, and byte perplexity where it was measured."""
    points: Points = {}
    for task, metric, words in (("divergence", "kl", "KL divergence, nats per token"),
                                ("sink_perplexity", "byte_perplexity", "byte perplexity")):
        found = [(prefix + row.name, row.weight_bytes, row.tasks[task][metric]) for row in report.rows
                 if metric in row.tasks.get(task, {})]
        if found:
            points[words] = found
    return points


def sink_heatmap(sink_map: SinkMap, after: SinkMap | None) -> Plot:
    """Attention mass on the sinks per layer and head, before and after; no-op heads and roles are marked if there is
    room."""
    with mpl.rc_context(STYLE):
        maps = [("unquantized", sink_map)] + ([("quantized", after)] if after else [])
        layers, heads = len(sink_map.heads), max((len(layer) for layer in sink_map.heads), default=1)
        figure, axes = _figure(len(maps), height=min(6.0, 1.1 + 0.24 * max(layers, 6)))
        for axis, (title, one) in zip(axes, maps, strict=True):
            grid = np.array([[head.sink_score for head in layer] for layer in one.heads])
            mesh = _cells(axis, grid, 0, 1, "cividis")
            for row, layer in enumerate(one.heads if layers * heads <= MAX_MARKED_CELLS else []):
                for column, head in enumerate(layer):
                    if mark := "×" if head.no_op else _role_mark(one, row, column):
                        axis.text(column, row, mark, ha="center", va="center", fontsize="small",
                                  color="white" if head.sink_score < 0.6 else "black")
            axis.set(title=title, xlabel="head", ylabel="layer" if axis is axes[0] else "")
        figure.colorbar(mesh, ax=axes, label="attention on sinks", fraction=0.05, pad=0.02).outline.set_visible(False)
        scores = [head.sink_score for layer in sink_map.heads for head in layer]
        alt = (f"Attention mass on the sinks for {layers} layers of {heads} heads: mean "
               f"{sum(scores) / max(len(scores), 1):.2f}, largest {max(scores, default=0):.2f}")
        if after:
            shifts = [abs(b.sink_score - a.sink_score) for one, two in zip(sink_map.heads, after.heads, strict=True)
                      for a, b in zip(one, two, strict=True)]
            alt += f"; quantization moves no head by more than {max(shifts, default=0):.3f}"
        no_ops = sum(head.no_op for layer in sink_map.heads for head in layer)
        marked = layers * heads <= MAX_MARKED_CELLS
        crosses = " (crosses)" if no_ops and marked else ""
        roles: Counter[str] = Counter(one.role for layer in sink_map.head_roles for one in layer)
        told = [f"{roles[role]} {role}{f' ({mark})' if mark and marked else ''}" for role, mark in ROLE_MARKS.items()
                if roles[role]]
        said = f" Roles: {', '.join(told)}." if told else ""
        return Plot("Attention on sinks, per layer and head", _svg(figure, "sinks"),
                    f"{alt}. {no_ops} no-op heads{crosses}.{said}", _head_table(sink_map, after))


def massive_along_depth(sink_map: SinkMap, after: SinkMap | None) -> Plot:
    """The largest |h| of the massive channels after every sub-block, before (solid) and after (dashed)."""
    title = "Massive activations along depth"
    with mpl.rc_context(STYLE):
        figure, (axis,) = _figure(1, height=3.1)
        if not sink_map.channels:
            axis.text(0.5, 0.5, "no massive activation was found", transform=axis.transAxes, ha="center")
            axis.set_axis_off()
            return Plot(title, _svg(figure, "massive"), "No massive activation was found.")
        again = {channel.channel: channel for channel in (after.channels if after else [])}
        for i, channel in enumerate(sink_map.channels[:SHOWN_CHANNELS]):
            axis.plot(np.maximum(channel.profile, 1e-2), color=SERIES[i], marker=MARKERS[i], markersize=3,
                      label=f"channel {channel.channel}")
            if channel.channel in again:
                axis.plot(np.maximum(again[channel.channel].profile, 1e-2), "--", color=SERIES[i], linewidth=1)
        if again:
            axis.plot([], [], "--", color=SOFT, linewidth=1, label="quantized")
        axis.set(yscale="log", ylabel="largest |h|")
        ticks = range(0, len(sink_map.depth), max(1, -(-len(sink_map.depth) // 10)))
        axis.set_xticks(list(ticks), [sink_map.depth[i].removeprefix("layers.").replace(".", " ") for i in ticks],
                        rotation=35, ha="right")
        figure.legend(loc="outside lower center", ncols=3)
        first = sink_map.channels[0]
        return Plot(title, _svg(figure, "massive"), (
            f"Channel {first.channel} reaches {first.peak:.0f}, {first.ratio:.0f} times the median; it is born in "
            f"{first.born} and {'ends in ' + first.ended if first.ended else 'lasts to the end'}."),
            _massive_table(sink_map, again))


def bits_per_module(plan: Plan) -> Plot:
    """Bits of every linear: blocks across, kinds of linear down, the number in every cell where there is room."""
    with mpl.rc_context(STYLE):
        places = {name: _place(name) for name in plan.modules}
        blocks = sorted({block for block, _ in places.values()})
        kinds = list(dict.fromkeys(kind for _, kind in places.values()))
        grid = np.full((len(kinds), len(blocks)), np.nan)
        for name, (block, kind) in places.items():
            grid[kinds.index(kind), blocks.index(block)] = plan.modules[name].bits
        figure, (axis,) = _figure(1, height=min(9.0, 0.8 + 0.24 * max(len(kinds), 6)))
        _cells(axis, np.log2(grid), 1, 4, "cividis")
        if len(blocks) <= MAX_LABELLED_BLOCKS:
            for (row, column), bits in np.ndenumerate(grid):
                if not np.isnan(bits):
                    axis.text(column, row, f"{int(bits)}", ha="center", va="center", fontsize=8,
                              color="white" if bits < 6 else "black")
            axis.set_xticks(range(len(blocks)), [str(block) for block in blocks])
        axis.set_yticks(range(len(kinds)), kinds)
        axis.set(xlabel="block")
        counts = {bits: sum(d.bits == bits for d in plan.modules.values()) for bits in
                  sorted({d.bits for d in plan.modules.values()})}
        alt = "Linears by bits: " + ", ".join(f"{count} at {bits} bits" for bits, count in counts.items()) + "."
        cells = [["" if np.isnan(bits) else str(int(bits)) for bits in line] for line in grid]
        table = [["linear", *(f"block {block}" for block in blocks)],
                 *([kind, *line] for kind, line in zip(kinds, cells, strict=True))]
        return Plot("Bits per module", _svg(figure, "bits"), alt, table)


def accuracy_against_bytes(points: Points) -> Plot:
    """Every row by its size, bars of 1.96 standard errors (95 %); one panel per metric."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(len(points), height=2.7)
        names = list(dict.fromkeys(name for found in points.values() for name, _, _ in found))
        for axis, (words, found) in zip(axes, points.items(), strict=True):
            for name, size, measure in found:
                index = names.index(name)
                bar = axis.errorbar([size / 1e6], [measure.value], yerr=[1.96 * (measure.stderr or 0)], linestyle="",
                                    color=ROW_COLOURS.get(name, SERIES[index % len(SERIES)]), capsize=3, markersize=5,
                                    marker=MARKERS[index % len(MARKERS)], label=name.replace("_", "-"))
                # Rows of one size stand beside each other, not on top.
                aside = ScaledTranslation(DODGE * (index - (len(names) - 1) / 2) / 72, 0, figure.dpi_scale_trans)
                for artist in bar.get_children():
                    artist.set_transform(artist.get_transform() + aside)
            axis.set(xlabel="checkpoint, MB", title=words)
            axis.margins(x=0.25)
            axis.ticklabel_format(useOffset=False)
        handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(),
                                                                           strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)))
        return Plot("Accuracy against size, 95 % intervals", _svg(figure, "accuracy"),
                    " ".join(f"{words}: {_in_words(found)}." for words, found in points.items()),
                    [["row", "bytes", *points], *_accuracy_lines(points)])


def perturbation_spread(curves: list[SpreadCurve]) -> Plot:
    """How much every position changes when one token is swapped, with and without `<bos>`, before and after."""
    title = "Spread of one swapped token"
    with mpl.rc_context(STYLE):
        figure, (axis,) = _figure(1, height=2.9)
        said, columns = [], []
        for i, curve in enumerate(curves):
            words = f"{'with' if curve.with_bos else 'without'} <bos>"
            places = np.arange(len(curve.before)) - curve.position
            later = places > 0
            for values, style, model in ((curve.before, "-", "unquantized"), (curve.after, "--", "quantized")):
                axis.plot(places[later], np.maximum(np.array(values)[later], 1e-6), style, color=SERIES[i],
                          linewidth=1.2, label=f"{words}, {model}")
                columns.append((f"{words}, {model}", dict(zip(places[later].tolist(), np.array(values)[later].tolist(),
                                                              strict=True))))
            means = [float(np.mean(np.array(values)[later])) for values in (curve.before, curve.after)]
            said.append(f"{words} later tokens change by {means[0]:.3g} of their norm, {means[1]:.3g} when quantized")
        axis.set(yscale="log", xlabel="tokens after the swapped one", ylabel="||Δh|| / ||h||")
        figure.legend(loc="outside lower center", ncols=2)
        places_shown = sorted(set().union(*(values for _, values in columns)))
        table = [["tokens after", *(name for name, _ in columns)],
                 *([str(place), *(f"{values[place]:.3g}" if place in values else "" for _, values in columns)]
                   for place in places_shown)]
        return Plot(title, _svg(figure, "spread"), f"After the last block, {'; '.join(said)}.", table)


def _role_mark(one: SinkMap, layer: int, head: int) -> str:
    return ROLE_MARKS[one.head_roles[layer][head].role] if one.head_roles else ""


def _head_table(sink_map: SinkMap, after: SinkMap | None) -> list[list[str]]:
    heads = max((len(layer) for layer in sink_map.heads), default=0)
    table = [["layer", *(f"head {head}" for head in range(heads))]]
    for index, layer in enumerate(sink_map.heads):
        cells = [f"{head.sink_score:.3f}" for head in layer]
        if after:
            cells = [f"{cell} → {head.sink_score:.3f}" for cell, head in zip(cells, after.heads[index], strict=True)]
        table.append([str(index), *cells])
    return table


def _massive_table(sink_map: SinkMap, again: dict[int, Channel]) -> list[list[str]]:
    shown = sink_map.channels[:SHOWN_CHANNELS]
    profiles = [(f"channel {c.channel}", c.profile) for c in shown]
    profiles += [(f"channel {c.channel}, quantized", again[c.channel].profile) for c in shown if c.channel in again]
    return [["sub-block", *(name for name, _ in profiles)],
            *([place, *(f"{profile[i]:.4g}" if i < len(profile) else "" for _, profile in profiles)]
              for i, place in enumerate(sink_map.depth))]


def _accuracy_lines(points: Points) -> list[list[str]]:
    sizes = {name: size for found in points.values() for name, size, _ in found}
    lines = []
    for name, size in sizes.items():
        measures = [next((m for other, _, m in found if other == name), None) for found in points.values()]
        lines.append([name.replace("_", "-"), f"{size:,}", *(
            "" if m is None else f"{m.value:.4g}" + (f" ± {1.96 * m.stderr:.2g}" if m.stderr else "")
            for m in measures)])
    return lines


def _in_words(found: list[tuple[str, int, Measure]]) -> str:
    return "; ".join(f"{name.replace('_', '-')} {measure.value:.4g} at {size / 1e6:.2f} MB"
                     for name, size, measure in found)


def _place(name: str) -> tuple[int, str]:
    """(block, kind) of a module name: the first number is the block, what follows it the kind."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[i + 1:])
    return 0, name


def _cells(axis: Axes, grid: np.ndarray, low: float, high: float, colours: str) -> mpl.cm.ScalarMappable:
    """A grid of coloured cells, first row on top."""
    mesh = axis.pcolormesh(np.arange(grid.shape[1]), np.arange(grid.shape[0]), grid, vmin=low, vmax=high, cmap=colours,
                           edgecolors=CARD, linewidth=0.8, shading="nearest", rasterized=grid.size > MAX_VECTOR_CELLS)
    axis.invert_yaxis()
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return mesh


def _figure(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = list(np.atleast_1d(figure.subplots(1, count)))
    for axis in axes:
        axis.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as SVG to stand inside HTML: the page's colours and size, ids of its own, nothing from outside."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    text = f'<svg {view.group(0) if view else ""} aria-hidden="true">' + text[text.index(">") + 1:]
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', text))
    text = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)([\w-]+)', rf"\g<1>{prefix}-\g<2>", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text
