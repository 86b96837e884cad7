"""Plan -> weights: one walk over the model, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Plan
from sinkquant.cache import make_prefix
from sinkquant.cache.bases import needs_bases
from sinkquant.errors import RequestError
from sinkquant.models import ActivationStore, Decoder, check_finite, pick_device
from sinkquant.models.loading import dtype_named
from sinkquant.models.numerics import own_numerics
from sinkquant.models.steps import Progress
from sinkquant.quantize.bases import NO_TOKENIZER_FOR_BASES, cache_bases
from sinkquant.quantize.block import QuantizedBlock, with_codes
from sinkquant.quantize.calibrated import calibrated
from sinkquant.quantize.check import check
from sinkquant.quantize.end_to_end import TuningStart, distilled, teacher_targets
from sinkquant.quantize.ends import quantize_ends
from sinkquant.quantize.inputs import get_ready
from sinkquant.quantize.kv_scheme import kv_scales, round_cache
from sinkquant.quantize.rounded import rounded
from sinkquant.quantize.rows import NO_TOKENIZER, text_rows
from sinkquant.quantize.state import ATTRIBUTE, UNPACKED, QuantizedState
from sinkquant.quantize.transforms import rotate
from sinkquant.schemes.codecs import install_modules


@own_numerics()
def quantize(model: PreTrainedModel, plan: Plan, tokenizer: PreTrainedTokenizerBase | None = None,
             device: str = "auto", dtype: torch.dtype | str = "float32",
             progress: Progress | None = None) -> PreTrainedModel:
    """Carry out a plan: the weights of `model` become, in place, what the saved checkpoint will give.

    A plan without GPTQ needs neither text nor tokenizer, unless it rotates the KV cache by covariance. With it, the
    calibration rows walk through the model once: the Hessians of a block are taken with all earlier blocks quantized.
    If this fails in the middle, what was done stays, and the model is refused from then on; load it again.

    Args:
        device, dtype: where Hessians and GPTQ are computed, and in which precision rows walk ("auto": the model's).

    Returns:
        the model, which now carries what `save` needs.

    Raises:
        RequestError: the plan does not fit this model, it is quantized already, or there is too little text.
        SinkquantError: a Hessian cannot be inverted.
    """
    decoder = Decoder.of(model)
    check(decoder, plan)
    check_finite(model)
    place, kind = pick_device(device), dtype_named(dtype) or model.dtype
    of_cache = plan.kv_cache is not None and needs_bases(plan.kv_cache)
    if tokenizer is None and (plan.needs_rows or plan.kv_scheme is not None):
        raise RequestError(NO_TOKENIZER)
    if tokenizer is None and of_cache:
        raise RequestError(NO_TOKENIZER_FOR_BASES)
    if tokenizer is not None and (plan.needs_rows or plan.kv_scheme is not None or of_cache):
        text_rows(decoder, plan.calibration, tokenizer)  # too little text is refused while nothing is changed
    setattr(model, UNPACKED, True)
    rotate(decoder, plan)
    state = QuantizedState(plan)
    if plan.kv_cache is not None and plan.kv_cache.prefix:  # whose ids `check` knows
        state.prefix = make_prefix(model, plan.kv_cache.prefix)
    state.kv_scales = kv_scales(decoder, plan, tokenizer, place, kind)
    teacher = teacher_targets(decoder, plan, tokenizer, place, kind)
    state.ends = quantize_ends(decoder, plan)
    state.bases = cache_bases(decoder, plan.kv_cache, plan.calibration, tokenizer, place, kind)
    starts: dict[str, TuningStart] = {}
    for block in quantized_blocks(decoder, plan, tokenizer, place, kind, progress):
        state.weights |= block.weights
        state.losses |= block.losses
        state.input_scales |= block.input_scales
        state.tokens |= block.tokens
        codes = with_codes(block.weights)
        starts |= {name: TuningStart(codes[name], offsets) for name, offsets in block.offsets.items()}
    if teacher is not None:
        state.weights |= distilled(decoder, plan, teacher, starts, place, kind, progress)
    for name, packed in state.weights.items():  # exactly what the checkpoint gives, whatever was computed in
        old = decoder.weight(name)
        decoder.put(name, packed.dequantized(old.dtype).to(old.device))
    install_modules(model, state.weights)
    if plan.kv_scheme is not None:
        round_cache(model, plan.kv_scheme, state.kv_scales)
    setattr(model, ATTRIBUTE, state)
    return model


def quantized_blocks(decoder: Decoder, plan: Plan, tokenizer: PreTrainedTokenizerBase | None, device: str,
                     dtype: torch.dtype, progress: Progress | None = None, store: ActivationStore | None = None,
                     done: int = 0, input_scales: Mapping[str, torch.Tensor] | None = None) -> Iterator[QuantizedBlock]:
    """Carry out a plan block by block; each is yielded while its weights, dense and quantized, are in memory. Experts
    that lie on disk and need no rows come a few at a time, after the rest of their block.

    Args:
        device, dtype: where Hessians and GPTQ are computed, and in which precision rows walk.
        store: where the hidden states of the calibration rows live.
        done: so many blocks are quantized already: rows walk through them as they are, and nothing is yielded.
        input_scales: the stored scales of the inputs of these.

    Raises:
        RequestError: GPTQ without a tokenizer, or with too little text.
        SinkquantError: a Hessian cannot be inverted.
    """
    changed = set(plan.changed)
    todo = {name: decision for name, decision in plan.modules.items() if decision.bits < 16 or name in changed}
    get_ready(decoder, plan, done, input_scales or {})
    if done >= len(decoder.blocks):
        return
    if plan.needs_rows:
        blocks = calibrated(decoder, plan, tokenizer, todo, device, dtype, store, done)
    else:
        blocks = rounded(decoder, plan, todo, done)
    for block in blocks:
        yield block
        if progress and block.ended:
            progress(block.index + 1, len(decoder.blocks), "quantizing blocks")
        del block  # or it would outlive the next one's making
