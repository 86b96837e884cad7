"""Report -> one self-contained HTML file, Markdown and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from sinkquant.artifacts import Paired, Plan, Report, Row, SinkMap
from sinkquant.artifacts.base import write_atomically
from sinkquant.report.plots import Plot, accuracy_against_bytes, all_plots

ADDS = {"none": "does not add <bos>", "once": "adds <bos> once", "twice": "adds <bos> twice"}


def write(folder: Path, report: Report, sink_map: SinkMap, plan: Plan, after: SinkMap | None = None) -> Report:
    """Write report.json, report.md and report.html. Returns the report with its plots' alternative texts."""
    plots = all_plots(report, sink_map, plan, after)
    report = report.model_copy(update={"plots": {name: plot.alt for name, plot in plots.items()}})
    report.save(folder / "report.json")
    write_atomically(folder / "report.md", render("report.md.j2", report, sink_map, plan, plots))
    write_atomically(folder / "report.html", render("report.html.j2", report, sink_map, plan, plots))
    return report


def render(template: str, report: Report, sink_map: SinkMap, plan: Plan, plots: dict[str, Plot]) -> str:
    """One template filled in. HTML is escaped; the SVG of plots is our own."""
    facts = sink_map.tokenization
    rows = "start with <bos>" if facts.rows_start_with_bos else "do not start with <bos>"
    tokenization = f"the tokenizer {ADDS[facts.adds_bos]}; the rows of this run {rows}."
    return _environment().get_template(template).render(
        report=report, sink_map=sink_map, plan=plan, plots=plots, metrics=_metrics(report), words=in_words,
        cell=lambda row, task, metric: _cell(report, row, task, metric), tokenization=tokenization,
        no_ops=sum(head.no_op for layer in sink_map.heads for head in layer))


def comparison(runs: list[tuple[str, Report]]) -> str:
    """One page with the rows of several runs side by side."""
    points = [(f"{name}: {row.name}", row.weight_bytes, row.tasks["divergence"]["kl"].value,
               row.tasks["divergence"]["kl"].stderr)
              for name, report in runs for row in report.rows if "divergence" in row.tasks]
    return _environment().get_template("comparison.html.j2").render(
        runs=runs, plot=accuracy_against_bytes(points) if points else None, cell=_cell, metrics=_metrics)


def in_words(pair: Paired) -> str:
    """Which side is better, or that none was shown to be."""
    if pair.low <= 0 <= pair.high:
        return "no difference shown"
    a_is_better = (pair.difference > 0) == pair.higher_is_better
    return f"{pair.a if a_is_better else pair.b} is better"


def _environment() -> Environment:
    return Environment(loader=PackageLoader("sinkquant.report"), autoescape=select_autoescape(["html.j2", "html"]),
                       undefined=StrictUndefined, keep_trailing_newline=True)


def _metrics(report: Report) -> list[tuple[str, str]]:
    seen: dict[tuple[str, str], None] = {}
    for row in report.rows:
        for task, metrics in row.tasks.items():
            seen.update(dict.fromkeys((task, metric) for metric in metrics))
    return list(seen)


def _cell(report: Report, row: Row, task: str, metric: str) -> Any:
    measure = row.tasks.get(task, {}).get(metric)
    if measure is None:
        return ""
    text = f"{measure.value:.4g}" + (f" ± {measure.stderr:.2g}" if measure.stderr is not None else "")
    recovery = report.recovery.get(row.name, {}).get(task, {}).get(metric)
    return text if recovery is None else f"{text} ({100 * recovery:.1f} %)"
