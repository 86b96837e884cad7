"""A report as a table: every row's main figures, the verdict and what broke the gate."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from sinkquant.artifacts import Report

MAIN = ("kl", "word_perplexity", "acc")
"""Metrics that stand for their task where it has them."""


def result_table(made: Report) -> Table:
    """A line for every model that was measured."""
    shown = Table("row", "bytes", "bits", "activations", "KV bits", title="Result", title_justify="left")
    found = list(dict.fromkeys((task, metric) for row in made.rows for task, metrics in row.tasks.items()
                               for metric in metrics))
    main = [(task, metric) for task, metric in found if metric in MAIN]
    columns = [one for one in found if one in main or one[0] not in dict(main)]  # all of a task that has no main one
    for task, metric in columns:
        shown.add_column(f"{task} {metric}")
    for row in made.rows:
        cells = []
        for task, metric in columns:
            measure = row.tasks.get(task, {}).get(metric)
            cells.append("" if measure is None else f"{measure.value:.4g}")
        shown.add_row(row.name, f"{row.weight_bytes:,}", f"{row.bits_per_weight:.3f}", row.activations,
                      f"{row.kv_bits:.3g}", *cells)
    return shown


def sentences(made: Report) -> Iterator[str]:
    """The verdict with its details, sink fidelity, and what is below the gate."""
    yield made.verdict.sentence
    yield from made.verdict.details
    for name, one in (made.fidelity.comparisons.items() if made.fidelity else ()):
        yield f"{name}: {one.sentence}"
    for failure in made.verdict.failures:
        yield f"gate: {failure}"
