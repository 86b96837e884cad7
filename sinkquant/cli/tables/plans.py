"""The difference of two plans, and advice on protection, as tables for the terminal."""

from __future__ import annotations

import json
from typing import Any

from rich.markup import escape
from rich.table import Table

from sinkquant.artifacts import PredictedLoss
from sinkquant.artifacts.advice import Advice
from sinkquant.artifacts.frontier import ModuleChange, PlanDifference

LONGEST = 48
"""Characters of a value that a table shows."""


def totals(found: PlanDifference) -> Table:
    """Both plans as a whole."""
    table = Table("", "a", "b", "b - a", title="Two plans", title_justify="left")
    a, b = found.a, found.b
    table.add_row("from", escape(f"{a.path} ({a.name})"), escape(f"{b.path} ({b.name})"), "")
    table.add_row("bytes of weights", f"{a.weight_bytes:,}", f"{b.weight_bytes:,}",
                  f"{b.weight_bytes - a.weight_bytes:+,}")
    table.add_row("bits per weight", f"{a.bits_per_weight:.3f}", f"{b.bits_per_weight:.3f}",
                  f"{b.bits_per_weight - a.bits_per_weight:+.3f}")
    for words, one, other in (("predicted loss, nats per token", a.kl, b.kl),
                              ("of which through sinks", a.kl_sinks, b.kl_sinks)):
        table.add_row(words, _nats(one), _nats(other), "" if one is None or other is None else f"{other - one:+.3g}")
    if a.kv_bytes is not None or b.kv_bytes is not None:
        table.add_row("bytes of the KV cache", *("not packed" if size is None else f"{size:,}"
                                                 for size in (a.kv_bytes, b.kv_bytes)),
                      "" if a.kv_bytes is None or b.kv_bytes is None else f"{b.kv_bytes - a.kv_bytes:+,}")
    table.add_row("loads in", ", ".join(a.loads_in), ", ".join(b.loads_in), "")
    return table


def changes(found: PlanDifference) -> Table:
    """A line for every linear that the plans treat differently. What linears that share a format lose together stands
    with the first of them."""
    table = Table("module", "a -> b", title=f"{len(found.modules)} linears differ, {found.same} do not",
                  title_justify="left")
    for name in ("bytes in a", "bytes in b", "loss in a", "loss in b"):
        table.add_column(name, justify="right")
    said: set[tuple[str, ...]] = set()
    for one in found.modules:
        unit = next((tuple(loss.modules) for loss in one.losses if loss is not None and loss.modules), ())
        losses = [_loss(loss, unit in said) for loss in one.losses]
        said |= {unit} if unit else set()
        table.add_row(escape(one.module), escape(_in_words(one)), *(f"{size:,}" for size in one.bytes), *losses)
    return table


def settings(found: PlanDifference) -> Table:
    """What is decided for the whole model and differs."""
    table = Table("setting", "a", "b", title="Beside the linears", title_justify="left")
    for path, (one, other) in found.settings.items():
        table.add_row(escape(path), escape(_short(one)), escape(_short(other)))
    return table


def advice_table(found: Advice) -> Table:
    """A line for every kind of protection: KL divergence in thousandths of a nat per token."""
    table = Table("protection", "for", title="What protection is worth alone, KL divergence in 0.001 nats per token",
                  title_justify="left", caption="beside a control of the same bytes with it off",
                  caption_justify="left")
    for name in ("predicted gain", "without", "with", "gain", "95 % interval"):
        table.add_column(name, justify="right")
    table.add_column("answer")
    for one in found.mechanisms:
        predicted = "" if one.predicted is None else (
            f"{'at best ' if one.predicted.at_best else ''}{1000 * one.predicted.gain:.2g}")
        figures = [""] * 4
        if (worth := one.measured) is not None:
            figures = [*(f"{1000 * value:.3g}" for value in (worth.control, worth.aware, worth.gain)),
                       f"{1000 * worth.low:.2g} to {1000 * worth.high:.2g}"]
        table.add_row(one.name, one.applies_to, predicted, *figures, one.answer)
    return table


def _in_words(change: ModuleChange) -> str:
    return ", ".join(f"{field} {_short(one)} -> {_short(other)}" for field, (one, other) in change.changed.items())


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and len(text) > LONGEST:
        return f"{len(value)} of them"
    return text if len(text) <= LONGEST else f"{text[:LONGEST - 3]}..."


def _loss(loss: PredictedLoss | None, said: bool) -> str:
    return "not predicted" if loss is None else "together" if said else f"{loss.total:.3g}"


def _nats(value: float | None) -> str:
    return "not predicted" if value is None else f"{value:.4g}"
