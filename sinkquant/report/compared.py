"""Comparison -> Markdown, or a page with two pictures and the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sinkquant.artifacts.base import write_atomically
from sinkquant.artifacts.comparison import ComparedRow, Comparison, Interval
from sinkquant.report.dots import Dot, Dots
from sinkquant.report.drawing import Plot
from sinkquant.report.kinds import require_kind, table_row
from sinkquant.report.plots import KL, by_position, megabytes
from sinkquant.report.render import environment, metrics_of

KINDS = (".html", ".md", ".json")
LINES = 6
"""Models whose divergence by position is drawn: more lines cannot be told apart."""


def write_comparison(path: Path, found: Comparison) -> Path:
    """Write a comparison as what the file's name says: HTML, Markdown or JSON."""
    require_kind(path, KINDS)
    if path.suffix == ".json":
        return found.save(path)
    return write_atomically(path, page(found) if path.suffix == ".html" else markdown(found))


def columns(found: Comparison) -> list[str]:
    """Names of the table's columns."""
    tasks = [f"{task} {metric}" for task, metric in metrics_of(found)]
    return ["model", "format", "MB", "bits per weight", "KV bits", "KL mean", "KL median", "KL 99 %", "KL 99.9 %",
            "same top-1", "perplexity", "perplexity, ratio", "sinks", *tasks, "Pareto"]


def cells(found: Comparison) -> list[list[str]]:
    """One line per model, in the order of `columns`."""
    return [[row.name, row.format, f"{row.bytes / 1e6:,.2f}", f"{row.bits_per_weight:.2f}", f"{row.kv_bits:.3g}",
             _interval(row.kl), _number(row.kl_median), _number(row.kl_99), _number(row.kl_99_9),
             _percent(row.same_top), _interval(row.perplexity), _interval(row.perplexity_ratio, digits=4),
             row.sinks or "", *(_measure(row, task, metric) for task, metric in metrics_of(found)),
             "yes" if row.pareto else ""] for row in found.rows]


def sentence(found: Comparison) -> str:
    """What came closest, and what came out smallest."""
    models = [row for row in found.rows if row.kind == "checkpoint" and row.kl]
    best = min(models, key=lambda row: row.mean_kl)
    small = min(models, key=lambda row: row.bytes)
    said = f"{best.name} comes closest: KL {best.mean_kl:.2g} nats at {megabytes(best.bytes)}"
    if small is best:
        return f"{said}."
    return f"{said}; {small.name} is smallest: {small.mean_kl:.2g} at {megabytes(small.bytes)}."


def markdown(found: Comparison) -> str:
    """The table and the warnings."""
    names = columns(found)
    lines = [f"# {found.model}, quantized in several ways", "", sentence(found), "", table_row(names),
             f"|---|---|{'---:|' * (len(names) - 2)}",
             *map(table_row, cells(found)), "", *(f"- {one}." for one in found.warnings),
             *([""] if found.warnings else []), f"{_said_of(found)}"]
    return "\n".join(lines) + "\n"


def page(found: Comparison) -> str:
    """One self-contained HTML page."""
    return environment().get_template("compared.html.j2").render(
        found=found, dots=dots(found), positions=positions(found), rows=cells(found), columns=columns(found),
        sentence=sentence(found), facts=_said_of(found))


def dots(found: Comparison) -> Dots:
    """A line per model on one axis of KL, smallest first, with intervals; the noise floor as a line."""
    noise = max((row.kl.value for row in found.rows if row.kind == "floor" and row.kl), default=0.0)
    lines = [Dot(row.name, [megabytes(row.bytes), f"{row.bits_per_weight:.2f}"], row.kl.value, row.kl.low, row.kl.high,
                 _interval(row.kl), "ours" if row.pareto else "", hollow=not row.pareto)
             for row in found.rows if row.kind == "checkpoint" and row.kl]
    return Dots("Divergence, smallest model first", ["size", "bits per weight"], KL, lines,
                "Filled: no other is as small and as close (the Pareto front). Bars are 95 % intervals over the rows "
                "of text." + (" Dashed: the noise floor, the unquantized model computed another way." if noise else ""),
                (noise, "noise floor") if noise > 0 else None)


def positions(found: Comparison) -> Plot:
    """KL by position in the row, of the smallest models."""
    models = [row for row in found.rows if row.kind == "checkpoint" and row.kl_by_position]
    plot = by_position({row.name: row.kl_by_position for row in models[:LINES]})
    more = len(models) - LINES
    return plot if more <= 0 else replace(plot, caption=f"{plot.caption} {more} larger models are not drawn.")


def _said_of(found: Comparison) -> str:
    facts = found.facts
    return (f"{facts['rows']} rows of {facts['length']} tokens, {facts['text']}; KL in nats per token; bits per "
            "weight: bytes of the checkpoint over all parameters; intervals 95 %, over rows.")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _interval(one: Interval | None, digits: int = 3) -> str:
    if one is None:
        return ""
    half = (one.high - one.low) / 2
    return f"{one.value:.{digits}g} ± {half:.2g}" if half > 0 else f"{one.value:.{digits}g}"


def _percent(one: Interval | None) -> str:
    return "" if one is None else f"{100 * one.value:.1f} ± {50 * (one.high - one.low):.1f} %"


def _measure(row: ComparedRow, task: str, metric: str) -> str:
    one = row.tasks.get(task, {}).get(metric)
    if one is None:
        return ""
    return f"{one.value:.4g}" + (f" ± {1.96 * one.stderr:.2g}" if one.stderr is not None else "")
