"""A diagnosis as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from sinkquant.artifacts import SinkFidelity
from sinkquant.artifacts.diagnosis import Diagnosis, Measured, SettlingDepth


def tables(one: Diagnosis) -> Iterator[Table]:
    """Every part of a diagnosis; the range beside a figure is its null, the same model on resampled text."""
    table = _table(f"{one.model.name}: sink rate of the first position, by threshold", "input", "T",
                   *one.sink_rates[0].rates)
    for rates in one.sink_rates:
        table.add_row(rates.input, str(rates.length), *map(_cell, rates.rates.values()))
    yield table
    table = _table("Rank collapse and smoothness", "block", "mu", "mu / norm", "without sinks", "effective rank",
                   "without sinks", "row entropy")
    for layer in one.mixing:
        table.add_row(str(layer.layer), *map(_cell, (
            layer.mu, layer.mu_ratio, layer.mu_ratio_without_sinks, layer.effective_rank,
            layer.effective_rank_without_sinks, layer.row_entropy)))
    yield table
    table = _table("Over-squashing, collapse and spread", "diagnostic", "figure")
    squashing = one.over_squashing
    table.add_row("paths to the last token that start at a sink", _cell(squashing.sink_share))
    table.add_row("... that start at other tokens of the first half", _cell(squashing.far_share))
    for collapse in one.collapse:
        table.add_row(f"last token repeated after {collapse.length}: relative change", _cell(collapse.relative))
    for spread in one.spread:
        what = f"a token swapped at {spread.position}, {'with' if spread.with_bos else 'without'} <bos>"
        table.add_row(f"{what}: change of later tokens", _cell(spread.strength))
        table.add_row(f"{what}: share changed by more than {spread.threshold:g}", _cell(spread.reach))
    yield table
    if one.depth is not None:
        yield _depth_table(one.depth)
    if one.bos:
        table = _table("<bos> removed, moved, doubled", "<bos>", "loss", "increase", "sink rate", "attention on <bos>")
        for variant in one.bos:
            table.add_row(variant.name, _cell(variant.loss), _cell(variant.loss_increase), _cell(variant.sink_rate),
                          "" if variant.bos_attention is None else f"{variant.bos_attention:.3f}")
        yield table
    table = _table("Value norms over the median, smallest and largest", "token", "count", "norm", "sink")
    for value in one.values:
        table.add_row(escape(repr(value.text)), str(value.count), f"{value.norm:.3f}", "yes" if value.sink else "")
    yield table
    table = _table("Heads that rest on the sinks, and what wakes them", "layer.head", "on sinks", "on", "value drain",
                   "wakes when the token ...")
    for head in one.dormant_heads:
        causes = [f"{switch.relation} {switch.text!r} ({switch.on_rate:.0%} of {switch.count}; reads "
                  f"{switch.attends_to!r}, value {switch.value_norm:.3g} against {head.sink_value_norm:.3g})"
                  for switch in head.switches]
        table.add_row(f"{head.layer}.{head.head}", f"{head.sink_score:.3f}", f"{head.on_rate:.3f}",
                      f"{head.value_drain:.3f}", escape("; ".join(causes)))
    yield table
    if one.robustness:
        table = _table("Robustness", "attack", "input", "defence", "loss", "untouched", "sink rate", "untouched",
                       "finite")
        for check in one.robustness:
            table.add_row(escape(check.name), escape(check.what), check.defence or "", _number(check.loss),
                          _number(check.reference_loss), _number(check.sink_rate),
                          _number(check.reference_sink_rate), "yes" if check.finite else "no")
        yield table
    if one.special_tokens:
        table = _table("Special-token strings in user text", "path", "result")
        for path, result in one.special_tokens.items():
            table.add_row(escape(path), escape(result))
        yield table
    if one.against is not None:
        yield from tables(one.against)
    if one.fidelity is not None:
        yield fidelity_table(one.fidelity)


def _depth_table(depth: SettlingDepth) -> Table:
    """After how many blocks tokens have settled, and the share of them along the depth."""
    quarters = sorted({max(1, round(depth.blocks * part / 4)) for part in (1, 2, 3)})
    table = _table(f"Depth at which a prediction stays within {depth.bound:g} nats of the model's, of {depth.blocks} "
                   "blocks", "tokens", "number", "settled after", "first choice after",
                   *(f"settled by {block}" for block in quarters))
    for one in depth.kinds:
        table.add_row(one.kind, str(one.tokens), _cell(one.depth), _cell(one.same_top),
                      *(f"{one.settled[block - 1]:.0%}" for block in quarters))
    return table


def fidelity_table(fidelity: SinkFidelity) -> Table:
    """Every check with its bound."""
    table = _table(f"Sink fidelity: {fidelity.sentence}", "check", "value", "ideal", "null", "bound", "kept")
    for check in fidelity.checks:
        kept = {True: "yes", False: "NO", None: "nothing to keep"}[check.kept]
        table.add_row(escape(check.what), _number(check.value), f"{check.ideal:g}", f"{check.null:.3g}",
                      f"{check.bound:.3g}", kept)
    return table


def scale_table(diagnoses: Sequence[Diagnosis]) -> Table:
    """Several models side by side, as the scale table of Barbero et al. (2504.02732)."""
    table = _table("Models compared", "model", "parameters", "layers", "heads", "sink rate 0.3", "sink rate 0.8",
                   "massive ratio", "loss without <bos>", "spread with <bos>", "without")
    for one in sorted(diagnoses, key=lambda d: d.model.parameters):
        rates = one.sink_rates[0].rates
        without = next((v.loss_increase for v in one.bos if v.name == "none"), None)
        spreads = {spread.with_bos: spread.strength for spread in one.spread}
        table.add_row(escape(one.model.name), f"{one.model.parameters:,}", str(one.model.layers), str(one.model.heads),
                      _cell(rates["0.3"]), _cell(rates["0.8"]), f"{one.massive_ratio:.0f}", _cell(without),
                      _cell(spreads.get(True)), _cell(spreads.get(False)))
    return table


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=escape(title), title_justify="left")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _cell(figure: Measured | None) -> str:
    return "" if figure is None else f"{figure.value:.3g} ({figure.low:.3g} to {figure.high:.3g})"
