"""The pictures of a run's report, from its artifacts."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.patches import Patch

from sinkquant.artifacts import Paired, Plan, Report, Row, SinkMap
from sinkquant.artifacts.fidelity import SpreadCurve
from sinkquant.artifacts.report import PositionLoss
from sinkquant.report.dots import Dot, Dots
from sinkquant.report.drawing import MARKERS, SERIES, SOFT, STYLE, Plot, cells, drawn, logarithmic, svg
from sinkquant.report.sink_plots import massive_along_depth, sink_heatmap

ORDER = ("unquantized", "sink_aware", "control", "pruned", "pruned_control", "weights", "weights_control", "cache",
         "cache_control")
"""Every row beside its control."""
MECHANISMS = {"sink_aware": "everything", "pruned": "pruning alone", "weights": "weights alone",
              "cache": "KV cache alone"}
MAX_LABELLED_BLOCKS = 24
MAX_LABELLED_KINDS = 4
"""Kinds of linear that share a line of the strip are named up to so many."""
KL = "KL divergence, nats per token"


def all_plots(report: Report, sink_map: SinkMap, plan: Plan, after: SinkMap | None) -> dict[str, Plot | Dots]:
    """Every picture that these artifacts give, by name."""
    plots: dict[str, Plot | Dots] = {}
    if any(kl_of(row) for row in report.rows):
        plots["accuracy"] = divergences(accuracy_dots(report.rows))
    if worth := differences(report.paired):
        plots["worth"] = worth
    lines = {row_name(row.name): row.kl_by_position for row in report.rows if row.kl_by_position}
    if main := {name: found for name, found in lines.items() if name in ("sink-aware", "control")} or lines:
        plots["positions"] = by_position(main)
    aware = report.fidelity.comparisons.get("sink_aware") if report.fidelity else None
    plots["sinks"] = sink_heatmap(sink_map, after, aware.sentence if aware else "")
    plots["bits"] = bits_per_module(plan)  # a flat picture between two tall ones: columns come out of equal length
    plots["massive"] = massive_along_depth(sink_map, after)
    if aware is not None and aware.spread:
        plots["spread"] = perturbation_spread(aware.spread)
    return plots


def row_name(name: str) -> str:
    """As it is shown."""
    return name.replace("_", "-")


def kl_of(row: Row) -> tuple[float, float] | None:
    """(mean, half of its 95 % interval), in nats per token; null where it was not measured."""
    measure = row.tasks.get("divergence", {}).get("kl")
    return None if measure is None else (measure.value, 1.96 * (measure.stderr or 0))


def megabytes(count: float) -> str:
    """Bytes in MB, to three digits."""
    return f"{count / 1e6:,.0f} MB" if count >= 99.5e6 else f"{count / 1e6:.3g} MB"


def accuracy_dots(rows: Sequence[Row], prefix: str = "") -> list[Dot]:
    """A line per row: what weights and cache weigh, and how far it is from the unquantized model."""
    packed = next((row for row in rows if row.kv_bytes is not None and row.kv_bits), None)
    whole = None if packed is None or packed.kv_bytes is None else packed.kv_bytes * 16 / packed.kv_bits
    found = []
    for row in sorted(rows, key=lambda row: ORDER.index(row.name) if row.name in ORDER else len(ORDER)):
        cache = whole if row.kv_bytes is None else row.kv_bytes
        cached = "16-bit" if cache is None else megabytes(cache)
        kl = kl_of(row)
        value, half = kl or (0.0, 0.0)
        text = f"{value:#.3g}".rstrip(".") + (f" ± {half:.2g}" if half else "")
        kind = "ours" if row.name == "sink_aware" else "control" if "control" in row.name else ""
        weighs = [megabytes(row.weight_bytes), f"{row.bits_per_weight:.2f}", cached]
        found.append(Dot(prefix + row_name(row.name), weighs, None if kl is None else value, value - half, value + half,
                         "the reference" if row.name == "unquantized" else text if kl else "", kind,
                         hollow=row.name not in ("sink_aware", "control")))
    return found


def divergences(dots: list[Dot]) -> Dots:
    """Every model on one axis of KL, with what it weighs."""
    return Dots("How far from the unquantized model", ["weights", "bits", "KV cache"], KL, dots,
                "Further left is better. Bars are 95 % intervals over the rows of text; the control of a line is the "
                "same without knowledge of the sinks. Bits: per weight of the blocks, scales counted; KV cache: of one "
                "row.")


def differences(paired: Sequence[Paired]) -> Dots | None:
    """The control's divergence minus the sink-aware one's, for everything and for each mechanism alone."""
    dots = [Dot(MECHANISMS[pair.b], [], pair.difference, pair.low, pair.high,
                f"{pair.difference:.2g} ({pair.low:.2g} to {pair.high:.2g})", "ours" if pair.b == "sink_aware" else "",
                hollow=pair.b != "sink_aware")
            for pair in paired if pair.metric == "kl" and pair.b in MECHANISMS and "control" in pair.a]
    if not dots:
        return None
    return Dots("What knowing the sinks is worth", [], "nats per token", dots,
                "KL of the control minus KL with protection: right of zero, protection pays. Paired over the same rows "
                "of text, 95 % intervals.", mark=(0.0, ""), linear=True, ticks=3, lines="mechanism")


def by_position(lines: dict[str, list[PositionLoss]]) -> Plot:
    """KL by position in the row, a line per model."""
    with mpl.rc_context(STYLE):
        figure, (axis,) = drawn(1, 2.5)
        for i, (name, found) in enumerate(lines.items()):
            axis.plot([place(one) for one in found], [max(one.kl, 1e-12) for one in found], linewidth=1.2, markersize=4,
                      marker=MARKERS[i % len(MARKERS)], color=SERIES[i % len(SERIES)],
                      linestyle="-" if i < len(SERIES) else "--", label=label(name))
        logarithmic(axis)
        axis.set(xlabel="position in the row", ylabel="KL, nats per token")
        axis.tick_params(axis="x", labelsize=8)
        figure.legend(loc="outside lower center", ncols=2)
    first = next(iter(lines.values()))
    table = [["model", *(place(one) for one in first)],
             *([name, *(f"{one.kl:.3g}" for one in found)] for name, found in lines.items())]
    return Plot("Divergence by position", svg(figure, "positions"),
                " ".join(f"{name}: " + ", ".join(f"{one.kl:.2g} at {place(one)}" for one in found) + "."
                         for name, found in lines.items()),
                "The first token stands by itself: nothing comes before it.", table)


def label(name: str) -> str:
    """A name in a legend as it is: matplotlib leaves out those that begin with "_", and reads "$" as mathematics."""
    shown = name.replace("$", r"\$")
    return "\u200b" + shown if shown.startswith("_") else shown


def place(one: PositionLoss) -> str:
    """A bin of positions in words."""
    return str(one.first) if one.first == one.last else f"{one.first}-{one.last}"


def bits_per_module(plan: Plan) -> Plot:
    """Bits of every linear as a strip: blocks across, a line for all kinds of linear that have the same bits."""
    places = {name: _place(name) for name in plan.modules}
    blocks = sorted({block for block, _ in places.values()})
    kinds: dict[str, list[float]] = {kind: [np.nan] * len(blocks) for _, kind in places.values()}
    for name, (block, kind) in places.items():
        kinds[kind][blocks.index(block)] = plan.modules[name].bits
    strips: dict[tuple[str, ...], list[str]] = {}
    for kind, line in kinds.items():
        strips.setdefault(tuple("" if np.isnan(bits) else str(int(bits)) for bits in line), []).append(kind)
    counts = {bits: sum(d.bits == bits for d in plan.modules.values())
              for bits in sorted({d.bits for d in plan.modules.values()})}
    names = [_kinds(one, len(kinds)) for one in strips.values()]
    grid = np.array([[float(bits or "nan") for bits in line] for line in strips])
    with mpl.rc_context(STYLE):
        figure, (axis,) = drawn(1, min(9.0, 0.9 + 0.26 * len(strips) + 0.2 * (len(blocks) > MAX_LABELLED_BLOCKS)))
        mesh = cells(axis, np.log2(grid), 1, 4, "cividis")
        if len(blocks) <= MAX_LABELLED_BLOCKS:
            for (row, column), bits in np.ndenumerate(grid):
                if not np.isnan(bits):
                    axis.text(column, row, f"{int(bits)}", ha="center", va="center", fontsize=8,
                              color="white" if bits < 6 else "black")
            axis.set_xticks(range(len(blocks)), [str(block) for block in blocks])
        else:
            figure.legend([Patch(color=mesh.to_rgba(np.log2(bits))) for bits in counts],
                          [f"{bits} bits" for bits in counts], loc="outside lower center", ncols=len(counts))
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="block")
    return Plot("Bits per module", svg(figure, "bits"), (
        "Linears by bits: " + ", ".join(f"{count} at {bits} bits" for bits, count in counts.items()) + "."),
        "Linears with the same bits in every block share a line.",
        [["linear", *(f"block {block}" for block in blocks)],
         *([kind, *line] for line, group in strips.items() for kind in group)])


def perturbation_spread(curves: list[SpreadCurve]) -> Plot:
    """How much every later position changes when one token is swapped, and what quantization adds to that."""
    with mpl.rc_context(STYLE):
        figure, axes = drawn(2, height=2.6)
        said, columns = [], []
        for i, curve in enumerate(curves):
            words = f"{'with' if curve.with_bos else 'without'} <bos>"
            places = np.arange(len(curve.before)) - curve.position
            later = places > 0
            before, after = (np.maximum(np.array(values)[later], 1e-6) for values in (curve.before, curve.after))
            axes[0].plot(places[later], before, color=SERIES[i], linewidth=1.2, label=words)
            axes[1].plot(places[later], 100 * (after / before - 1), color=SERIES[i], linewidth=1.2)
            for values, model in ((curve.before, "unquantized"), (curve.after, "quantized")):
                columns.append((f"{words}, {model}", dict(zip(places[later].tolist(), np.array(values)[later].tolist(),
                                                              strict=True))))
            means = [float(np.mean(np.array(values)[later])) for values in (curve.before, curve.after)]
            said.append(f"{words} later tokens change by {means[0]:.3g} of their norm, {means[1]:.3g} when quantized")
        logarithmic(axes[0])
        axes[0].set(xlabel="tokens after the swap", title="||Δh|| / ||h||, unquantized")
        axes[1].axhline(0, color=SOFT, linewidth=1)
        axes[1].set(xlabel="tokens after the swap", title="quantized: % more")
        figure.legend(loc="outside lower center", ncols=2)
    places_shown = sorted(set().union(*(values for _, values in columns)))
    table = [["tokens after", *(name for name, _ in columns)],
             *([str(spot), *(f"{values[spot]:.3g}" if spot in values else "" for _, values in columns)]
               for spot in places_shown)]
    return Plot("Spread of one swapped token", svg(figure, "spread"), f"After the last block, {'; '.join(said)}.",
                "After the last block. Sinks keep a change from spreading.", table)


def _kinds(group: list[str], count: int) -> str:
    if len(group) == count:
        return "all linears" if count > 1 else group[0]
    short = [name.split(".")[-1].removesuffix("_proj") for name in group]
    return ", ".join(short) if len(short) <= MAX_LABELLED_KINDS else f"{short[0]} and {len(short) - 1} more"


def _place(name: str) -> tuple[int, str]:
    """(block, kind) of a module name: the first number is the block, what follows it the kind."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[i + 1:])
    return 0, name
