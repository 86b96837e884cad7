"""detect -> plan -> quantize -> save -> evaluate -> report: the whole job, one artifact after the other."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Plan, Report, Sensitivity, SinkMap
from sinkquant.cache import make_prefix, save_prefix
from sinkquant.detect import detect
from sinkquant.evaluate import (
    BASELINE,
    Candidate,
    evaluate,
    forecasts_of_plans,
    forecasts_of_run,
    require_tasks_possible,
)
from sinkquant.formats import (
    KV_PREFIX,
    dismiss,
    follow,
    quantize_to,
    require_free,
    versions,
)
from sinkquant.models import (
    ActivationStore,
    Decoder,
    load_model,
    load_tokenizer,
    open_model,
    pick_device,
    read_text,
    resolve,
)
from sinkquant.models.corpus import require_two_texts
from sinkquant.models.loading import has_tokenizer
from sinkquant.models.processes import this_process
from sinkquant.policy import (
    accept_edited,
    check_recipe,
    check_same_model,
    check_solvable,
    make_control,
    make_plan,
    require_distill,
    require_plannable,
    require_transforms,
)
from sinkquant.policy.expected import with_expected_loss
from sinkquant.policy.plan import formats_asked
from sinkquant.policy.pruning import pruning_alone
from sinkquant.predict import SENSITIVITIES, Prediction, require_memory, spill_limit, with_seconds
from sinkquant.quantize import quantize
from sinkquant.quantize.ranks import join, require_one_process
from sinkquant.quantize.transforms import rotate
from sinkquant.quantize.trial import require_loads
from sinkquant.recipe import DEFAULT_RECIPE, Recipe
from sinkquant.run.candidates import (
    bits_on_disk,
    comparison,
    expert_notes,
    fidelity,
    loader,
    mechanisms,
    sinks_after,
    weight_bytes,
)
from sinkquant.run.folder import CONTROL, MODEL, WorkFolder, partial_folder, peak_resident, run_key, work_folder
from sinkquant.run.planning import plan_ready, with_calibration_notes
from sinkquant.run.shorter import (
    BLOCKS,
    SHORTER,
    WHOLE_MAP,
    dropped,
    find_blocks,
    shape_after,
    with_blocks,
    write_shorter,
)
from sinkquant.run.stages import Progress, Stage, carry_out
from sinkquant.schemes.packages import require_packages
from sinkquant.sensitivity import find_sensitivity

NAMES = {MODEL: "sink_aware", CONTROL: "control"}
"""What the plans of a run's checkpoints are called."""
LOG = logging.getLogger("sinkquant")


def plan(model: PreTrainedModel, sink_map: SinkMap, recipe: Recipe | None = None,
         sensitivity: Sensitivity | None = None) -> Plan:
    """The sink-aware plan of a model in memory.

    Args:
        sensitivity: from `find_sensitivity`; a budget that is solved for needs it.

    Raises:
        RequestError: the sink map is of another model, or the recipe does not fit it.
    """
    return make_plan(Decoder.of(model).shape(sink_map.model.name), sink_map, recipe or Recipe.load(DEFAULT_RECIPE),
                     sensitivity)


def run(recipe: Recipe | str | os.PathLike[str] = DEFAULT_RECIPE, model: str | os.PathLike[str] = "demo",
        output: str | os.PathLike[str] = "out", *, edited: Plan | None = None, sink_map: SinkMap | None = None,
        sensitivity: str | os.PathLike[str] | None = None, plan_only: bool = False, resume: bool = False,
        trust_remote_code: bool = False, progress: Progress | None = None) -> Report | None:
    """Do what a recipe says, from model to report.

    Everything is written into `<output>.partial`, which is renamed at the end. With `resume` that folder is kept when
    the run fails, and a run with the same recipe and model continues after the last finished artifact.

    Args:
        edited: a plan to carry out instead of the one that the recipe would give; its sizes are counted anew.
        sink_map: of this model, made before; without it the sinks are detected.
        sensitivity: a file to take sensitivities from, or to write them to; a plan that is solved for needs them, and
            any other predicts its loss.
        plan_only: stop before anything is quantized. Where the plan takes nothing from detection, because of what the
            recipe asks or because it or the sink map is given, headers and configuration are all that is read.

    Returns:
        the report; None with `plan_only`, and with `evaluate.skip`, which stops after the checkpoint.

    Raises:
        RequestError: the request is wrong; found before any compute is spent where that is possible.
        SinkquantError: the work failed.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    target = Path(output)
    require_free(target)
    if edited is None:
        check_recipe(recipe)
        if recipe.budget.solved:
            check_solvable(recipe)
    if not plan_only:
        require_packages(edited.backend if edited else recipe.backend)
    require_two_texts(recipe.calibration.text, recipe.evaluate.text)
    folder = resolve(str(model))
    if not plan_only and not has_tokenizer(folder):
        load_tokenizer(folder)  # says what is missing
    decoder = Decoder.of(open_model(folder, trust_remote_code))
    whole = decoder.shape(str(model))
    less = shape_after(decoder, recipe, edited, str(model))
    shape = less or whole
    if edited is None:
        asked_of_blocks = recipe.changed(prune={"blocks": None})
        require_transforms(shape, asked_of_blocks)
        require_distill(shape, asked_of_blocks)
        require_plannable(shape, asked_of_blocks)
    require_one_process(edited.calibration.distill if edited else recipe.weights.distill)
    if sink_map is not None:
        check_same_model(whole, sink_map)
    ready, asking = plan_ready(shape, recipe, edited, sink_map) if plan_only and sensitivity is None else (None, [])
    # Headers alone are planned from without a tokenizer too.
    tokenizer = None if ready and not has_tokenizer(folder) else load_tokenizer(folder, trust_remote_code)
    if not plan_only:
        asked = edited.formats if edited else formats_asked(shape, recipe)
        form = require_loads(decoder, shape, {name: asked[name] for name in asked if name in shape.linears})
    pick_device(recipe.compute.device)
    read_text(recipe.calibration.text, "calibration", tokenizer)
    read_text(recipe.evaluate.text, "evaluation", tokenizer)
    if not plan_only and not recipe.evaluate.skip:
        require_tasks_possible(recipe, tokenizer)
    if this_process()[0] > 0:
        follow(lambda: open_model(folder, trust_remote_code), tokenizer)
        if tokenizer is not None and not (recipe.evaluate.skip or plan_only):
            begun = WorkFolder(partial_folder(target), "")
            _Job(recipe, str(model), folder, tokenizer, begun, trust_remote_code, None, Prediction({}),
                 None).evaluate_along()
        return None
    costs_due = not (sensitivity is not None and Path(sensitivity).is_file()) and (
        sensitivity is not None or (recipe.budget.solved and edited is None))
    predicted = require_memory(decoder, recipe, None if not plan_only else () if ready else ("detect", SENSITIVITIES),
                               costs_due)
    key = run_key(recipe, folder, edited.to_json() if edited else None, sink_map.to_json() if sink_map else None)
    with work_folder(target, key, resume) as work:
        LOG.info("recipe %s, model %s, %s", recipe.name, folder, versions())
        LOG.info("predicted: %.2f GB of memory above what is loaded (%s)", predicted.peak / 1e9, ", ".join(
            f"{stage} {size / 1e9:.2f}" for stage, size in predicted.peak_bytes.items()))
        if not plan_only:
            LOG.info("the checkpoint's form on a tiny model of this class: %s", form)
        report = None
        if plan_only and ready is None:
            LOG.info("detects the sinks first, for %s", ", ".join(asking))
        if ready is not None or tokenizer is None:
            assert ready is not None
            LOG.info("planned from headers and configuration alone")
            _save(with_calibration_notes(ready, decoder, tokenizer), sink_map, work)
        else:
            if not plan_only:
                predicted = with_seconds(predicted, decoder, recipe, tokenizer)
                if sink_map is not None and less is None:  # nothing is left to detect in the model itself
                    predicted.seconds.pop("detect", None)
                LOG.info("predicted: %s", ", ".join(f"{stage} {took:.0f} s" for stage, took in
                                                    predicted.seconds.items()))
            job = _Job(recipe, str(model), folder, tokenizer, work, trust_remote_code, progress, predicted, sink_map,
                       sensitivity, less is not None)
            report = job.run(edited, plan_only)
        if plan_only or recipe.evaluate.skip:
            dismiss()
    return report


def _save(plan: Plan, sink_map: SinkMap | None, work: WorkFolder) -> None:
    """Write the plan, and the sink map where it is not there yet."""
    if sink_map is not None:
        sink_map.save(work / "sinkmap.json")
    plan.save(work / "plan.json")
    LOG.info("plan: %.3f bits per weight, %d bytes", plan.bits_per_weight, plan.weight_bytes)


class _Job:
    """One run. `stages` lists what it does; every other method makes one artifact from those in the run's folder."""

    def __init__(self, recipe: Recipe, name: str, folder: Path, tokenizer: PreTrainedTokenizerBase,
                 work: WorkFolder, trust_remote_code: bool, progress: Progress | None, predicted: Prediction,
                 known: SinkMap | None, sensitivities: str | os.PathLike[str] | None = None,
                 shorter: bool = False) -> None:
        self.recipe, self.name, self.whole, self.tokenizer, self.work = recipe, name, folder, tokenizer, work
        self.trust_remote_code, self.progress, self.known = trust_remote_code, progress, known
        self.shorter, self.folder = shorter, work / SHORTER if shorter else folder
        self.predicted, self.base, self.sensitivities = predicted, _resident(), sensitivities
        self.plan_files = {MODEL: "plan.json"}
        if recipe.evaluate.control and not recipe.evaluate.skip:
            self.plan_files[CONTROL] = "plan-control.json"

    def run(self, edited: Plan | None, plan_only: bool) -> Report | None:
        carry_out(self.stages(edited, plan_only), self.work, self.progress)
        if plan_only:
            return None
        if self.recipe.evaluate.skip:
            LOG.info("not evaluated: %s", self.resources(Plan.load(self.work / "plan.json")))
            return None
        return Report.load(self.work / "report.json")

    def stages(self, edited: Plan | None, plan_only: bool) -> list[Stage]:
        """What is to be done, in its order."""
        costs = ("sensitivity.json",) if self.sensitivities is not None or (self.recipe.budget.solved and not edited) \
            else ()
        found: list[Stage] = []
        first: tuple[str, ...] = ()
        if self.shorter:
            first = (SHORTER,)
            found.append(self.stage("choose blocks", (), (WHOLE_MAP, BLOCKS), partial(self.choose, edited)))
            found.append(self.stage("drop blocks", (BLOCKS,), first, self.drop))
        found.append(self.stage("detect", first, ("sinkmap.json",), self.sink_map))
        if costs:
            found.append(self.stage("sensitivities", ("sinkmap.json",), costs, self.sensitivity))
        files = ("plan.json",) if plan_only else tuple(self.plan_files.values())
        found.append(self.stage("plan", ("sinkmap.json", *costs), files, partial(self.plan, edited, plan_only,
                                                                                 bool(costs))))
        if plan_only:
            return found
        for place, file in self.plan_files.items():
            name = NAMES[place]
            found.append(self.stage(f"quantize {name}", ("sinkmap.json", file), (place,),
                                    partial(self.checkpoint, place)))
            if edited is not None or (self.recipe.kv_cache is not None and self.recipe.kv_cache.prefix != "none"):
                found.append(self.stage(f"prefix {name}", (file, place), (), partial(self.prefix, place)))
            if not self.recipe.evaluate.skip:
                found.append(self.stage(f"detect {name}", (place,), (f"sinkmap-{name}.json",),
                                        partial(self.look_again, place, name)))
        if not self.recipe.evaluate.skip:
            made = (*(f"sinkmap-{NAMES[place]}.json" for place in self.plan_files), *self.plan_files)
            found.append(self.stage("evaluate", ("sinkmap.json", *files, *made), ("report.json",), self.report))
            found.append(self.stage("report", ("report.json", "plan.json"), (), self.write))
        return found

    def stage(self, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], run: Callable[[], object]) -> Stage:
        return Stage(name, inputs, outputs, run, self.predicted.seconds.get(name))

    def evaluate_along(self) -> None:
        """Share the evaluation of the first process, once its checkpoints are there; it may have been done before."""
        if not (self.work / "report.json").is_file():
            self.evaluate()

    def load(self) -> PreTrainedModel:
        return open_model(self.folder, trust_remote_code=self.trust_remote_code)

    def choose(self, edited: Plan | None) -> None:
        find_blocks(self.whole, self.tokenizer, self.recipe, self.name, self.known, edited, self.work.path,
                    self.trust_remote_code, self.progress)
        LOG.info("%s", dropped(self.work.path).in_words())

    def drop(self) -> None:
        write_shorter(self.whole, self.tokenizer, self.work.path, self.trust_remote_code)

    def sink_map(self) -> None:
        if self.known is not None and not self.shorter:
            self.known.save(self.work / "sinkmap.json")
            return
        found = detect(self.load(), self.tokenizer, recipe=self.recipe, name=self.name, progress=self.progress)
        found.save(self.work / "sinkmap.json")
        LOG.info("detect: sink rate %s, %d sink tokens", found.sink_rate, len(found.tokens))

    def sensitivity(self) -> None:
        """What formats cost: from the file that was named, or measured now."""
        found = find_sensitivity(self.load(), self.tokenizer, SinkMap.load(self.work / "sinkmap.json"), self.recipe,
                                 self.sensitivities or self.work / "sensitivity.json",
                                 ActivationStore(self.work.path, spill_limit(self.recipe)), self.progress)
        if self.sensitivities:
            found.save(self.work / "sensitivity.json")

    def plan(self, edited: Plan | None, plan_only: bool, costly: bool) -> None:
        """The plan, and that of the control of the same size."""
        decoder, sink_map = Decoder.of(self.load()), SinkMap.load(self.work / "sinkmap.json")
        shape = decoder.shape(self.name)
        costs = Sensitivity.load(self.work / "sensitivity.json") if costly else None
        recipe = self.recipe.changed(prune={"blocks": None})
        aware = (accept_edited(edited, shape).made_from(sink_map) if edited else
                 make_plan(shape, sink_map, recipe, costs))
        if edited and costs is not None:
            aware = with_expected_loss(aware, costs)
        aware = with_calibration_notes(aware, decoder, self.tokenizer)
        control = make_control(shape, sink_map, recipe, aware, costs) if (
            CONTROL in self.plan_files and not plan_only) else None
        if self.shorter:
            aware = with_blocks(aware, self.work.path, self.recipe).made_from(sink_map)
            control = control and with_blocks(control, self.work.path, self.recipe).made_from(sink_map)
        _save(aware, None, self.work)
        if control is not None:
            control.save(self.work / self.plan_files[CONTROL])

    def plans(self) -> dict[str, Plan]:
        return {place: Plan.load(self.work / file) for place, file in self.plan_files.items()}

    def checkpoint(self, place: str) -> None:
        one, compute = Plan.load(self.work / self.plan_files[place]), self.recipe.compute
        join()
        quantize_to(self.work / place, self.load(), one, self.tokenizer, SinkMap.load(self.work / "sinkmap.json"),
                    self.recipe, pick_device(compute.device), getattr(torch, compute.dtype),
                    ActivationStore(self.work.path, spill_limit(self.recipe)), self.progress,
                    open_model(self.whole, self.trust_remote_code) if self.shorter else None)
        LOG.info("%s: %d bytes written, %d predicted", place, weight_bytes(self.work / place), one.weight_bytes)

    def prefix(self, place: str) -> None:
        """The keys and values of the plan's prefix, by the unquantized model, rotated as the plan says, into the
        checkpoint."""
        one, path = Plan.load(self.work / self.plan_files[place]), self.work / place / KV_PREFIX
        if one.kv_cache is not None and one.kv_cache.prefix and not path.is_file():
            dtype = getattr(torch, self.recipe.compute.dtype)
            # Rotated in its own dtype, so that the embeddings are those of the checkpoint.
            model = load_model(self.folder, "auto" if one.rotation else dtype, "cpu", self.trust_remote_code)
            rotate(Decoder.of(model), one)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
            save_prefix(make_prefix(model, one.kv_cache.prefix), path)

    def look_again(self, place: str, name: str) -> None:
        """The sinks of a quantized checkpoint, without the ablations."""
        found = sinks_after(self.work / place, self.tokenizer, self.recipe, name, self.progress,
                            self.trust_remote_code)
        found.save(self.work / f"sinkmap-{name}.json")

    def report(self) -> None:
        """Evaluate, with the processes that wait for it."""
        dismiss()
        self.evaluate().save(self.work / "report.json")

    def write(self) -> None:
        """The report with what the run took, as files to read."""
        from sinkquant.report import write  # matplotlib

        report, plans = Report.load(self.work / "report.json"), self.plans()
        used = self.resources(plans[MODEL])
        forecasts = [*forecasts_of_plans(report.rows, list(plans.values())), *forecasts_of_run(used)]
        write(self.work.path, report.model_copy(update={"resources": used, "forecasts": forecasts}),
              SinkMap.load(self.work / "sinkmap.json"), plans[MODEL],
              SinkMap.load(self.work / f"sinkmap-{NAMES[MODEL]}.json"))

    def evaluate(self) -> Report:
        plans = self.plans()
        sink_map = SinkMap.load(self.work / (WHOLE_MAP if self.shorter else "sinkmap.json"))
        after = {one.name: SinkMap.load(self.work / f"sinkmap-{NAMES[place]}.json") for place, one in plans.items()}
        device, dtype = pick_device(self.recipe.compute.device), getattr(torch, self.recipe.compute.dtype)
        candidates = [Candidate(
            BASELINE, self.name, lambda: load_model(self.whole, dtype, device, self.trust_remote_code),
            weight_bytes(self.whole), bits_on_disk(self.whole))]
        for place, one in plans.items():
            candidates.append(Candidate(one.name, place, loader(self.work / place, dtype, device,
                                                                 self.trust_remote_code),
                                        weight_bytes(self.work / place), one.bits_per_weight, one.kv_cache,
                                        one.inputs_in_words()))
        done = plans[MODEL].modules.values()
        zeros = bool(plans[MODEL].silenced_heads) or any(d.prune is not None for d in done)
        less, packed = zeros or self.shorter, any(d.bits < 16 for d in done)
        if less and packed:  # blocks alone are the same in both
            candidates += self.pruned(list(plans.values()) if zeros else [plans[MODEL]])
        if plans[MODEL].kv_cache is not None and (less or packed):
            base = candidates[0] if not self.shorter else replace(
                candidates[0], load=lambda: load_model(self.folder, dtype, device, self.trust_remote_code),
                weight_bytes=weight_bytes(self.folder), bits_per_weight=bits_on_disk(self.folder))
            candidates += mechanisms([base, *candidates[1:1 + len(plans)]], list(plans.values()), self.tokenizer)
        kept = dropped(self.work.path).kept if self.shorter else None
        report = evaluate(candidates, self.tokenizer, self.recipe, model=self.name,
                          fidelity=fidelity({BASELINE: sink_map} | after),
                          compare=comparison(self.tokenizer, sink_map, self.recipe, kept), progress=self.progress)
        LOG.info("verdict: %s", report.verdict.sentence)
        notes = [note for one in plans.values() for note in one.notes]
        notes += [note for place, one in plans.items() for note in expert_notes(self.work / place, one)]
        return report.model_copy(update={
            "versions": versions(plans[MODEL].backend),
            "notes": list(dict.fromkeys([*sink_map.notes, *notes, *report.notes]))})

    def pruned(self, plans: list[Plan]) -> list[Candidate]:
        """Rows for the pruning alone, beside its control where there is one; measured by divergence only."""
        shape = Decoder.of(self.load()).shape(self.name)
        rows = []
        for one, name in zip(plans, ("pruned", "pruned_control"), strict=False):
            alone = pruning_alone(one, shape)
            rows.append(Candidate(name, self.name, partial(self.carried_out, alone), alone.weight_bytes,
                                  alone.bits_per_weight, tasks_too=False))
        return rows

    def carried_out(self, one: Plan) -> PreTrainedModel:
        """The model after a plan, in memory; its weights are rounded as a checkpoint would hold them."""
        compute = self.recipe.compute
        model = load_model(self.folder, trust_remote_code=self.trust_remote_code)
        quantize(model, one, self.tokenizer, compute.device, compute.dtype)
        return model.to(pick_device(compute.device), getattr(torch, compute.dtype))

    def resources(self, aware: Plan) -> dict[str, float]:
        """Seconds per stage over all attempts, those of processors in this one, the peak of this process until its end,
        and time and memory as they were predicted; bytes of the checkpoint as they were predicted."""
        peaks = {f"peak resident bytes: {stage}": size for stage, size in self.work.peaks.items()}
        memory = {f"predicted peak resident bytes: {stage}": self.base + size
                  for stage, size in self.predicted.peak_bytes.items()}
        seconds = {f"seconds: {stage}": taken for stage, taken in self.work.seconds.items()}
        predicted = {f"predicted seconds: {stage}": taken for stage, taken in self.predicted.seconds.items()}
        processor = {f"processor seconds: {stage}": spent for stage, spent in self.work.processor.items()}
        return seconds | processor | predicted | peaks | memory | {
            "peak resident bytes": peak_resident(), "predicted peak resident bytes": self.base + self.predicted.peak,
            "bytes predicted": float(aware.weight_bytes)}


def _resident() -> float:
    """Bytes that this process has in memory now."""
    return float(psutil.Process().memory_info().rss)
