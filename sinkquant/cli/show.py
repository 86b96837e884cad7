"""Artifacts as tables and sentences on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from sinkquant.artifacts import Frontier, Plan, Report, SinkMap
from sinkquant.artifacts.base import write_atomically
from sinkquant.artifacts.experts import in_lines
from sinkquant.cli.parts import out


def show_sink_map(sink_map: SinkMap) -> None:
    """What was detected."""
    facts = sink_map.tokenization
    rate = ", ".join(f"{value:.3f} at {threshold}" for threshold, value in sink_map.sink_rate.items())
    repeated = ", ".join(f"{value:.3f}" for value in sink_map.sink_rate_repeated_token.values())
    out.print(f"{escape(sink_map.model.name)}: {sink_map.model.architecture}, {sink_map.model.layers} layers of "
              f"{sink_map.model.heads} heads", soft_wrap=True)
    out.print(f"Tokenizer adds <bos> {facts.adds_bos}; rows start with it: {facts.rows_start_with_bos}", soft_wrap=True)
    out.print(f"Sink rate at T = {facts.length}: {rate}; one token repeated: {repeated}", soft_wrap=True)
    table = Table("token", "id", "position", "kind", "attention", "heads", "massive", title="Sink tokens",
                  title_justify="left")
    for token in sink_map.tokens:
        table.add_row(escape(repr(token.text)), str(token.token_id), str(token.position), token.kind,
                      f"{token.attention:.3f}", f"{token.heads:.3f}", "yes" if token.massive else "no")
    out.print(table if sink_map.tokens else "No sink token was found.")
    for channel in sink_map.channels:
        out.print(f"Channel {channel.channel}: peak {channel.peak:.1f}, {channel.ratio:.1f} x the median, born in "
                  f"{channel.born}, ended {channel.ended or 'never'}, carried by "
                  f"{escape(', '.join(map(repr, channel.tokens)))}", soft_wrap=True)
    for weight in sink_map.super_weights:
        out.print(f"Super weight {weight.module}[{weight.row}, {weight.column}] = {weight.value:.4g}: "
                  f"+{weight.loss_increase:.3g} nats without it", soft_wrap=True, markup=False)
    for line in in_lines(sink_map):
        out.print(line, soft_wrap=True, markup=False, highlight=False)
    no_ops = sum(head.no_op for layer in sink_map.heads for head in layer)
    out.print(f"{no_ops} no-op heads, {len(sink_map.super_weights)} super weights")
    for note in sink_map.notes:
        out.print(f"Note: {escape(note)}", soft_wrap=True)


def show_plan(made: Plan) -> None:
    """Every module's format with its reason, then bytes, predictions and notes."""
    table = Table("module", "bits", "group", "method", "inputs", "reason", title="Plan", title_justify="left")
    for name, decision in made.modules.items():
        table.add_row(name, str(decision.bits), str(decision.group_size or ""), decision.method,
                      decision.inputs_in_words(), escape(decision.reason))
    out.print(table)
    out.print(f"{made.bits_per_weight:.3f} bits per weight, {made.weight_bytes:,} bytes of "
              f"{made.unquantized_bytes:,}; loads in {', '.join(made.loads_in)}", soft_wrap=True)
    if "kl" in made.predicted:
        out.print(f"Predicted KL divergence {made.predicted['kl']:.4g} nats per token, of which "
                  f"{made.predicted['kl_sinks']:.2g} through sinks", soft_wrap=True)
    if made.kv_cache is not None:
        out.print(escape(made.kv_cache.in_words()), soft_wrap=True)
    for note in made.notes:
        out.print(f"Note: {escape(note)}", soft_wrap=True)


def show_frontier(found: Frontier, output: Path | None, json: bool) -> None:
    """A sweep of budgets; also as a page and as JSON beside it where `output` is named."""
    from sinkquant.report.frontier import page, table

    if output:
        found.save(output.with_suffix(".json"))
        write_atomically(output.with_suffix(".html"), page(found))
    if json:
        print(found.to_json(), end="")
        return
    out.print(table(found))
    for note in found.notes:
        out.print(f"Note: {escape(note)}", soft_wrap=True)
    if output:
        out.print(f"Frontier: {output.with_suffix('.html')}", soft_wrap=True, highlight=False)


def show_report(made: Report) -> None:
    """Every row's main figures, the verdict and what broke the gate."""
    table = Table("row", "bytes", "bits", "activations", "KV bits", title="Result", title_justify="left")
    columns = list(dict.fromkeys((task, metric) for row in made.rows for task, metrics in row.tasks.items()
                                 for metric in metrics if metric in ("kl", "word_perplexity", "acc")))
    for task, metric in columns:
        table.add_column(f"{task} {metric}")
    for row in made.rows:
        cells = []
        for task, metric in columns:
            measure = row.tasks.get(task, {}).get(metric)
            cells.append("" if measure is None else f"{measure.value:.4g}")
        table.add_row(row.name, f"{row.weight_bytes:,}", f"{row.bits_per_weight:.3f}", row.activations,
                      f"{row.kv_bits:.3g}", *cells)
    out.print(table)
    out.print(escape(made.verdict.sentence), soft_wrap=True)
    for name, one in (made.fidelity.comparisons.items() if made.fidelity else ()):
        out.print(f"{name}: {escape(one.sentence)}", soft_wrap=True)
    for failure in made.verdict.failures:
        out.print(f"[red]gate:[/red] {escape(failure)}", soft_wrap=True)
