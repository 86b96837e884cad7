"""Report -> one self-contained HTML file, Markdown and JSON."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from sinkquant.artifacts import Comparison, Paired, Plan, Report, Row, SinkMap
from sinkquant.artifacts.base import write_atomically
from sinkquant.artifacts.findings import further
from sinkquant.models.folder import RUN_MODEL
from sinkquant.report.dots import Dots
from sinkquant.report.drawing import Plot
from sinkquant.report.plots import accuracy_dots, all_plots, divergences, row_name
from sinkquant.report.sample import lines, visible

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CARD = "README.md"
HEADLINES = {"pays": "Protection pays", "does not pay": "Protection does not pay",
             "no difference shown": "No difference was shown",
             "not measured": "Whether protection pays was not measured"}
FURTHER = 6
"""Of each kind of finding, before the rest is counted."""
ADDS = {"none": "does not add <bos>", "once": "adds <bos> once", "twice": "adds <bos> twice"}


def write(folder: Path, report: Report, sink_map: SinkMap, plan: Plan, after: SinkMap | None = None) -> Report:
    """Write report.json, report.md, report.html, and the card of the checkpoint in `model/`, if there is one.

    Returns:
        The report with its plots' alternative texts.
    """
    plots = all_plots(report, sink_map, plan, after)
    report = report.model_copy(update={"plots": {name: plot.alt for name, plot in plots.items()}})
    report.save(folder / "report.json")
    write_atomically(folder / "report.md", render("report.md.j2", report, sink_map, plan, plots))
    write_atomically(folder / "report.html", render("report.html.j2", report, sink_map, plan, plots))
    card = folder / RUN_MODEL / CARD
    if card.parent.is_dir():
        write_atomically(card, render("card.md.j2", report, sink_map, plan, plots, base_model_of(report, card)))
    return report


def page(report: Report, sink_map: SinkMap, plan: Plan, after: SinkMap | None = None) -> str:
    """The page alone."""
    return render("report.html.j2", report, sink_map, plan, all_plots(report, sink_map, plan, after))


def render(template: str, report: Report, sink_map: SinkMap, plan: Plan, plots: dict[str, Plot | Dots],
           base_model: str | None = None) -> str:
    """One template filled in. HTML is escaped; the SVG of plots is our own."""
    tokenizer = sink_map.tokenization
    rows = "start with <bos>" if tokenizer.rows_start_with_bos else "do not start with <bos>"
    tokenization = f"the tokenizer {ADDS[tokenizer.adds_bos]}; the rows of this run {rows}."
    compared = report.fidelity.comparisons if report.fidelity else {}
    sample = compared["sink_aware"].sample if "sink_aware" in compared else None
    unquantized = next((row.weight_bytes for row in report.rows if row.name == "unquantized"), plan.unquantized_bytes)
    return environment().get_template(template).render(
        report=report, sink_map=sink_map, plan=plan, plots=plots, metrics=metrics_of(report), words=in_words,
        cell=lambda row, task, metric: _cell(report, row, task, metric), tokenization=tokenization,
        headline=HEADLINES[report.verdict.answer], unquantized_bytes=unquantized,
        base_model=base_model, title=Path(report.model).name or report.model,
        facts=_facts(report), sample=sample, sample_lines=lines(sample) if sample else [],
        notes=list(dict.fromkeys([*report.notes, *sink_map.notes, *plan.notes])),
        no_ops=sum(head.no_op for layer in sink_map.heads for head in layer), further=list(further(sink_map, FURTHER)))


def comparison(runs: list[tuple[str, Report]]) -> str:
    """One page with the rows of several runs side by side."""
    dots = [dot for name, report in runs for dot in accuracy_dots(report.rows, f"{name}: ")]
    asked = [{key: report.evaluation.get(key) for key in ("text", "rows", "length")} for _, report in runs]
    return environment().get_template("comparison.html.j2").render(
        runs=runs, plot=divergences(dots) if any(dot.value is not None for dot in dots) else None, cell=_cell,
        metrics=metrics_of, alike=all(one == asked[0] for one in asked))


def _facts(report: Report) -> dict[str, str]:
    facts = {key.replace("_", " "): "none" if value is None else str(value) for key, value in report.evaluation.items()}
    for key, value in report.resources.items():
        name, _, stage = key.partition(": ")
        if name == "seconds":
            facts[stage.replace("_", "-")] = f"{value:.1f} s"
        else:
            facts[key] = f"{value / 2**20:,.1f} MiB" if "bytes" in key else f"{value:g}"
    return facts | report.versions


def in_words(pair: Paired) -> str:
    """Which side is better, or that none was shown to be."""
    if pair.low <= 0 <= pair.high:
        return "no difference shown"
    a_is_better = (pair.difference > 0) == pair.higher_is_better
    return f"{row_name(pair.a if a_is_better else pair.b)} is better"


def _quantity(name: str) -> str:
    return {"kl": "loss", "kl_kv": "loss of the KV cache", "weight_bytes": "bytes on disk"}.get(name, name)


def _figure(value: float | None, quantity: str, missing: str) -> str:
    """A forecast's figure with what its quantity asks for: whole bytes, and four digits of all else."""
    if value is None:
        return missing
    return f"{value:,.0f}" if "bytes" in quantity else f"{value:.4g}"


@functools.cache  # it keeps the templates that it has compiled
def environment() -> Environment:
    """What fills in templates."""
    made = Environment(loader=PackageLoader("sinkquant.report"), undefined=StrictUndefined, trim_blocks=True,
                              autoescape=select_autoescape(["html.j2", "html"]), keep_trailing_newline=True)
    made.filters["row"] = row_name
    made.filters["visible"] = visible
    made.filters |= {"quantity": _quantity, "figure": _figure}
    return made


def metrics_of(found: Report | Comparison) -> list[tuple[str, str]]:
    """(task, metric) of all rows, in the order in which they come."""
    return list(dict.fromkeys((task, metric) for row in found.rows for task, metrics in row.tasks.items()
                              for metric in metrics))


def _cell(report: Report, row: Row, task: str, metric: str) -> Any:
    measure = row.tasks.get(task, {}).get(metric)
    if measure is None:
        return ""
    text = f"{measure.value:.4g}" + (f" ± {measure.stderr:.2g}" if measure.stderr is not None else "")
    recovery = report.recovery.get(row.name, {}).get(task, {}).get(metric)
    return text if recovery is None else f"{text} ({100 * recovery:.1f} %)"


def base_model_of(report: Report, card: Path) -> str | None:
    """The id on a hub of the model that a checkpoint was made of. A card that is there knows it from the run; later the
    folder that the model was named by may be gone."""
    if not card.is_file():
        return hub_id(report.model)
    found = re.search(r"^base_model: (.+)$", card.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else None


def hub_id(model: str) -> str | None:
    """The id on a hub that a model was named by, or None: a folder's path means nothing to others."""
    return model if HUB_ID.fullmatch(model) and not Path(model).exists() else None
