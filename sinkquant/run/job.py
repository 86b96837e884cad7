"""One run: its stages, and what makes each artifact from those that are in the run's folder already."""

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
from sinkquant.cache import find_prefix, save_prefix
from sinkquant.detect import detect
from sinkquant.detect.kept_shape import with_shape
from sinkquant.errors import RequestError
from sinkquant.evaluate import BASELINE, Candidate, evaluate, forecasts_of_plans, forecasts_of_run
from sinkquant.formats import KV_PREFIX, dismiss, quantize_to, versions
from sinkquant.models import ActivationStore, Decoder, Walk, cast_model, load_model, open_model, pick_device
from sinkquant.policy import accept_edited, make_control, make_plan
from sinkquant.policy.expected import with_expected_loss
from sinkquant.policy.pruning import pruning_alone
from sinkquant.predict import Prediction, spill_limit
from sinkquant.quantize import quantize
from sinkquant.quantize.ranks import join
from sinkquant.quantize.transforms import rotate
from sinkquant.recipe import Recipe
from sinkquant.run.candidates import (
    bits_on_disk,
    comparison,
    expert_notes,
    fidelity,
    loader,
    mechanisms,
    sinks_after,
    stored_size,
    weight_bytes,
)
from sinkquant.run.folder import CONTROL, MODEL, WorkFolder, peak_resident
from sinkquant.run.planning import with_calibration_notes
from sinkquant.run.shorter import BLOCKS, SHORTER, WHOLE_MAP, dropped, find_blocks, with_blocks, write_shorter
from sinkquant.run.stages import Progress, Stage, carry_out
from sinkquant.sensitivity import find_sensitivity

NAMES = {MODEL: "sink_aware", CONTROL: "control"}
"""What the plans of a run's checkpoints are called."""
UNPREDICTED = ("sensitivities", "choose blocks")
"""Stages that may take long and that nothing predicts; all others without a prediction are short."""
LOG = logging.getLogger("sinkquant")


def save_plan(plan: Plan, sink_map: SinkMap | None, work: WorkFolder) -> None:
    """Write the plan, and the sink map where it is not there yet."""
    if sink_map is not None:
        sink_map.save(work / "sinkmap.json")
    plan.model_copy(update={"name": NAMES[MODEL]}).save(work / "plan.json")  # an edited one may have been a control's
    LOG.info("plan: %.3f bits per weight, %d bytes", plan.bits_per_weight, plan.weight_bytes)


class Job:
    """One run. `stages` lists what it does; every other method makes one artifact from those in the run's folder."""

    def __init__(self, recipe: Recipe, name: str, folder: Path, tokenizer: PreTrainedTokenizerBase,
                 work: WorkFolder, trust_remote_code: bool, progress: Progress | None, predicted: Prediction,
                 known: SinkMap | None, sensitivities: str | os.PathLike[str] | None = None,
                 shorter: bool = False) -> None:
        self.recipe, self.name, self.whole, self.tokenizer, self.work = recipe, name, folder, tokenizer, work
        self.trust_remote_code, self.progress, self.known = trust_remote_code, progress, known
        self.shorter, self.folder = shorter, work / SHORTER if shorter else folder
        self.predicted, self.sensitivities = predicted, sensitivities
        self.base = float(psutil.Process().memory_info().rss)  # bytes that are in memory before any stage
        self.plan_files = {MODEL: "plan.json"}
        if recipe.evaluate.control and not recipe.evaluate.skip:
            self.plan_files[CONTROL] = "plan-control.json"

    def run(self, edited: Plan | None, plan_only: bool) -> Report | None:
        self._require_same_sensitivities()
        if not (plan_only or self.recipe.evaluate.skip) and (self.work / "report.json").is_file():
            dismiss()  # the stage that does it was done by an earlier attempt
        carry_out(self.stages(edited, plan_only), self.work, self.progress)
        if plan_only:
            return None
        if self.recipe.evaluate.skip:
            LOG.info("not evaluated: %s", self.resources(Plan.load(self.work / "plan.json")))
            return None
        return Report.load(self.work / "report.json")

    def stages(self, edited: Plan | None, plan_only: bool) -> list[Stage]:
        """What is to be done, in its order."""
        measured = self.sensitivities is not None or (self.recipe.needs_sensitivities and not edited)
        costs = ("sensitivity.json",) if measured else ()
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
        return Stage(name, inputs, outputs, run, self.predicted.seconds.get(name, None if name in UNPREDICTED else 0.0))

    def _require_same_sensitivities(self) -> None:
        """Raises RequestError where an attempt that is resumed has planned with others than those of the file."""
        if self.sensitivities is None:
            return
        given, used = Path(self.sensitivities), self.work / "sensitivity.json"
        another = given.is_file() and used.is_file() and Sensitivity.load(given) != Sensitivity.load(used)
        if another or ((self.work / "plan.json").is_file() and not used.is_file()):
            raise RequestError(f"{self.work.path} was planned with other sensitivities than those of {given}; remove "
                               "it or run without --resume.")

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
        model = self.load()
        found = detect(model, self.tokenizer, recipe=self.recipe, name=self.name, progress=self.progress)
        with_shape(found, model).save(self.work / "sinkmap.json")
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
        save_plan(self.with_blocks(aware, sink_map), None, self.work)
        if CONTROL in self.plan_files and not plan_only:
            control = make_control(shape, sink_map, recipe, aware, costs)
            self.with_blocks(control, sink_map).save(self.work / self.plan_files[CONTROL])

    def with_blocks(self, one: Plan, sink_map: SinkMap) -> Plan:
        """The plan with the blocks that were dropped before, if any."""
        return with_blocks(one, self.work.path, self.recipe).made_from(sink_map) if self.shorter else one

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
            compute, decoder = self.recipe.compute, Decoder.of(self.load())
            rotate(decoder, one)
            save_prefix(find_prefix(Walk(decoder, torch.tensor([one.kv_cache.prefix]), 1, pick_device(compute.device),
                                         getattr(torch, compute.dtype))), path)

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
            *stored_size(self.name, self.whole))]
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
        return cast_model(model, pick_device(compute.device), getattr(torch, compute.dtype))

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
