"""Commands about plans: how one is made, what formats cost, what two decide differently, what protection is worth."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from sinkquant.artifacts import ModelShape, Plan, Sensitivity, SinkMap
from sinkquant.cli.paper import paragraph, table
from sinkquant.cli.parts import (
    EngineOption,
    FullOption,
    JsonOption,
    ModelArgument,
    RecipeOption,
    SensitivityOption,
    SetOption,
    SinkMapOption,
    TextOption,
    TrustOption,
    find_costs,
    find_sinks,
    for_engine,
    for_text,
    kept_or_writable,
    printed,
    shown_progress,
    to_file,
)
from sinkquant.cli.show import show_frontier, show_plan
from sinkquant.errors import RequestError
from sinkquant.models import resolve
from sinkquant.models.on_record import shape_on_record
from sinkquant.recipe import DEFAULT_RECIPE, Recipe

PlanArgument = Annotated[Path, typer.Argument(help="A plan.json, a run's folder, or a quantized checkpoint.")]


def plan(model: ModelArgument,
         recipe: RecipeOption = DEFAULT_RECIPE,
         assignments: SetOption = None, text: TextOption = None, json: JsonOption = False,
         full: FullOption = False,
         sink_map: SinkMapOption = None,
         sensitivity: SensitivityOption = None,
         engine: EngineOption = None,
         frontier: Annotated[bool, typer.Option("--frontier", help="Solve a sweep of budgets: predicted loss against "
                                                "bytes, with uniform plans and the control.")] = False,
         output: Annotated[Path | None, to_file("Write the plan here; with --frontier a "
                                                "page, and its figures as JSON beside it.")] = None,
         types: Annotated[Path | None, to_file("Write the type of every tensor here, as llama-quantize reads them with "
                                               "--tensor-type-file; for recipes with backend=gguf.",
                                               "--tensor-types")] = None,
         trust_remote_code: TrustOption = False) -> None:
    """Decide bits per module, with reasons and exact bytes; quantizes nothing."""
    chosen, folder = for_engine(Recipe.load(recipe).replace(assignments or []), engine), resolve(model)
    if text:
        from sinkquant.models.corpus import text_digest

        text_digest(text, "calibration")  # refuses what cannot be read
        chosen = for_text(chosen, text)
    if types:
        from sinkquant.policy import check_tensor_types

        check_tensor_types(chosen, types)
        if frontier or chosen.prune.blocks is not None:
            raise RequestError("--tensor-types is of one plan of the model as it is; leave out --frontier and "
                               "prune.blocks.")
    if chosen.prune.blocks is not None:
        if frontier:
            raise RequestError("--frontier sweeps budgets of one model, and prune.blocks makes another; drop the "
                               "blocks in a run of its own first.")
        _show(_of_shorter(chosen, model, sink_map, sensitivity, trust_remote_code), output, json, full)
        return
    from sinkquant.policy import check_solvable, make_frontier, make_plan, require_plannable
    from sinkquant.policy.headers import plan_ready

    if frontier and not chosen.budget.solved and (chosen.solves_cache or chosen.solves_inputs):
        raise RequestError("--frontier takes what formats of the weights lose, and kv_cache.bits or activations.bits "
                           "alone asks for nothing of that; leave it out, or name a budget that is solved for.")
    if frontier and output is not None and output.suffix:
        from sinkquant.report.kinds import require_kind

        require_kind(output, (".html", ".json"))
    if frontier or chosen.budget.solved:
        check_solvable(chosen)
    known = SinkMap.load(sink_map) if sink_map else None
    shape = _shape(model, folder, known, trust_remote_code)
    made, _ = plan_ready(shape, chosen, None, known) if sensitivity is None and not frontier else (None, [])
    if made is None or frontier:
        require_plannable(shape, chosen)
    if frontier:
        known = known or find_sinks(model, text, chosen, trust_remote_code)
        lost = find_costs(model, text, known, chosen, sensitivity, trust_remote_code)
        show_frontier(make_frontier(shape, known, chosen, lost), output, json)
        return
    if made is None:
        sinks = known or find_sinks(model, text, chosen, trust_remote_code)
        costs = (find_costs(model, text, sinks, chosen, sensitivity, trust_remote_code)
                 if chosen.needs_sensitivities or sensitivity else None)
        made = make_plan(shape, sinks, chosen, costs)
    _show(made, output, json, full)  # before types, which the plan may turn out to have none of
    said = _write_types(types, made, shape) if types else ""
    if said and not json:
        paragraph(said)


def _shape(model: str, folder: Path, known: SinkMap | None, trust_remote_code: bool) -> ModelShape:
    """The shape of a model: what the sink map keeps of these files, or from a model that is built now."""
    kept = shape_on_record(known, folder, model)
    if kept is not None:
        return kept
    from sinkquant.models import Decoder, open_model
    from sinkquant.models.source import require_unquantized

    decoder = Decoder.of(open_model(folder, trust_remote_code=trust_remote_code))
    require_unquantized(decoder.model)
    return decoder.shape(model)


def _write_types(path: Path, made: Plan, shape: ModelShape) -> str:
    """Write what llama-quantize is told of a plan, and say how."""
    from sinkquant.policy import tensor_types

    found = tensor_types(made, shape)
    path.write_text(found.text(), encoding="utf-8")
    return (f"llama-quantize --tensor-type-file {shlex.quote(str(path))} IN.gguf OUT.gguf {found.most} writes "
            f"{found.bytes:,} bytes of tensors and IN.gguf's header.")


def _of_shorter(recipe: Recipe, model: str, sink_map: Path | None, sensitivity: Path | None,
                trust_remote_code: bool) -> Plan:
    """The plan of a model whose blocks are dropped first, which takes the shorter model, as long as it is made."""
    from sinkquant.run import run

    with tempfile.TemporaryDirectory() as folder, shown_progress() as progress:
        run(recipe, model, Path(folder, "plan"), sink_map=SinkMap.load(sink_map) if sink_map else None,
            sensitivity=sensitivity, plan_only=True, trust_remote_code=trust_remote_code, progress=progress)
        return Plan.load(Path(folder, "plan", "plan.json"))


def _show(made: Plan, output: Path | None, json: bool, full: bool) -> None:
    if not printed(made, json, output):
        show_plan(made, full)


def sensitivity(model: ModelArgument,
                recipe: RecipeOption = DEFAULT_RECIPE,
                assignments: SetOption = None, text: TextOption = None, json: JsonOption = False,
                sink_map: SinkMapOption = None,
                output: Annotated[Path | None, typer.Option(
                    "-o", "--output", dir_okay=False, callback=kept_or_writable,
                    help="Write the sensitivities here, or take them from there.")] = None,
                trust_remote_code: TrustOption = False) -> None:
    """What every format of every linear would lose, through the sinks and through all other tokens."""
    chosen = Recipe.load(recipe).replace(assignments or [])
    from sinkquant.cli.tables.sensitivity import cache_table, ends_in_words, input_table, linear_table, ranking_in_words

    found = SinkMap.load(sink_map) if sink_map else find_sinks(model, text, chosen, trust_remote_code)
    made = find_costs(model, text, found, chosen, output, trust_remote_code)
    if printed(made, json):
        return
    if made.units or not (made.kv or made.inputs):
        table(linear_table(made))
    if made.inputs:
        table(input_table(made))
    if made.kv:
        table(cache_table(made))
    for line in [*ends_in_words(made), *ranking_in_words(made), *(f"Note: {note}" for note in made.notes)]:
        paragraph(line)


def diff(a: PlanArgument, b: PlanArgument,
         sensitivity: Annotated[Path | None, typer.Option(help="Predict both losses from this file; default: what the "
                                                               "plans say.")] = None,
         json: JsonOption = False) -> None:
    """What two plans of one model decide differently, with the bytes and the predicted loss of each decision."""
    from sinkquant.cli.tables.plans import changes, settings, totals
    from sinkquant.policy.difference import compare_plans

    costs = Sensitivity.load(sensitivity) if sensitivity else None
    found = compare_plans(_plan_at(a), _plan_at(b), (str(a), str(b)), costs)
    if printed(found, json):
        return
    table(totals(found))
    if found.modules:
        table(changes(found))
    if found.settings:
        table(settings(found))
    if not found.modules and not found.settings:
        paragraph("The plans decide the same.")


def advise(model: ModelArgument,
           recipe: RecipeOption = DEFAULT_RECIPE,
           assignments: SetOption = None, text: TextOption = None,
           sink_map: SinkMapOption = None,
           engine: EngineOption = None,
           measure: Annotated[bool, typer.Option("--measure", help="Carry out every protection and its control, and "
                                                 "measure both on evaluation text.")] = False,
           only: Annotated[list[str] | None, typer.Option("--only", metavar="NAME", help="Look at this protection; "
                                                          "may be given again. Default: all.")] = None,
           json: JsonOption = False,
           output: Annotated[Path | None, to_file("Write the advice here.")] = None,
           trust_remote_code: TrustOption = False) -> None:
    """What each kind of protection is worth on a model at a recipe's formats: predicted, and measured if asked."""
    chosen = for_engine(Recipe.load(recipe).replace(assignments or []), engine)
    chosen = for_text(chosen, text)
    resolve(model)
    known = SinkMap.load(sink_map) if sink_map else None
    from sinkquant.advise import advise as look
    from sinkquant.cli.tables.plans import advice_table

    with shown_progress() as progress:
        found = look(model, chosen, known, measure=measure, only=only or [], trust_remote_code=trust_remote_code,
                     progress=progress)
    if printed(found, json, output):
        return
    table(advice_table(found))
    for one in found.mechanisms:
        if one.measured is None:
            paragraph(f"{one.name} ({one.applies_to}): {one.sentence}")
    paragraph(found.sentence)
    for note in found.notes:
        paragraph(f"Note: {note}")


def _plan_at(place: Path) -> Plan:
    if not place.is_dir():
        return Plan.load(place)
    if (place / "plan.json").is_file():
        return Plan.load(place / "plan.json")
    from sinkquant.formats import read_checkpoint

    content = read_checkpoint(place)
    if content is None:
        raise RequestError(f"{place} holds no plan; give a plan.json, a run's folder, or a checkpoint that sinkquant "
                           "wrote.")
    found: Plan = content["plan"]
    return found
