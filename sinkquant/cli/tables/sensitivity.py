"""Sensitivities as a table for the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from sinkquant.artifacts import KVLoss, Sensitivity, UnitSensitivity
from sinkquant.artifacts.sensitivity import InputSensitivity


def linear_table(found: Sensitivity) -> Table:
    """One row per module, or group of them, one column per format: thousandths of a nat per token; and the share that
    the sinks lose by themselves in the smallest format."""
    forms = list(dict.fromkeys((loss.bits, loss.group_size) for unit in found.units for loss in unit.losses))
    several = len({group for _, group in forms}) > 1
    measured = all(loss.measured is not None for unit in found.units for loss in unit.losses)
    title = f"KL divergence in 0.001 nats per token, {'measured' if measured else 'predicted to second order'}"
    shown = Table("module", title=title, title_justify="left",
                  caption_justify="left", caption=escape(
                      f"through sinks: {', '.join(map(repr, found.sinks)) or 'none found'}, in the first format"))
    for bits, group in forms:
        shown.add_column(f"{bits} bits{f', {group}' if several else ''}", justify="right", no_wrap=True)
    shown.add_column("through sinks", justify="right")
    for unit in found.units:
        best = sorted(unit.losses, key=lambda loss: -loss.terms.total)  # the last one of a format stays
        cells = {(loss.bits, loss.group_size): loss.terms for loss in best}
        first = unit.losses[0].terms
        shown.add_row(escape(_name(unit)), *(f"{1000 * cells[form].total:.2g}" if form in cells else ""
                                             for form in forms),
                      f"{first.sinks / first.total:.1%}" if first.total > 0 else "")
    return shown


def input_table(found: Sensitivity) -> Table:
    """One row per input, one column per format that it may be rounded to: thousandths of a nat per token; and the share
    that the sinks lose by themselves in the coarsest."""
    forms = list(dict.fromkeys((loss.activations, loss.scale) for unit in found.inputs for loss in unit.losses))
    shown = Table("input of", title="rounded inputs: 0.001 nats per token, predicted to second order",
                  title_justify="left")
    for name, scale in forms:
        shown.add_column(f"{name} per {scale}", justify="right")
    shown.add_column("through sinks", justify="right")
    for unit in found.inputs:
        cells = {(loss.activations, loss.scale): loss for loss in unit.losses}
        first = unit.losses[0]
        shown.add_row(escape(_name(unit)), *(f"{1000 * cells[form].total:.2g}" if form in cells else ""
                                             for form in forms),
                      f"{first.sinks / first.total:.1%}" if first.total > 0 else "")
    return shown


def ends_in_words(found: Sensitivity) -> list[str]:
    """What the head and the embedding lose; empty where neither was tried."""
    parts = [f"{1000 * end.loss:.2g} ({end.kind}, {end.bits} bits)" for end in found.ends]
    return [f"The output head and the token embedding alone, in 0.001 nats: {', '.join(parts)}"] if parts else []


def cache_table(found: Sensitivity) -> Table:
    """One row per KV head and kind, one column per number of bits: thousandths of a nat per token."""
    bits = sorted({loss.bits for loss in found.kv})
    measured = all(loss.measured is not None for loss in found.kv)
    shown = Table("layer", "KV head", "", title_justify="left",
                  title=f"KV cache: 0.001 nats per token of rows of {found.kv_length}, "
                        f"{'measured' if measured else 'predicted to second order'}")
    for one in bits:
        shown.add_column(f"{one} bits", justify="right", no_wrap=True)
    shown.add_column("on sinks", justify="right")
    lines: dict[tuple[int, int, str], dict[int, KVLoss]] = {}
    for loss in found.kv:
        lines.setdefault((loss.layer, loss.head, loss.kind), {})[loss.bits] = loss
    for (layer, head, kind), losses in lines.items():
        one_loss = next(iter(losses.values()))
        shown.add_row(str(layer), str(head), f"{kind}s", *(f"{1000 * losses[one].loss:.2g}" for one in bits),
                      "no-op" if one_loss.no_op else f"{one_loss.sink_score:.2f}")
    return shown


def ranking_in_words(found: Sensitivity) -> list[str]:
    """How well what was predicted ranks like what was measured; empty where nothing was measured."""
    ranking = found.ranking
    cache = [] if found.kv_ranking is None else [
        f"Rank correlation of predicted and measured losses of the KV cache over {len(found.kv)} formats: "
        f"{found.kv_ranking:.3f}"]
    if ranking is None:
        return cache
    terms = ((ranking.total, "in all"), (ranking.sinks, "through sinks"), (ranking.others, "through all other tokens"),
             (ranking.between, "between modules in one format"))
    parts = [f"{value:.3f} {words}" for value, words in terms if value is not None]
    size = "" if ranking.ratio is None else f"; predicted losses add up to {ranking.ratio:.2f} of the measured ones"
    return [f"Rank correlation of predicted and measured losses over {ranking.pairs} formats: {', '.join(parts)}{size}",
            *cache]


def _name(unit: UnitSensitivity | InputSensitivity) -> str:
    first, *rest = unit.modules
    if len(rest) > 3:
        return f"{first} and {len(rest)} other linears of experts"
    return " + ".join([first, *(module.rpartition(".")[2] for module in rest)])
