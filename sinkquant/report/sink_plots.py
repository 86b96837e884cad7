"""The sinks of a model as a picture: heads by layer, and the massive channels through depth, before and after."""

from __future__ import annotations

from collections import Counter

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from sinkquant.artifacts import Channel, SinkMap
from sinkquant.report.drawing import MARKERS, SERIES, SOFT, STYLE, Plot, cells, drawn, svg

MAX_MARKED_CELLS = 600
SHOWN_CHANNELS = 4
ROLE_MARKS = {"mixing": "m", "switched": "s", "positional": "p", "information": ""}
LEAST_CHANGE = 0.05
"""Attention of 1 to which the colours of a change reach at least: less is no change worth a colour."""
LEAST_SHARE = 0.1
"""Of a channel's peak: where it is smaller it is not massive yet, and its change says nothing."""
CHANGES = LinearSegmentedColormap.from_list("change", ["#c2570c", "#9aa3ad", "#1d4ed8"])
"""Grey in the middle, so that no change is quiet on light and dark ground."""


def heights(layers: int) -> float:
    """Inches; the same for both pictures, so that a layer is as high in one as in the other."""
    return min(5.4, 1.5 + 0.15 * max(layers, 6))


def sink_heatmap(sink_map: SinkMap, after: SinkMap | None, said: str = "") -> Plot:
    """Attention mass on the sinks per layer and head, before, after, and the difference; no-op heads and roles are
    marked if there is room. said: what the caption says of it."""
    layers, heads = len(sink_map.heads), max((len(layer) for layer in sink_map.heads), default=1)
    maps = {"unquantized": sink_map} | ({"quantized": after} if after else {})
    grids = {title: _scores(one, heads) for title, one in maps.items()}
    marked = layers * heads <= MAX_MARKED_CELLS
    with mpl.rc_context(STYLE):
        figure, axes = drawn(len(grids) + bool(after), heights(layers), one_y=True)
        for axis, (title, one) in zip(axes, maps.items(), strict=False):
            mesh = cells(axis, grids[title], 0, 1, "cividis")
            axis.set_title(title)
            for row, layer in enumerate(one.heads if marked else []):
                for column, head in enumerate(layer):
                    if mark := "×" if head.no_op else _role_mark(one, row, column):
                        axis.text(column, row, mark, ha="center", va="center", fontsize="small",
                                  color="white" if head.sink_score < 0.6 else "black")
        figure.colorbar(mesh, ax=axes[:len(grids)], label="attention on sinks", location="bottom", fraction=0.05,
                        pad=0.02, ticks=[0, 0.5, 1]).outline.set_visible(False)
        scores = [head.sink_score for layer in sink_map.heads for head in layer]
        alt = (f"Attention mass on the sinks for {layers} layers of {heads} heads: mean "
               f"{sum(scores) / max(len(scores), 1):.2f}, largest {max(scores, default=0):.2f}")
        if after:
            change = grids["quantized"] - grids["unquantized"]
            most = float(np.nanmax(np.abs(change))) if change.size else 0.0
            mesh = cells(axes[-1], change, -max(most, LEAST_CHANGE), max(most, LEAST_CHANGE), CHANGES)
            axes[-1].set_title("change")
            figure.colorbar(mesh, ax=axes[-1:], label="change", location="bottom", fraction=0.05, pad=0.02,
                            ticks=MaxNLocator(nbins=2, symmetric=True)).outline.set_visible(False)
            alt += f"; quantization moves no head by more than {most:.3f}"
        axes[0].yaxis.set_inverted(True)  # shared: every panel turned it over
        axes[0].set_ylabel("layer")
        for axis in axes:
            axis.set_xlabel("head")
    no_ops = sum(head.no_op for layer in sink_map.heads for head in layer)
    crosses = " (crosses)" if no_ops and marked else ""
    roles: Counter[str] = Counter(one.role for layer in sink_map.head_roles for one in layer)
    told = [f"{roles[role]} {role}{f' ({mark})' if mark and marked else ''}" for role, mark in ROLE_MARKS.items()
            if roles[role]]
    roles_said = f" Roles: {', '.join(told)}." if told else ""
    legend = ["Crosses: heads that do nothing."] if crosses else []
    legend += [f"Letters, the heads' roles: {', '.join(f'{mark} {role}' for role, mark in ROLE_MARKS.items() if mark)}."
               ] if told and marked else []
    return Plot("Attention on the sinks, by layer and head", svg(figure, "sinks"),
                f"{alt}. {no_ops} no-op heads{crosses}.{roles_said}",
                " ".join([*([said] if said else []), *legend]), _head_table(sink_map, after))


def massive_along_depth(sink_map: SinkMap, after: SinkMap | None) -> Plot:
    """The largest |h| of the massive channels after every sub-block, and what quantization made of it."""
    title = "Massive activations through depth"
    places = [_depth(place) for place in sink_map.depth]
    shown = sink_map.channels[:SHOWN_CHANNELS]
    again = {channel.channel: channel for channel in (after.channels if after else [])}
    with mpl.rc_context(STYLE):
        if not sink_map.channels:
            figure, (axis,) = drawn(1, 1.2)
            axis.text(0.5, 0.5, "no massive activation was found", transform=axis.transAxes, ha="center")
            axis.set_axis_off()
            none = "No massive activation was found."
            return Plot(title, svg(figure, "massive"), none, none)
        figure, axes = drawn(2 if again else 1, heights(len(sink_map.heads)), one_y=True)
        for i, channel in enumerate(shown):
            axes[0].plot(np.maximum(channel.profile, 1e-2), places, color=SERIES[i], marker=MARKERS[i], markersize=2.5,
                         linewidth=1.2, label=f"channel {channel.channel}")
            if channel.channel in again:
                before, behind = np.array(channel.profile), np.array(again[channel.channel].profile)
                before[before < LEAST_SHARE * channel.peak] = np.nan
                axes[1].plot(100 * (behind / before - 1), places, color=SERIES[i], marker=MARKERS[i], markersize=2.5,
                             linewidth=1.2)
        axes[0].set(xscale="log", xlabel="largest |h|", ylabel="layer", title="unquantized")
        axes[0].yaxis.set_inverted(True)
        axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))
        if again:
            axes[1].axvline(0, color=SOFT, linewidth=1)
            axes[1].set(xlabel="% of |h|", title="change")
            axes[1].xaxis.set_major_locator(MaxNLocator(nbins=4, symmetric=True))
        figure.legend(loc="outside lower center", ncols=2)
    first = shown[0]
    gone = [f"channel {one.channel} is massive no more" for one in shown if after and one.channel not in again]
    return Plot(title, svg(figure, "massive"), (
        f"Channel {first.channel} reaches {first.peak:.0f}, {first.ratio:.0f} times the median; it is born in "
        f"{first.born} and {'ends in ' + first.ended if first.ended else 'lasts to the end'}."
        + "".join(f" Quantized, {one}." for one in gone)),
        "After the attention and after the MLP of every layer, downwards."
        + "".join(f" Quantized, {one}." for one in gone), _massive_table(sink_map, again))


def _role_mark(one: SinkMap, layer: int, head: int) -> str:
    return ROLE_MARKS[one.head_roles[layer][head].role] if one.head_roles else ""


def _scores(sink_map: SinkMap, heads: int) -> np.ndarray:
    """[layers, heads]; not a number where a layer has fewer heads than others."""
    grid = np.full((len(sink_map.heads), heads), np.nan)
    for row, layer in enumerate(sink_map.heads):
        grid[row, :len(layer)] = [head.sink_score for head in layer]
    return grid


def _depth(place: str) -> float:
    """Where a sub-block stands: the attention of layer 3 at 3, what follows it at 3.5, the embedding before all."""
    number = next((int(part) for part in place.split(".") if part.isdigit()), None)
    return -0.5 if number is None else number + (0 if place.endswith("attention") else 0.5)


def _head_table(sink_map: SinkMap, after: SinkMap | None) -> list[list[str]]:
    heads = max((len(layer) for layer in sink_map.heads), default=0)
    table = [["layer", *(f"head {head}" for head in range(heads))]]
    for index, layer in enumerate(sink_map.heads):
        scores = [f"{head.sink_score:.3f}" for head in layer]
        if after:
            scores = [f"{one} → {head.sink_score:.3f}" for one, head in zip(scores, after.heads[index], strict=True)]
        table.append([str(index), *scores, *[""] * (heads - len(scores))])
    return table


def _massive_table(sink_map: SinkMap, again: dict[int, Channel]) -> list[list[str]]:
    shown = sink_map.channels[:SHOWN_CHANNELS]
    profiles = [(f"channel {c.channel}", c.profile) for c in shown]
    profiles += [(f"channel {c.channel}, quantized", again[c.channel].profile) for c in shown if c.channel in again]
    return [["sub-block", *(name for name, _ in profiles)],
            *([place, *(f"{profile[i]:.4g}" if i < len(profile) else "" for _, profile in profiles)]
              for i, place in enumerate(sink_map.depth))]
