"""Sensitivities of a model: the key that says what they are of, the cheap estimate, and the measured one beside it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import FormatLoss, KVCachePlan, KVLoss, Ranking, Sensitivity, SinkMap, Terms, UnitSensitivity
from sinkquant.artifacts.base import require_writable
from sinkquant.artifacts.kv import packed_tokens
from sinkquant.cache import make_prefix, needs_bases, prepare
from sinkquant.cache.bases import ROWS
from sinkquant.errors import RequestError
from sinkquant.models import (
    ActivationStore,
    Decoder,
    Walk,
    cast_model,
    load_model,
    pick_device,
    read_text,
    require_dense,
    starts_with_bos,
    token_rows,
)
from sinkquant.models.numerics import own_numerics
from sinkquant.models.source import runs_own_code
from sinkquant.models.steps import Progress
from sinkquant.policy.calibration import calibration_of
from sinkquant.policy.kv_cache import make_kv_plan
from sinkquant.quantize.bases import cache_bases
from sinkquant.quantize.rows import text_rows
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe
from sinkquant.sensitivity.candidates import Unit, units_of
from sinkquant.sensitivity.ends import end_candidates
from sinkquant.sensitivity.estimate import estimate
from sinkquant.sensitivity.inputs import InputUnit, input_losses, input_units
from sinkquant.sensitivity.kv import exact_places, kv_losses, measured_kv, own_prefix
from sinkquant.sensitivity.measure import measure
from sinkquant.sinks import SinkSelector

LATER = ("bits", "ignore", "overrides", "descent", "tune", "distill")
"""What a recipe says of weights that no candidate is tried with."""
SCORED = "rows of their own, and what a row's tokens share"
"""How losses are taken, for files of another way not to be read."""
SAMPLED = 8
"""Rows of a weight matrix that tell it from another one."""


@own_numerics()
def find_sensitivity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sink_map: SinkMap, recipe: Recipe,
                     cache: str | os.PathLike[str] | None = None, store: ActivationStore | None = None,
                     progress: Progress | None = None) -> Sensitivity:
    """What every linear would cost in every candidate format, and every head of the KV cache where the recipe tries
    any, and every input where `activations.bits` is to be met; the cache or inputs alone where nothing else is.

    Args:
        cache: a file; read where it holds the sensitivities of this very request, else written.
        store: where hidden states live; RAM by default.

    Raises:
        RequestError: the calibration text is too short, `cache` holds those of another model, text or recipe, or it
            cannot be written.
        SinkquantError: hidden states or Hessians are not finite.
    """
    decoder, settings = Decoder.of(model), recipe.sensitivity
    require_dense(model)
    rows = _rows(decoder, tokenizer, recipe, settings.rows, "length")
    units = units_of(decoder, recipe, sink_map) if recipe.tries_weights else []
    of_inputs = input_units(decoder, recipe, sink_map) if recipe.solves_inputs else []
    kv = _cache_plan(decoder, sink_map, recipe) if recipe.kv_tried else None
    calibration = calibration_of(recipe, sink_map)
    # All of them now: a text too short is refused before anything is computed.
    measured_rows = kv_rows = bases_rows = rows[:0]
    if settings.measure_rows and units:
        measured_rows = _rows(decoder, tokenizer, recipe, settings.measure_rows, "measure_length")
    if kv is not None:
        kv_rows = _rows(decoder, tokenizer, recipe, settings.kv_rows, "kv_length")
    if needs_bases(kv):
        bases_rows = text_rows(decoder, calibration, tokenizer, ROWS)
    key = _key(decoder, [rows, kv_rows, bases_rows], sink_map, recipe, units, of_inputs, kv)
    cache = None if cache is None else Path(os.path.expanduser(cache))
    if cache is not None and cache.is_file():
        kept = Sensitivity.load(cache)
        if kept.key != key:
            raise RequestError(f"{cache} holds the sensitivities of another model, text or recipe; name another file.")
        return kept
    if cache is not None and not cache.exists():  # devices and pipes are written to as they are
        require_writable(cache.parent)
    weights = TokenWeights(rows, calibration)
    sinks = sink_places(rows, sink_map)
    device, dtype = pick_device(recipe.compute.device), getattr(torch, recipe.compute.dtype)
    def walk() -> Walk:
        return Walk(decoder, rows, settings.batch_size, device, dtype, store=store)

    ends = end_candidates(decoder.shape(""), recipe)
    found, of_ends = estimate(walk(), units, sinks, weights, recipe, ends, progress) if units else ([], [])
    rounded = input_losses(walk(), of_inputs, sinks, weights, recipe, progress) if of_inputs else []
    notes = [f"the calibration text holds {len(some)} rows of {some.shape[1]} tokens for the sensitivities{what}; "
             f"{asked} were asked for" for some, asked, what in ((rows, settings.rows, ""),
                                                                 (kv_rows, settings.kv_rows, " of the KV cache"))
             if 0 < len(some) < asked]
    made = Sensitivity(
        key=key, model=sink_map.model.name, rows=len(rows), length=rows.shape[1],
        sinks=[token.text or f"position {token.position}" for token in sink_map.placed],
        sink_positions=float(sinks.sum(1).double().mean()), units=found, ends=of_ends, inputs=rounded, notes=notes)
    if len(measured_rows):
        made = _measured(made, decoder, measured_rows, sink_map, weights, recipe, progress)
    if kv is not None:
        made = _with_cache(made, kv, decoder, tokenizer, kv_rows, sink_map, recipe, store, progress)
    if cache is not None:
        made.save(cache)
    return made


def _rows(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, count: int,
          key: str) -> torch.Tensor:
    """Rows of the calibration text, int64 [rows, length]. key: that the section `sensitivity` has their length under.

    Raises:
        RequestError: the text is shorter than one row.
    """
    text = read_text(recipe.calibration.text, "calibration", tokenizer)
    return token_rows(tokenizer, text, count, min(getattr(recipe.sensitivity, key), decoder.max_length),
                      recipe.calibration.bos, decoder.vocabulary, key=f"sensitivity.{key}")


def _key(decoder: Decoder, texts: Sequence[torch.Tensor], sink_map: SinkMap, recipe: Recipe, units: list[Unit],
         inputs: Sequence[InputUnit], kv: KVCachePlan | None) -> str:
    """A hash of all that decides sensitivities: some rows of every weight matrix, the shapes, the text's rows, the
    sinks, and the recipe's part in it."""
    of_cache = set() if recipe.kv_tried else {"kv_bits", "kv_rows", "kv_length", "kv_repeated"}
    asked = recipe.sensitivity.model_dump(mode="json", exclude={"score"} | of_cache)
    cache = recipe.kv_cache if recipe.kv_tried else None
    # With bits of its own, the cache's length decides window and groups.
    free = {"key_bits", "value_bits", "overrides"} | ({"length"} if not recipe.solves_cache else set())
    kept = None if cache is None or kv is None else [cache.model_dump(mode="json", exclude=free), kv.prefix]
    beside = [[unit.modules, one.columns, one.scalars] for unit in units
              for one in unit.candidates if one.columns or one.scalars]
    storages = sorted({one.storage for unit in units for one in unit.candidates})
    of_inputs = [[one.unit.modules, [[option.name, option.scale] for option in one.options]] for one in inputs]
    parts = [asked, kept, beside, storages, of_inputs, SCORED,
             recipe.weights.model_dump(mode="json", exclude=set(LATER)),
             recipe.protect.model_dump(mode="json", include={"tokens", "statistics", "sink_weight"}),
             recipe.compute.dtype, recipe.seed, [token.model_dump(mode="json") for token in sink_map.placed],
             decoder.shape("").model_dump(mode="json", include={"architecture", "dtype", "linears", "tensors"})]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for rows in texts:
        digest.update(rows.numpy().tobytes())
    fused = dict.fromkeys(part.parameter for part in decoder.experts.values())
    for name in [*(f"{linear}.weight" for linear in decoder.linears), *fused]:
        digest.update(_sample(decoder, name).float().numpy().tobytes())
    return digest.hexdigest()


def _sample(decoder: Decoder, name: str) -> torch.Tensor:
    """A few rows of a weight matrix, from memory or from disk; none of one that is stored in another form."""
    weight = decoder.model.get_parameter(name)
    ids = torch.arange(0, len(weight), max(1, len(weight) // SAMPLED))
    if decoder.source is None or not weight.is_meta:
        return weight.data[ids.to(weight.device)].cpu()
    stored = decoder.source.stored(name)
    return torch.empty(0) if stored is None else stored.pick(ids).to(weight.dtype)


def _measured(made: Sensitivity, decoder: Decoder, rows: torch.Tensor, sink_map: SinkMap, weights: TokenWeights,
              recipe: Recipe, progress: Progress | None) -> Sensitivity:
    """The same with every candidate measured on rows of their own, and how the two rank."""
    source = decoder.source
    if source is not None:
        decoder = Decoder.of(load_model(source.folder, trust_remote_code=runs_own_code(decoder.model)))
    units = units_of(decoder, recipe, sink_map)
    terms = measure(decoder, units, rows, sink_places(rows, sink_map), weights, recipe, progress)
    measured = [unit.model_copy(update={"losses": [
        loss.model_copy(update={"measured": found}) for loss, found in zip(unit.losses, ones, strict=True)]})
        for unit, ones in zip(made.units, terms, strict=True)]
    return made.model_copy(update={"units": measured, "ranking": ranking(measured)})


def _cache_plan(decoder: Decoder, sink_map: SinkMap, recipe: Recipe) -> KVCachePlan:
    """The cache whose heads have losses.

    Raises:
        RequestError: the recipe has no KV cache, or nothing of it is packed, in rows so short or at all.
    """
    plan = make_kv_plan(decoder.shape(""), sink_map, recipe)
    if plan is None:
        raise RequestError("sensitivity.kv_bits asks for losses of a packed KV cache, and the recipe has no section "
                           "kv_cache; add one, or leave kv_bits out.")
    if not any(layer.packed for layer in plan.layers):
        raise RequestError(f"the KV cache has no sensitivities: {plan.reason}; lower kv_cache.window, or leave "
                           "sensitivity.kv_bits out.")
    length = min(recipe.sensitivity.kv_length, decoder.max_length)
    if packed_tokens(length - 1, plan.window, plan.group_size) == 0:
        raise RequestError(f"nothing of a row of {length} tokens is packed with kv_cache.window {plan.window} and "
                           f"groups of {plan.group_size}; raise sensitivity.kv_length or lower the window.")
    return plan


def _with_cache(made: Sensitivity, plan: KVCachePlan, decoder: Decoder, tokenizer: PreTrainedTokenizerBase,
                rows: torch.Tensor, sink_map: SinkMap, recipe: Recipe, store: ActivationStore | None,
                progress: Progress | None) -> Sensitivity:
    """The same with the losses of the KV cache's heads."""
    settings = recipe.sensitivity
    kept = SinkSelector.of(token for token in sink_map.tokens if plan.exact != "massive" or token.massive)
    device, dtype = pick_device(recipe.compute.device), getattr(torch, recipe.compute.dtype)
    bases = cache_bases(decoder, plan, calibration_of(recipe, sink_map), tokenizer, device, dtype, store)

    def lost(rows: torch.Tensor) -> list[KVLoss]:
        walk = Walk(decoder, rows, settings.kv_batch, device, dtype, store=store)
        return kv_losses(walk, plan, exact_places(rows, plan, kept.mask(rows)), sink_map, recipe, bases, progress)

    found, ranked = lost(rows), None
    if settings.kv_repeated:
        again = lost(repeated(rows, starts_with_bos(tokenizer, recipe.calibration.bos)))
        found = [loss.model_copy(update={"repeated": other.predicted})
                 for loss, other in zip(found, again, strict=True)]
    if settings.measure_rows:
        model, own = _in_memory(decoder, recipe), own_prefix(plan)
        prepare(model, make_prefix(model, own) if own else None, bases)
        found = measured_kv(model, plan, rows[:settings.measure_rows], found, progress)
        ranked = spearman([one.predicted for one in found], [float(one.measured or 0) for one in found])
    return made.model_copy(update={"kv": found, "kv_length": rows.shape[1], "kv_ranking": ranked})


def repeated(rows: torch.Tensor, bos: bool) -> torch.Tensor:
    """Rows of about the same length whose second half repeats the first, behind the same `<bos>`."""
    half = rows[:, bos:bos + (rows.shape[1] - bos) // 2]
    return torch.cat([rows[:, :bos], half, half], dim=1)


def _in_memory(decoder: Decoder, recipe: Recipe) -> PreTrainedModel:
    """A copy of the model, with all its weights, in the compute dtype and on the compute device."""
    device, dtype = pick_device(recipe.compute.device), getattr(torch, recipe.compute.dtype)
    if decoder.source is None:
        return cast_model(copy.deepcopy(decoder.model), device, dtype).eval()
    return load_model(decoder.source.folder, dtype, device, runs_own_code(decoder.model))


def sink_places(rows: torch.Tensor, sink_map: SinkMap) -> torch.Tensor:
    """Where the sinks of a map stand in rows int64 [rows, length]: bool, alike."""
    return SinkSelector.of(sink_map.tokens).mask(rows)


def ranking(units: Sequence[UnitSensitivity]) -> Ranking:
    """Spearman's rank correlations over all units and formats that were measured."""
    pairs = [(loss.predicted, loss.measured) for unit in units for loss in unit.losses if loss.measured is not None]
    formats: dict[tuple[int, int, str], list[FormatLoss]] = {}
    for unit in units:
        for loss in unit.losses:
            formats.setdefault((loss.bits, loss.group_size, loss.method), []).append(loss)
    among = [found for losses in formats.values() if (found := _spearman(
        [(loss.predicted, loss.measured) for loss in losses if loss.measured is not None], "total")) is not None]
    measured = sum(two.total for _, two in pairs)
    return Ranking(total=_spearman(pairs, "total"), sinks=_spearman(pairs, "sinks"), others=_spearman(pairs, "others"),
                   between=float(np.mean(among)) if among else None,
                   ratio=sum(one.total for one, _ in pairs) / measured if measured > 0 else None, pairs=len(pairs))


def _spearman(pairs: Sequence[tuple[Terms, Terms]], term: str) -> float | None:
    one, two = ([getattr(terms, term) for terms in side] for side in zip(*pairs, strict=True)) if pairs else ([], [])
    return spearman(one, two)


def spearman(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one of the two is constant."""
    if len(set(one)) < 2 or len(set(two)) < 2:
        return None
    from scipy.stats import spearmanr  # a second, which only measured sensitivities need

    return float(spearmanr(one, two).statistic)
