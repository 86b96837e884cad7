"""A checkpoint, or a run's folder, measured after the fact."""

from __future__ import annotations

from pathlib import Path

import torch

from sinkquant.artifacts import Report, Sensitivity, SinkMap
from sinkquant.evaluate import BASELINE, Candidate, evaluate, forecasts_of_plans, require_tasks_possible
from sinkquant.formats import read_checkpoint, versions
from sinkquant.models import load_model, load_tokenizer, pick_device, resolve
from sinkquant.models.blocks import same_heads
from sinkquant.models.folder import require_baseline
from sinkquant.models.gguf import source_notes
from sinkquant.models.gguf_index import FILE, is_gguf_checkpoint
from sinkquant.models.loading import read_config
from sinkquant.models.steps import Progress
from sinkquant.policy.expected import with_expected_loss
from sinkquant.recipe import Recipe
from sinkquant.run.candidates import comparison, fidelity, loader, reading_notes, sinks_after, stored_size, weight_bytes
from sinkquant.run.folder import CONTROL, MODEL
from sinkquant.run.shorter import WHOLE_MAP


def evaluate_folder(folder: Path, recipe: Recipe, baseline: str | None = None,
                    progress: Progress | None = None, sensitivity: Sensitivity | None = None,
                    trust_remote_code: bool = False) -> Report:
    """Measure a checkpoint, or a run's folder with its control, beside a baseline.

    Args:
        recipe: how to measure; `recorded_recipe` gives the one that the checkpoint was made with.
        baseline: the unquantized model; without it there is neither divergence nor recovery.
        sensitivity: predicts the losses; without it they are those that the checkpoints' plans carry.

    Raises:
        RequestError: the folder holds no checkpoint, or the baseline is quantized.
    """
    places = {"sink_aware": folder / MODEL} | ({"control": folder / CONTROL} if recipe.evaluate.control else {})
    places = {name: path for name, path in places.items() if (path / "config.json").is_file()}
    named = {name: str(path) for name, path in places.items()}
    if not places:
        place = resolve(str(folder))
        content = read_checkpoint(place)
        places = {content["plan"].name if content else "quantized": place}
        named = dict.fromkeys(places, str(folder))
    tokenizer = load_tokenizer(resolve(str(next(iter(places.values())))), trust_remote_code)
    require_tasks_possible(recipe, tokenizer)
    device, dtype = pick_device(recipe.compute.device), getattr(torch, recipe.compute.dtype)
    whole = SinkMap.load(folder / WHOLE_MAP) if (folder / WHOLE_MAP).is_file() else None
    maps: dict[str, SinkMap] = {}
    candidates, original, plans, kept = [], whole, [], None
    notes: list[str] = []
    if baseline is not None:
        source = resolve(baseline)
        require_baseline(source)
        notes = source_notes(source)
        candidates.append(Candidate(BASELINE, baseline, lambda: load_model(source, dtype, device, trust_remote_code),
                                    *stored_size(baseline, source, trust_remote_code)))
    for name, path in places.items():
        content = read_checkpoint(resolve(str(path)))
        original = original or (content["sink_map"] if content else None) or None
        if content and content["sink_map"] and recipe.gate.max_sink_rate_change is not None:
            before: SinkMap | None = maps.get(BASELINE) or whole or content["sink_map"]
            if content["plan"].blocks and whole is None and BASELINE not in maps:  # its own is of the shorter model
                before = None if baseline is None else sinks_after(source, tokenizer, recipe, BASELINE, progress,
                                                                   trust_remote_code)
            if before is not None:
                maps[BASELINE] = before
                maps[name] = sinks_after(path, tokenizer, recipe, name, progress, trust_remote_code)
        if content:
            plan = content["plan"] if sensitivity is None else with_expected_loss(content["plan"], sensitivity)
            kept = plan.blocks.kept if plan.blocks else kept
            plans.append(plan.model_copy(update={"name": name}))
        # A plan knows its bits: counting them on disk may take a library's model.
        size, bits = ((weight_bytes(path), content["plan"].bits_per_weight) if content else
                      stored_size(named[name], path, trust_remote_code))
        candidates.append(Candidate(name, named[name], loader(path, dtype, device, trust_remote_code), size, bits,
                                    content["plan"].kv_cache if content else None,
                                    content["plan"].inputs_in_words() if content else "16-bit"))
    compare, left_out = comparison(tokenizer, original, recipe, kept), []
    if compare is not None and baseline is not None and not all(same_heads(
            read_config(source, trust_remote_code), read_config(path, trust_remote_code), kept)
            for path in places.values()):
        compare, left_out = None, ["Sink fidelity was not measured: the baseline has other numbers of layers or heads."]
    report = evaluate(candidates, tokenizer, recipe, model=baseline or str(folder),
                      fidelity=fidelity(maps) if maps else None, compare=compare, progress=progress)
    verdict = report.verdict.model_copy(update={"details": [*report.verdict.details, *left_out]})
    said = [f"{name}: {note}" for name, place in named.items() for note in reading_notes(place)]
    return report.model_copy(update={"versions": versions(), "verdict": verdict,
                                     "notes": [*notes, *said, *report.notes],
                                     "forecasts": forecasts_of_plans(report.rows, plans)})


def recorded_recipe(folder: Path) -> Recipe:
    """The recipe that a checkpoint, or the checkpoint of a run's folder, was made with; the default where none is
    recorded."""
    inside = next((folder / one for one in (MODEL, CONTROL) if (folder / one / "config.json").is_file()), None)
    # A GGUF file of another maker has none, and is not unpacked to find that out.
    place = inside or (folder.parent if folder.name == FILE and is_gguf_checkpoint(folder.parent) else folder)
    content = read_checkpoint(place)
    return Recipe.parse(content["recipe"], f"the recipe in {place / 'sinkquant.json'}") if content else Recipe()
