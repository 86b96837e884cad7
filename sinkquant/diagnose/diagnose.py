"""model + text -> Diagnosis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import SinkMap
from sinkquant.artifacts.diagnosis import Check, Diagnosis, LayerMixing, SinkRates
from sinkquant.detect import detect
from sinkquant.detect.massive import massive_channels
from sinkquant.diagnose.bos import bos_variants
from sinkquant.diagnose.cache_defences import cache_defences
from sinkquant.diagnose.depth import settling_depth
from sinkquant.diagnose.dormant import dormant_heads, token_values
from sinkquant.diagnose.fidelity import require_quantized, sink_fidelity
from sinkquant.diagnose.null import measured
from sinkquant.diagnose.rates import context_lengths, first_position_mass, first_position_mass_by_length, sink_rates
from sinkquant.diagnose.robustness import LONGEST_EXCEEDED, REPEATS, has_learned_positions, past_the_context, robustness
from sinkquant.diagnose.rows import mark_sinks, random_rows, repeated_rows, with_bos
from sinkquant.diagnose.specials import special_token_paths
from sinkquant.diagnose.spread import spread
from sinkquant.diagnose.squashing import over_squashing, representational_collapse
from sinkquant.diagnose.survey import RowSurvey, WalkSettings, survey
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.models import Decoder, check_finite, pick_device, read_text, require_dense, starts_with_bos, token_rows
from sinkquant.models.corpus import in_words
from sinkquant.models.gguf import source_notes
from sinkquant.models.hooks import evaluating
from sinkquant.models.numerics import own_numerics
from sinkquant.models.source import folder_of
from sinkquant.models.steps import Progress, Steps
from sinkquant.recipe import Recipe

ROWS, LENGTH = 32, 128
"""Rows of text that most diagnostics run on."""
PUBLISHED_ROWS, PUBLISHED_LENGTH = 100, 64
LONGEST_CONTEXT, CONTEXT_TOKENS = 4096, 8192
"""Sink rates over context length stop at the first; the rows, whose beginnings are the shorter contexts, make up the
second."""
FEW_ROWS = 8
ATTACKED_ROWS, ATTACKED_LENGTH = 16, 96
CACHED_LENGTH = 256
PARTS = 8
"""Of the work, which are counted."""


@own_numerics()
def diagnose(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | list[str] | None = None,
             recipe: Recipe | None = None, name: str | None = None, sink_map: SinkMap | None = None,
             attacks: bool = True, original: PreTrainedModel | None = None, against: PreTrainedModel | None = None,
             against_name: str = "quantized", progress: Progress | None = None,
             kept: Sequence[int] | None = None) -> Diagnosis:
    """Every over-mixing diagnostic of a model, each beside its null: the same model on resampled text.

    Args:
        model: any decoder that `detect` supports, quantized (and made dense) or not. Its weights are not changed.
        text: a file of natural text; None for the recipe's evaluation text, or the packaged one.
        recipe: device, dtype, seed, `<bos>` policy and thresholds; None for the defaults.
        sink_map: the model's sinks, where they were detected before.
        attacks: also the robustness checks.
        original: the unquantized model, where this one is quantized; an exact prefix comes from it.
        against: a quantized version of the model, diagnosed on the same rows and compared with it.
        progress: called as progress(done, total, label).
        kept: the blocks of the model that `against` has, where some were dropped.

    Raises:
        RequestError: the architecture is not supported, the text is too short, or weights are not finite.
    """
    recipe = recipe or Recipe()
    decoder = Decoder.of(model)
    require_dense(model)
    check_finite(model)
    if against is not None:
        require_quantized(decoder, Decoder.of(against), kept)
        require_dense(against)
        check_finite(against)
    content = read_text(text or recipe.evaluate.text, "evaluation", tokenizer)
    job = _Inputs(decoder, tokenizer, content, recipe)
    rows = job.rows(ROWS, min(LENGTH, decoder.max_length))
    steps = Steps(PARTS, progress, "diagnosing:", "diagnosed")
    steps.next("finding sinks")
    if sink_map is None:
        quick = recipe.changed(detect={"super_weights": False}, prune={"heads": "none"})
        sink_map = detect(model, tokenizer, text, quick, name)
    notes = source_notes(folder_of(model))
    sinks = mark_sinks(rows, sink_map.tokens)
    steps.next("mixing")
    found = survey(decoder, rows, sinks, job.compute)
    steps.next("sink rates")
    published = job.rows(PUBLISHED_ROWS, min(PUBLISHED_LENGTH, decoder.max_length))
    mass = first_position_mass(decoder, published, job.compute)
    rates = _rates(job, published, mass, notes)
    steps.next("over-squashing")
    squashing = over_squashing(decoder, rows, sinks, job.compute)
    collapse = representational_collapse(decoder, rows[:FEW_ROWS], job.compute)
    steps.next("perturbation spread")
    spreads = [spread(decoder, rows, rows.shape[1] // 4, bool(job.front), job.compute)]
    if job.front:
        spreads.append(spread(decoder, rows[:, 1:], rows.shape[1] // 4 - 1, False, job.compute))
    elif tokenizer.bos_token_id is not None:
        fronted = with_bos(rows[:, :decoder.max_length - 1], int(tokenizer.bos_token_id), [0])
        spreads.append(spread(decoder, fronted, rows.shape[1] // 4 + 1, True, job.compute))
        notes.append("rows of this model do not start with <bos>: the spread with it is of the same rows behind one")
    else:
        notes.append("rows of this model do not start with <bos>: the spread is measured without it only")
    steps.next("depth")
    depth = settling_depth(decoder, rows, sinks, lambda token: str(tokenizer.decode([token])), job.compute)
    steps.next("<bos> removed and moved")
    variants = []
    if tokenizer.bos_token_id is None:
        notes.append("the tokenizer has no <bos>: removing and moving it was not measured")
    else:
        length = min(LENGTH, decoder.max_length) - 2
        bare = job.rows(ROWS, length, "never")
        variants = bos_variants(decoder, bare, int(tokenizer.bos_token_id), job.compute)
    steps.next("robustness")
    checks: list[Check] = []
    if attacks:
        length = min(ATTACKED_LENGTH, decoder.max_length) - REPEATS
        bos = int(tokenizer.bos_token_id) if job.front and tokenizer.bos_token_id is not None else None
        checks = robustness(decoder, job.rows(ATTACKED_ROWS, length, "never"), bos, sink_map.tokens, job.compute,
                            lambda token: str(tokenizer.decode([token])))
        checks += _past_the_context(job, bos, notes)
        checks += _cache_defences(job, bos, sink_map, original or model, notes)
    steps.end()
    fidelity, other = None, None
    if against is not None:
        fidelity = sink_fidelity(model, against, tokenizer, sink_map.tokens, recipe, text, kept)
        other = diagnose(against, tokenizer, text, recipe, against_name, sink_map, attacks, original=model,
                         progress=progress)
    massive = massive_channels(found.stream, found.rows, recipe.detect)
    return Diagnosis(
        model=decoder.facts(name or model.config.name_or_path or type(model).__name__),
        tokenization=sink_map.tokenization,
        text=in_words(text or recipe.evaluate.text) or "packaged evaluation text", seed=recipe.seed,
        sinks=sink_map.tokens,
        massive_peak=max((channel.peak for channel in massive), default=0.0),
        massive_ratio=max((channel.ratio for channel in massive), default=0.0), sink_rates=rates,
        first_position=[layer.mean(0).tolist() for layer in mass], mixing=layer_mixing(found, recipe.seed),
        collapse=collapse,
        over_squashing=squashing, spread=spreads, bos=variants, values=token_values(found, tokenizer),
        dormant_heads=dormant_heads(found, tokenizer), depth=depth, robustness=checks,
        special_tokens=special_token_paths(tokenizer) if attacks else {}, fidelity=fidelity, against=other, notes=notes)


def layer_mixing(found: RowSurvey, seed: int) -> list[LayerMixing]:
    """Rank collapse and smoothness of a survey, block by block."""
    def each(values: list[torch.Tensor], layer: int) -> dict[str, float]:
        return measured(values[layer], seed).model_dump()

    return [LayerMixing.model_validate({
        "layer": layer, "mu": each(found.mu, layer), "mu_ratio": each(found.mu_ratio, layer),
        "mu_ratio_without_sinks": each(found.mu_ratio_without_sinks, layer),
        "effective_rank": each(found.effective_rank, layer),
        "effective_rank_without_sinks": each(found.effective_rank_without_sinks, layer),
        "row_entropy": (measured(found.table.entropy[layer].mean(1), seed).model_dump()
                        if found.table.entropy[layer].numel() else None)})
        for layer in range(len(found.mu))]


class _Inputs:
    """What all diagnostics of one model share."""

    def __init__(self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, content: str, recipe: Recipe) -> None:
        self.decoder, self.tokenizer, self.content = decoder, tokenizer, content
        self.policy = recipe.calibration.bos
        self.front = starts_with_bos(tokenizer, self.policy)
        self.compute = WalkSettings(pick_device(recipe.compute.device), getattr(torch, recipe.compute.dtype),
                                    recipe.seed)

    def rows(self, count: int, length: int, bos: str | None = None) -> torch.Tensor:
        """int64 [at most count, length] of the text."""
        policy = self.policy if bos is None else "never"
        return token_rows(self.tokenizer, self.content, count, length, policy, self.decoder.vocabulary, "text",
                          key="")


def _rates(job: _Inputs, published: torch.Tensor, mass: list[torch.Tensor], notes: list[str]) -> list[SinkRates]:
    """Natural text over context length, then random and repeated tokens at the published length."""
    seed, decoder = job.compute.seed, job.decoder
    rates = [sink_rates(mass, "natural", published.shape[1], seed)]
    longer = [length for length in context_lengths(min(LONGEST_CONTEXT, decoder.max_length))
              if length > published.shape[1]]
    short = None
    while longer:
        try:
            rows = job.rows(max(2, CONTEXT_TOKENS // longer[-1]), longer[-1])
        except RequestError:
            short = longer.pop()
            continue
        for length, found in zip(longer, first_position_mass_by_length(decoder, rows, longer, job.compute),
                                 strict=True):
            rates.append(sink_rates(found, "natural", length, seed))
        break
    if short is not None:
        notes.append(f"the text holds no row of {short} tokens: sink rates stop at {rates[-1].length}")
    few = published[:ROWS]
    rates.append(sink_rates(first_position_mass(decoder, random_rows(few, seed), job.compute), "random",
                            few.shape[1], seed))
    rates.append(sink_rates(first_position_mass(decoder, repeated_rows(few, seed), job.compute), "repeated",
                            few.shape[1], seed))
    return rates


def _past_the_context(job: _Inputs, bos: int | None, notes: list[str]) -> list[Check]:
    """Checks past the trained context, or a note that says why there are none."""
    context, decoder = job.decoder.max_length, job.decoder
    if bos is None:
        notes.append("rows of this model do not start with <bos>: it was not run past its context")
    elif has_learned_positions(decoder):
        notes.append("the model looks positions up in a table that ends with its context: it was not run past it")
    elif context > LONGEST_EXCEEDED:
        notes.append(f"the model's context is longer than {LONGEST_EXCEEDED} tokens: it was not run past it")
    else:
        try:
            rows = job.rows(2, 2 * context, "never")
        except RequestError:
            notes.append(f"the text holds no row of {2 * context} tokens: the model was not run past its context")
        else:
            return past_the_context(decoder, rows, bos, job.compute)
    return []


def _cache_defences(job: _Inputs, bos: int | None, sink_map: SinkMap, original: PreTrainedModel,
                    notes: list[str]) -> list[Check]:
    """What pinned tokens and an exact prefix are worth in a 2-bit cache, or a note that says why that is not known."""
    if bos is None:
        return []
    try:
        text = job.rows(FEW_ROWS, min(CACHED_LENGTH, job.decoder.max_length) - REPEATS, "never")
        with evaluating(job.decoder.model):
            return cache_defences(job.decoder.model, text, bos, sink_map, original, notes)
    except SinkquantError as error:
        notes.append(f"a packed KV cache was not measured: {error}")
        return []
