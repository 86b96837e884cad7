"""detect -> plan -> quantize -> save -> evaluate -> report: the whole job, one artifact after the other."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from sinkquant.artifacts import Plan, Report, Sensitivity, SinkMap
from sinkquant.artifacts.base import require_writable
from sinkquant.cache.rotary import require_rotary
from sinkquant.evaluate import require_rows, require_tasks_possible
from sinkquant.evaluate.verdict import require_gate
from sinkquant.formats import dismiss, follow, require_free, versions
from sinkquant.models import ActivationStore, Decoder, load_tokenizer, open_model, pick_device, read_text, resolve
from sinkquant.models.corpus import require_two_texts
from sinkquant.models.loading import has_tokenizer
from sinkquant.models.numerics import own_numerics
from sinkquant.models.processes import this_process
from sinkquant.models.source import require_unquantized
from sinkquant.policy import accept_edited, check_recipe, check_same_model, check_solvable, make_plan, require_plannable
from sinkquant.policy.choices import ends_asked, formats_asked
from sinkquant.policy.headers import plan_ready
from sinkquant.policy.kv_scheme import make_kv_scheme
from sinkquant.predict import SENSITIVITIES, Prediction, require_memory, spill_limit, with_seconds
from sinkquant.quantize.ranks import require_one_process
from sinkquant.quantize.trial import require_loads
from sinkquant.recipe import DEFAULT_RECIPE, Recipe
from sinkquant.run.folder import WorkFolder, partial_folder, run_key, work_folder
from sinkquant.run.job import Job, save_plan
from sinkquant.run.planning import with_calibration_notes
from sinkquant.run.shorter import shape_after
from sinkquant.run.stages import Progress
from sinkquant.schemes import DEFAULT_BACKEND
from sinkquant.schemes.packages import require_packages

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


@own_numerics()
def run(recipe: Recipe | str | os.PathLike[str] | None = None, model: str | os.PathLike[str] = "demo",
        output: str | os.PathLike[str] = "out", *, edited: Plan | None = None, sink_map: SinkMap | None = None,
        sensitivity: str | os.PathLike[str] | None = None, plan_only: bool = False, resume: bool = False,
        trust_remote_code: bool = False, progress: Progress | None = None) -> Report | None:
    """Do what a recipe says, from model to report.

    Everything is written into `<output>.partial`, which is renamed at the end. With `resume` that folder is kept when
    the run fails, and a run with the same recipe and model continues after the last finished artifact.

    Args:
        recipe: or the name or file of one; None: the plan's own where one is given, else the default.
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
    if recipe is None and edited is not None:
        recipe = Recipe.parse(edited.recipe, "the recipe in the plan")
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe or DEFAULT_RECIPE)
    target = Path(output)
    require_free(target)
    sensitivity = None if sensitivity is None else Path(os.path.expanduser(sensitivity))
    if sensitivity is not None and not sensitivity.exists():
        require_writable(sensitivity.parent)
    if edited is None:
        check_recipe(recipe)
        if recipe.budget.solved:
            check_solvable(recipe)
    backend = edited.backend if edited else recipe.backend
    if not plan_only:
        require_packages(backend)
        require_gate(recipe)
    require_two_texts(recipe.calibration.text, recipe.evaluate.text)
    folder = resolve(str(model))
    if not plan_only and not has_tokenizer(folder):
        load_tokenizer(folder)  # says what is missing
    decoder = Decoder.of(open_model(folder, trust_remote_code))
    require_unquantized(decoder.model)
    whole = decoder.shape(str(model))
    less = shape_after(decoder, recipe, edited, str(model))
    shape = less or whole
    if edited is None:
        require_plannable(shape, recipe.changed(prune={"blocks": None}))
    else:
        accept_edited(edited, shape)
    require_one_process(recipe, edited)
    if sink_map is not None:
        check_same_model(whole, sink_map)
    ready, asking = plan_ready(shape, recipe, edited, sink_map) if plan_only and sensitivity is None else (None, [])
    # Headers alone are planned from without a tokenizer too.
    tokenizer = None if ready and not has_tokenizer(folder) else load_tokenizer(folder, trust_remote_code)
    if not plan_only:
        asked = edited.formats if edited else formats_asked(shape, recipe)
        ends = edited.ends if edited else ends_asked(shape, recipe)
        kv_scheme = edited.kv_scheme if edited else make_kv_scheme(shape, recipe)
        form = require_loads(decoder, shape, asked, ends, kv_scheme)
        cache = (edited or recipe).kv_cache
        if cache is not None and cache.evict is not None:
            require_rotary(decoder.model)
    pick_device(recipe.compute.device)
    for text in (recipe.calibration.text, *([edited.calibration.text] if edited else [])):
        read_text(text, "calibration", tokenizer)
    read_text(recipe.evaluate.text, "evaluation", tokenizer)
    if not plan_only and not recipe.evaluate.skip:
        require_tasks_possible(recipe, tokenizer, decoder.max_length)
        assert tokenizer is not None
        require_rows(tokenizer, recipe, decoder.max_length, decoder.vocabulary)
    if this_process()[0] > 0:
        # On another node the run's own folder need not be there.
        store = ActivationStore(Path(tempfile.gettempdir()), spill_limit(recipe))
        follow(lambda: open_model(folder, trust_remote_code), tokenizer, store)
        if tokenizer is not None and not (recipe.evaluate.skip or plan_only):
            begun = WorkFolder(partial_folder(target), "")
            Job(recipe, str(model), folder, tokenizer, begun, trust_remote_code, None, Prediction({}),
                 None).evaluate_along()
        return None
    costs_due = not (sensitivity is not None and sensitivity.is_file()) and (
        sensitivity is not None or (recipe.needs_sensitivities and edited is None))
    predicted = require_memory(decoder, recipe, None if not plan_only else () if ready else ("detect", SENSITIVITIES),
                               costs_due)
    key = run_key(recipe, folder, edited, sink_map, DEFAULT_BACKEND if plan_only else backend)
    key += "-plan-only" if plan_only else ""  # it would end with half a checkpoint where a whole run was stopped
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
            save_plan(with_calibration_notes(ready, decoder, tokenizer), sink_map, work)
        else:
            if not plan_only:
                predicted = with_seconds(predicted, decoder, recipe, tokenizer)
                if sink_map is not None and less is None:  # nothing is left to detect in the model itself
                    predicted.seconds.pop("detect", None)
                LOG.info("predicted: %s", ", ".join(f"{stage} {took:.0f} s" for stage, took in
                                                    predicted.seconds.items()))
            job = Job(recipe, str(model), folder, tokenizer, work, trust_remote_code, progress, predicted, sink_map,
                       sensitivity, less is not None)
            report = job.run(edited, plan_only)
        if plan_only or recipe.evaluate.skip:
            dismiss()
    return report
