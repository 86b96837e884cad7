"""quantize-model: the command line."""

from __future__ import annotations

import importlib.metadata
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from sinkquant.artifacts import Frontier, Plan, Report, Sensitivity, SinkMap
from sinkquant.artifacts.base import write_atomically
from sinkquant.artifacts.experts import in_lines
from sinkquant.cli_parts import (
    JsonOption,
    ModelArgument,
    RecipeOption,
    SensitivityOption,
    SetOption,
    SinkMapOption,
    TextOption,
    TrustOption,
    err,
    find_costs,
    find_sinks,
    out,
    shown_progress,
)
from sinkquant.cli_policy import advise, diff
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.recipe import DEFAULT_RECIPE, Recipe, recipe_names

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# typer carries its own copy of click or uses the installed one, by version; this names the right class in both.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
INTERRUPTED = 130
"""What typer makes of Ctrl-C."""

def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong request, 3 below the quality gate."""
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell ignores Ctrl-C for its background jobs
        signal.signal(number, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except typer.Exit as stop:
        code = stop.exit_code
    except UsageError as error:
        code = _fail(f"{error.format_message()} See quantize-model --help.", 2)  # type: ignore[attr-defined]
    except SinkquantError as error:
        code = _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("stopped before it was done; nothing half-written was left.", 1)
    except MemoryError:
        code = _fail("out of memory; use a smaller calibration.batch_size or a larger machine.", 1)
    except OSError as error:
        code = _fail(f"{error.filename or 'input or output'}: {error.strerror or error}.", 1)
    except Exception as error:
        if "--traceback" in sys.argv:
            raise
        reason = " ".join(str(error).split()) or "no reason was given"
        code = _fail(f"unexpected {type(error).__name__}: {reason[:300]} (run with --traceback for all of it).", 1)
    sys.exit(code or 0)


@app.callback(invoke_without_command=True)
def top(context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
        traceback: Annotated[bool, typer.Option("--traceback", help="Show where an unexpected error arose.")] = False,
        ) -> None:
    """Find the attention sinks of a language model, keep them exact, quantize the rest, prove it."""
    if version:
        print(f"quantize-model {importlib.metadata.version('sinkquant')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command()
def run(recipe: Annotated[str | None, typer.Argument(help="A recipe file or the name of a packaged one; "
                                                          "default: " + DEFAULT_RECIPE + ".")] = None,
        model: Annotated[str, typer.Option("-m", "--model", help="A model folder, a hub id, or 'demo'.")] = "demo",
        output: Annotated[Path, typer.Option("-o", "--output", help="The run's folder; must not exist yet.")] =
        Path("out"),
        assignments: SetOption = None,
        plan_file: Annotated[Path | None, typer.Option("--plan", help="Carry out this plan, edited or not, with the "
                                                                      "recipe that it was made with.")] = None,
        sink_map: Annotated[Path | None, typer.Option(help="A sink map made before; default: detect.")] = None,
        sensitivity: SensitivityOption = None,
        resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, and keep this one if it "
                                                              "is interrupted.")] = False,
        plan_only: Annotated[bool, typer.Option("--plan-only", help="Stop before anything is quantized.")] = False,
        trust_remote_code: TrustOption = False) -> None:
    """Detect, plan, quantize, save, evaluate, report."""
    edited = Plan.load(plan_file) if plan_file else None
    known = SinkMap.load(sink_map) if sink_map else None
    chosen = _recipe_of_run(recipe, edited, assignments or [])
    from sinkquant.models.processes import this_process
    from sinkquant.pipeline import run as run_pipeline

    with shown_progress() as progress:
        report = run_pipeline(chosen, model, output, edited=edited, sink_map=known, sensitivity=sensitivity,
                              plan_only=plan_only, resume=resume, trust_remote_code=trust_remote_code,
                              progress=progress)
    if this_process()[0] > 0:
        return
    if report is None:
        _show_plan(Plan.load(output / "plan.json"))
        out.print(f"Plan: {output / 'plan.json'}", soft_wrap=True, highlight=False)
        return
    _show_report(report)
    out.print(f"Report: {output / 'report.html'}", soft_wrap=True, highlight=False)
    if report.verdict.gate == "failed":
        raise typer.Exit(3)


def _recipe_of_run(recipe: str | None, edited: Plan | None, assignments: list[str]) -> Recipe:
    if edited is None:
        return Recipe.load(recipe or DEFAULT_RECIPE).replace(assignments)
    if recipe is not None:
        raise RequestError("a plan brings the recipe that it was made with; give --plan or a recipe, not both.")
    for assignment in assignments:
        if assignment.partition(".")[0] in ("weights", "prune", "protect", "budget", "calibration"):
            raise RequestError(f"--set {assignment} would change nothing beside --plan; edit the plan instead.")
    return Recipe.parse(edited.recipe, "the recipe in the plan").replace(assignments)


@app.command()
def detect(model: ModelArgument, text: TextOption = None, assignments: SetOption = None, json: JsonOption = False,
           output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the sink map here.")] = None,
           trust_remote_code: TrustOption = False) -> None:
    """Find sink tokens, heads, channels and super weights."""
    sink_map = find_sinks(model, text, Recipe().replace(assignments or []), trust_remote_code)
    if output:
        sink_map.save(output)
    if json:
        print(sink_map.to_json(), end="")
    else:
        _show_sink_map(sink_map)


@app.command()
def plan(model: ModelArgument,
         recipe: RecipeOption = DEFAULT_RECIPE,
         assignments: SetOption = None, text: TextOption = None, json: JsonOption = False,
         sink_map: SinkMapOption = None,
         sensitivity: SensitivityOption = None,
         frontier: Annotated[bool, typer.Option("--frontier", help="Solve a sweep of budgets: predicted loss against "
                                                "bytes, with uniform plans and the control.")] = False,
         output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan here; with --frontier a "
                                                     "page, and its figures as JSON beside it.")] = None,
         trust_remote_code: TrustOption = False) -> None:
    """Decide bits per module, with reasons and exact bytes; quantizes nothing."""
    chosen = Recipe.load(recipe).replace(assignments or [])
    from sinkquant.models import Decoder, open_model, resolve
    from sinkquant.planning import plan_ready
    from sinkquant.policy import make_frontier, make_plan

    known = SinkMap.load(sink_map) if sink_map else None
    shape = Decoder.of(open_model(resolve(model), trust_remote_code=trust_remote_code)).shape(model)
    made, _ = plan_ready(shape, chosen, None, known) if sensitivity is None and not frontier else (None, [])
    if frontier:
        known = known or find_sinks(model, text, chosen, trust_remote_code)
        lost = find_costs(model, text, known, chosen, sensitivity, trust_remote_code)
        _show_frontier(make_frontier(shape, known, chosen, lost), output, json)
        return
    if made is None:
        found = known or find_sinks(model, text, chosen, trust_remote_code)
        costs = (find_costs(model, text, found, chosen, sensitivity, trust_remote_code)
                 if chosen.budget.solved or sensitivity else None)
        made = make_plan(shape, found, chosen, costs)
    if output:
        made.save(output)
    if json:
        print(made.to_json(), end="")
    else:
        _show_plan(made)


@app.command()
def sensitivity(model: ModelArgument,
                recipe: RecipeOption = DEFAULT_RECIPE,
                assignments: SetOption = None, text: TextOption = None, json: JsonOption = False,
                sink_map: SinkMapOption = None,
                output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the sensitivities here, "
                                                            "or take them from there.")] = None,
                trust_remote_code: TrustOption = False) -> None:
    """What every format of every linear would lose, through the sinks and through all other tokens."""
    chosen = Recipe.load(recipe).replace(assignments or [])
    from sinkquant.sensitivity.show import cache_table, ranking_in_words, table

    found = SinkMap.load(sink_map) if sink_map else find_sinks(model, text, chosen, trust_remote_code)
    made = find_costs(model, text, found, chosen, output, trust_remote_code)
    if json:
        print(made.to_json(), end="")
        return
    out.print(table(made))
    if made.kv:
        out.print(cache_table(made))
    for line in [*ranking_in_words(made), *(f"Note: {note}" for note in made.notes)]:
        out.print(escape(line), soft_wrap=True)


app.command()(advise)
app.command()(diff)


@app.command(name="eval")
def evaluate(folder: Annotated[Path, typer.Argument(help="A run's folder or a checkpoint.")],
             baseline: Annotated[str | None, typer.Option(help="The unquantized model.")] = None,
             text: TextOption = None, tasks: Annotated[str | None, typer.Option(help="Task names, by commas.")] = None,
             assignments: SetOption = None, json: JsonOption = False,
             sensitivity: Annotated[Path | None, typer.Option(help="Predict the losses from this file; default: what "
                                                                   "the plans say.")] = None,
             output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the report here.")] = None,
             ) -> None:
    """Measure a checkpoint with lm-eval, beside its baseline and its control."""
    extra = [f"evaluate.text={text}"] if text else []
    extra += [f"evaluate.tasks=[{tasks}]"] if tasks else []
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder; give a run's folder or a checkpoint.")
    from sinkquant.measure import evaluate_folder, recorded_recipe
    from sinkquant.models.processes import this_process

    recipe = recorded_recipe(folder).replace([*extra, *(assignments or [])])
    costs = Sensitivity.load(sensitivity) if sensitivity else None
    with shown_progress() as progress:
        made = evaluate_folder(folder, recipe, baseline, progress, costs)
    if this_process()[0] > 0:
        return
    if output:
        made.save(output)
    if json:
        print(made.to_json(), end="")
    else:
        _show_report(made)
    if made.verdict.gate == "failed":
        raise typer.Exit(3)


@app.command()
def diagnose(models: Annotated[list[str], typer.Argument(help="A model folder, a hub id, or 'demo'; several to "
                                                              "compare.")],
             against: Annotated[str | None, typer.Option(help="A quantized version, to be compared with it.")] = None,
             text: TextOption = None, assignments: SetOption = None, json: JsonOption = False,
             output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the diagnosis here.")] = None,
             trust_remote_code: TrustOption = False) -> None:
    """What the sinks do for a model: over-mixing, spread, robustness, each beside its null; sink fidelity."""
    recipe = Recipe().replace(assignments or [])
    if len(models) > 1 and (output or against):
        raise RequestError("-o and --against are for one model; name one.")
    from sinkquant.diagnose import diagnose as examine
    from sinkquant.diagnose.show import scale_table, tables
    from sinkquant.formats import load_dense
    from sinkquant.models import load_tokenizer, read_text, resolve

    folders = [resolve(model) for model in models]
    tokenizers = [load_tokenizer(folder, trust_remote_code) for folder in folders]
    read_text(text, "evaluation")
    other = resolve(_checkpoint_of(against)) if against else None
    found = []
    with shown_progress() as progress:
        for name, folder, tokenizer in zip(models, folders, tokenizers, strict=True):
            quantized = load_dense(other) if other else None
            found.append(examine(load_dense(folder), tokenizer, text, recipe, name, against=quantized,
                                 against_name=against or "", progress=progress))
    if output:
        found[0].save(output)
    if json:
        print(found[0].to_json() if len(found) == 1 else f"[{','.join(one.to_json() for one in found)}]")
        return
    for one in found:
        for table in tables(one):
            out.print(table)
        for note in one.notes:
            out.print(f"Note: {escape(note)}", soft_wrap=True)
    if len(found) > 1:
        out.print(scale_table(found))


def _checkpoint_of(place: str) -> str:
    """The checkpoint inside a run's folder, or what was named."""
    return f"{place}/model" if Path(place, "model", "config.json").is_file() else place


@app.command(name="cut-heads")
def cut(model: ModelArgument,
        output: Annotated[Path, typer.Option("-o", "--output", help="The smaller model's folder; must not exist yet.")],
        sink_map: Annotated[Path | None, typer.Option(help="A sink map made with prune.heads=no-op; default: detect "
                                                           "now.")] = None,
        assignments: SetOption = None, text: TextOption = None, trust_remote_code: TrustOption = False) -> None:
    """Write a model without the heads that do nothing, in smaller shapes that plain transformers loads."""
    recipe = Recipe().replace(["prune.heads=no-op", *(assignments or [])])
    from sinkquant.cut import cut_heads
    from sinkquant.formats import require_free
    from sinkquant.models import load_tokenizer, open_model, resolve

    require_free(output)
    folder = resolve(model)
    found = SinkMap.load(sink_map) if sink_map else find_sinks(model, text, recipe, trust_remote_code)
    kept = cut_heads(open_model(folder, trust_remote_code=trust_remote_code),
                     load_tokenizer(folder, trust_remote_code), found, output, recipe)
    out.print(f"{len(kept[0])} of {found.model.kv_heads} key-value heads are left in every layer: {output}",
              soft_wrap=True, highlight=False)


@app.command()
def report(folders: Annotated[list[Path], typer.Argument(help="One run's folder, or several to compare.")],
           output: Annotated[Path | None, typer.Option("-o", "--output", help="Where the page goes.")] = None) -> None:
    """Write a run's report again, or a page that compares several runs."""
    from sinkquant.report import comparison, write

    reports = [(str(folder), Report.load(folder / "report.json")) for folder in folders]
    if len(folders) == 1:
        folder = folders[0]
        write(output or folder, reports[0][1], SinkMap.load(folder / "sinkmap.json"), Plan.load(folder / "plan.json"))
        out.print(f"Report: {(output or folder) / 'report.html'}", soft_wrap=True)
        return
    page = write_atomically(output or Path("comparison.html"), comparison(reports))
    out.print(f"Comparison: {page}", soft_wrap=True)


@app.command()
def doctor(model: ModelArgument, text: TextOption = None, trust_remote_code: TrustOption = False) -> None:
    """Audit the tokenization, and say what of a model is supported."""
    from sinkquant.doctor import examine
    from sinkquant.models import load_tokenizer, open_model, resolve

    folder = resolve(model)
    audit = examine(open_model(folder, trust_remote_code=trust_remote_code),
                    load_tokenizer(folder, trust_remote_code), text)
    for title, facts in (("Tokenization", audit.tokenization), ("Support", audit.support)):
        table = Table(title=title, show_header=False, title_justify="left")
        for key, value in facts.items():
            table.add_row(escape(key), escape(value))
        out.print(table)
    for warning in audit.warnings:
        out.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    if not audit.warnings:
        out.print("Nothing to complain about.")


@app.command()
def recipes(action: Annotated[str | None, typer.Argument(help="'show' to print one.")] = None,
            name: Annotated[str | None, typer.Argument(help="The recipe to show.")] = None) -> None:
    """List the packaged recipes, or show one with all its defaults."""
    if action is None:
        for each in recipe_names():
            out.print(f"{each}: {Recipe.load(each).description}", soft_wrap=True, highlight=False)
    elif action == "show" and name:
        print(Recipe.load(name).to_yaml(), end="")
    else:
        raise RequestError("write 'quantize-model recipes' or 'quantize-model recipes show NAME'.")


def _show_sink_map(sink_map: SinkMap) -> None:
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


def _show_plan(made: Plan) -> None:
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


def _show_frontier(found: Frontier, output: Path | None, json: bool) -> None:
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


def _show_report(made: Report) -> None:
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


def _fail(message: str, code: int) -> int:
    err.print(f"quantize-model: {message}", markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
