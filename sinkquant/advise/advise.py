"""What each kind of protection is worth on a model: predicted from sensitivities, then measured beside controls."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Plan, Sensitivity, SinkMap
from sinkquant.artifacts.advice import Advice, MeasuredWorth, MechanismAdvice, PredictedWorth
from sinkquant.detect import detect
from sinkquant.errors import RequestError
from sinkquant.evaluate import compare_rows, held_out_rows, paired_difference
from sinkquant.models import (
    Decoder,
    cast_model,
    load_model,
    load_tokenizer,
    max_length,
    open_model,
    pick_device,
    read_text,
    resolve,
    vocabulary_of,
)
from sinkquant.models.corpus import in_words
from sinkquant.models.numerics import own_numerics
from sinkquant.models.steps import Progress
from sinkquant.policy import check_recipe, check_same_model
from sinkquant.policy.ends import better_spent
from sinkquant.policy.headers import nothing_found
from sinkquant.policy.mechanisms import OUTLIERS, Mechanism, mechanisms, unprotected
from sinkquant.policy.worth import cache_candidates, formats_of, judged, overall, predicted_cache_worth, predicted_worth
from sinkquant.predict import SENSITIVITIES, require_memory
from sinkquant.quantize import quantize
from sinkquant.quantize.bases import prepare_cache
from sinkquant.quantize.transforms import rotate
from sinkquant.recipe import DEFAULT_RECIPE, Recipe, near_miss
from sinkquant.schemes.packages import require_packages
from sinkquant.sensitivity import find_sensitivity

SPARE = 16
"""Positions that are left for a prefix in front of rows."""


@own_numerics()
def advise(model: str | os.PathLike[str], recipe: Recipe | None = None, sink_map: SinkMap | None = None, *,
           measure: bool = False, only: Sequence[str] = (), trust_remote_code: bool = False,
           progress: Progress | None = None) -> Advice:
    """Say what every kind of protection is worth under the recipe's formats, each alone.

    Args:
        model: a model folder, a hub id, or "demo".
        sink_map: of this model, made before; without it the sinks are detected.
        measure: carry every plan and its control out in memory, and compare both with the unquantized model on rows of
            the evaluation text.
        only: names of the kinds of protection to look at; empty for all.

    Raises:
        RequestError: the recipe has a budget that is solved for, or does not fit the model; there is no such kind of
            protection; a text is too short; it needs too much memory.
        SinkquantError: the work failed.
    """
    recipe = recipe or Recipe.load(DEFAULT_RECIPE)
    unprotected(recipe)
    check_recipe(recipe)
    require_packages(recipe.backend)
    folder = resolve(str(model))
    opened, tokenizer = open_model(folder, trust_remote_code), load_tokenizer(folder, trust_remote_code)
    decoder = Decoder.of(opened)
    shape = decoder.shape(str(model))
    room = max_length(opened) - SPARE
    if recipe.evaluate.divergence_length > room:
        recipe = recipe.changed(evaluate={"divergence_length": room})
    # What cannot be planned at all is refused before anything is looked for.
    _named(mechanisms(shape, nothing_found(shape), recipe.changed(prune={"heads": "none"})), only)
    if sink_map is not None:
        check_same_model(shape, sink_map)
    rows = _held_out(opened, tokenizer, recipe) if measure else None
    require_memory(decoder, _with_losses(recipe), None if measure else ("detect", SENSITIVITIES), True)
    found = sink_map or detect(opened, tokenizer, recipe=recipe, name=str(model), progress=progress)
    asked = _named(mechanisms(shape, found, recipe), only)
    predicted, notes = _Forecaster(folder, tokenizer, found, recipe, trust_remote_code, progress).predict(asked)
    notes += better_spent(shape, recipe)
    measured: dict[int, MeasuredWorth] = {}
    if rows is not None:
        bench = _Bench(folder, tokenizer, recipe, rows, trust_remote_code)
        due = [index for index, one in enumerate(asked) if one.aware is not None]
        for done, index in enumerate(due):
            if progress:
                progress(done, len(due), f"measuring {asked[index].name}")
            measured[index] = bench.compare(asked[index])
        if progress:
            progress(len(due), len(due), "measured")
    advice = [_advice(one, predicted.get(index), measured.get(index)) for index, one in enumerate(asked)]
    facts: dict[str, str | int | None] = {} if rows is None else {
        "text": in_words(recipe.evaluate.text) or "packaged evaluation text",
        "rows": len(rows), "length": rows.shape[1],
        "bootstrap_resamples": recipe.evaluate.bootstrap, "seed": recipe.seed}
    labels = [token.text or ("learned" if token.kind == "learned" else f"position {token.position}")
              for token in found.tokens]
    return Advice(model=str(model), recipe=recipe.name, sinks=labels, mechanisms=advice,
                  sentence=overall(advice, labels, measure), evaluation=facts, notes=[*found.notes, *notes])


def _named(found: list[Mechanism], only: Sequence[str]) -> list[Mechanism]:
    names = dict.fromkeys([one.name for one in found] + ([OUTLIERS] if only else []))
    for name in only:
        if name not in names:
            raise RequestError(f"there is no protection {name!r} under this recipe{near_miss(name, names)}; there are "
                               f"{', '.join(names)}.")
    return [one for one in found if not only or one.name in only]


def _with_losses(recipe: Recipe) -> Recipe:
    """The recipe with the sensitivities that predict what protection is worth, as far as memory goes."""
    quick = recipe.changed(sensitivity={"measure_rows": 0})
    if recipe.kv_cache is None:
        return quick
    return quick.changed(sensitivity={"kv_bits": [2], "kv_length": recipe.evaluate.divergence_length,
                                      "kv_rows": 8, "kv_repeated": False})


def _held_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> torch.Tensor:
    """Rows of the evaluation text, int64 [rows, length]."""
    settings = recipe.evaluate
    rows = held_out_rows(vocabulary_of(model), tokenizer, read_text(settings.text, "evaluation", tokenizer), recipe,
                         max_length(model))
    if len(rows) < 2:
        raise RequestError("the evaluation text holds but one row, whose spread nobody knows; give a longer one "
                           "(evaluate.text) or shorter rows (evaluate.divergence_length).")
    return rows


@dataclass(frozen=True)
class _Forecaster:
    """What is predicted of mechanisms, from sensitivities of the model in their folder."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    sink_map: SinkMap
    recipe: Recipe
    trust_remote_code: bool
    progress: Progress | None

    def predict(self, asked: list[Mechanism]) -> tuple[dict[int, PredictedWorth], list[str]]:
        """By the places of the mechanisms; notes where nothing can be predicted."""
        found: dict[int, PredictedWorth] = {}
        notes = []
        for where, work in (("weights", self._weights), ("KV cache", self._cache)):
            mine = {place: one for place, one in enumerate(asked)
                    if one.applies_to == where and one.aware is not None and one.control is not None}
            try:
                found |= work(mine) if mine else {}
            except RequestError as error:
                notes.append(f"no loss of the {where} is predicted: {str(error).rstrip('.')}")
        return found, notes

    def _weights(self, mine: dict[int, Mechanism]) -> dict[int, PredictedWorth]:
        candidates = formats_of([plan for one in mine.values() for plan in (one.aware, one.control) if plan])
        base = self._sensitivity(unprotected(self.recipe), candidates)
        own = {place: self._sensitivity(one.recipe, formats_of([one.aware])) for place, one in mine.items()
               if one.has_own_losses and one.aware}
        worth = {place: predicted_worth(one, base, own.get(place, base)) for place, one in mine.items()}
        return {place: one for place, one in worth.items() if one is not None}

    def _cache(self, mine: dict[int, Mechanism]) -> dict[int, PredictedWorth]:
        found: dict[int, PredictedWorth] = {}
        bases: dict[int, Sensitivity] = {}
        for place, one in mine.items():
            aware, control = (plan.kv_cache if plan else None for plan in (one.aware, one.control))
            if aware is None or control is None or aware.front or aware.massive:
                continue  # the rows that predict do not have such tokens
            candidates = cache_candidates(aware, self.recipe.evaluate.divergence_length)
            if control.window not in bases:
                bases[control.window] = self._sensitivity(one.recipe.changed(kv_cache={"window": control.window}),
                                                          candidates)
            own = self._sensitivity(one.recipe.replace(one.settings), candidates)
            worth = predicted_cache_worth(one, bases[control.window], own)
            if worth is not None:
                found[place] = worth
        return found

    def _sensitivity(self, recipe: Recipe, candidates: list[str]) -> Sensitivity:
        return find_sensitivity(open_model(self.folder, self.trust_remote_code), self.tokenizer, self.sink_map,
                                recipe.replace(candidates), progress=self.progress)


@dataclass
class _Bench:
    """The unquantized model, and every plan's divergence from it on the same rows; a plan is carried out once."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    rows: torch.Tensor
    trust_remote_code: bool
    known: dict[str, list[float]] = field(default_factory=dict)
    base: PreTrainedModel = field(init=False)

    def __post_init__(self) -> None:
        self.base = self._load()

    def compare(self, one: Mechanism) -> MeasuredWorth:
        """Both plans of a mechanism, row by row."""
        assert one.aware is not None
        assert one.control is not None
        aware, control = self._divergences(one.aware), self._divergences(one.control)
        ones, settings = [1.0] * len(aware), self.recipe.evaluate
        gain, low, high = paired_difference("kl", (control, ones), (aware, ones), settings.bootstrap, self.recipe.seed)
        return MeasuredWorth(aware=sum(aware) / len(aware), control=sum(control) / len(control), gain=gain, low=low,
                             high=high, rows=len(aware))

    def _divergences(self, plan: Plan) -> list[float]:
        key = plan.model_dump_json(include={"modules", "transforms", "silenced_heads", "kv_cache", "calibration"},
                                   exclude={"modules": {"__all__": {"reason"}}})
        if key not in self.known:
            self.known[key] = compare_rows(self.base, self._carried_out(plan), self.rows, kv=plan.kv_cache).kl
        return self.known[key]

    def _carried_out(self, plan: Plan) -> PreTrainedModel:
        """The model after a plan, in memory, with what its cache needs."""
        compute = self.recipe.compute
        model = load_model(self.folder, trust_remote_code=self.trust_remote_code)
        if any(decision.bits < 16 for decision in plan.modules.values()) or plan.changed:
            quantize(model, plan, self.tokenizer, compute.device, compute.dtype)
        model = cast_model(model, pick_device(compute.device), getattr(torch, compute.dtype))
        source = self.base
        if plan.kv_cache is not None and plan.rotation is not None:
            source = self._load()
            rotate(Decoder.of(source), plan)
        return prepare_cache(model, source, plan, self.tokenizer)

    def _load(self) -> PreTrainedModel:
        compute = self.recipe.compute
        return load_model(self.folder, getattr(torch, compute.dtype), pick_device(compute.device),
                          self.trust_remote_code)


def _advice(one: Mechanism, predicted: PredictedWorth | None, measured: MeasuredWorth | None) -> MechanismAdvice:
    answer, words = judged(one, predicted, measured)
    made = MechanismAdvice(name=one.name, applies_to=one.applies_to, settings=one.settings, predicted=predicted,
                           measured=measured, answer=answer, sentence=words)
    if one.aware is None or one.control is None:
        return made
    kv = None
    if one.aware.kv_cache is not None and one.control.kv_cache is not None:
        kv = one.aware.kv_cache.bytes, one.control.kv_cache.bytes
    return made.model_copy(update={"weight_bytes": (one.aware.weight_bytes, one.control.weight_bytes), "kv_bytes": kv})
