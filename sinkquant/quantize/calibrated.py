"""Blocks that are quantized while calibration rows walk through them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import ModuleDecision, Plan
from sinkquant.methods import need_unquantized_inputs
from sinkquant.models import ActivationStore, Decoder, Walk, weight_matrix
from sinkquant.models.inputs import inputs_left_alone
from sinkquant.quantize.block import QuantizedBlock, by_input, inside, with_codes
from sinkquant.quantize.hessian import collect
from sinkquant.quantize.inputs import front_of, round_block
from sinkquant.quantize.layer import keep_dense, quantize_experts, record_experts
from sinkquant.quantize.module import fused_scales, put_packed, quantize_modules
from sinkquant.quantize.pruning import silence
from sinkquant.quantize.ranks import add_up, exchange, solver, this_rank
from sinkquant.quantize.refine import compressed, rounding_offsets, tune
from sinkquant.quantize.rows import calibration_rows
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.quantize.transforms import scale_block


def calibrated(decoder: Decoder, plan: Plan, tokenizer: PreTrainedTokenizerBase | None,
               todo: dict[str, ModuleDecision], device: str, dtype: torch.dtype, store: ActivationStore | None,
               done: int) -> Iterator[QuantizedBlock]:
    """Let the calibration rows walk, and quantize every block on their way; arguments as `quantized_blocks` has them.

    Args:
        todo: name -> decision of every module that is to be changed.
    """
    settings = plan.calibration
    rows = calibration_rows(decoder, plan, tokenizer)
    weights = TokenWeights(rows, settings, len(front_of(plan)))
    rank, ranks = this_rank()
    shape = decoder.shape("")
    walk = Walk(decoder, rows, settings.batch_size, device, dtype, store=store,
                whole=plan.rescales or plan.follows_unquantized)
    ideal: torch.Tensor | None = None
    for step in walk.steps():
        if step.index < done:
            continue
        if plan.follows_unquantized and ideal is None:
            ideal = walk.hidden
        mine = inside(step.name, todo)
        experts = {name: mine.pop(name) for name in list(mine) if name in decoder.experts}
        silent = silence(decoder, plan, step.index)
        scaled = scale_block(decoder, step, plan, weights, shape)
        made = QuantizedBlock(step.index, step.name, {}, {}, silent=silent, ended=not experts,
                              fused_scales=fused_scales(decoder, mine, shape),
                              input_scales=round_block(step, decoder, plan, decoder.scale_dtype))
        # Fused modules read one input: its Hessian is collected once.
        source = {name: shape.linears[name].fused_with[0] for name in mine}
        readers = {source[name]: decoder.linears[source[name]] for name in mine}
        asymmetric = need_unquantized_inputs(decision.method for decision in mine.values())
        hessians = collect(step, readers, weights, ideal if asymmetric else None) if readers or experts else {}
        add_up(hessians, readers, asymmetric)
        routed = record_experts(step, decoder, experts, ideal)
        if ideal is not None:
            with inputs_left_alone(decoder.model):
                ideal = step.replay(ideal)
        shared = by_input(source)
        tuned = [name for name in mine if mine[name].bits < 16] if settings.tune or settings.distill else []
        originals = {name: weight_matrix(decoder.linears[name]) for name in tuned}
        for place, (read, names) in enumerate(shared.items()):
            # What stays in 16 bits is pruned by every rank: the sums are the same, and it is quickly done.
            here = {name: mine[name] for name in names if solver(place) == rank or mine[name].bits >= 16}
            quantize_modules(decoder, here, plan, made, hessians.get(read))
            if not settings.tune:
                hessians.pop(read, None)
        if ranks > 1:
            exchange(decoder, mine, made, shared)
        if settings.tune and tuned and ideal is not None:
            linears = {name: decoder.linears[name] for name in tuned}
            better = tune(step, linears, with_codes(made.weights), originals, ideal, weights, made.kept, settings.tune,
                          plan.seed)
            for name, packed in better.items():
                seen = hessians.get(source[name])
                put_packed(decoder, name, packed, made, originals[name], None if seen is None else seen.mean())
        if settings.distill:
            codes = with_codes(made.weights)
            made.offsets.update({
                name: compressed(rounding_offsets(codes[name], originals[name], made.kept.get(name)))
                if settings.distill_codes else None for name in tuned})
        if experts:
            yield made
            made = QuantizedBlock(step.index, step.name, {}, {})
            yield from quantize_experts(step, decoder, experts, routed, weights, plan, made.tokens)
            keep_dense(decoder, experts, made, step.on_disk)
        made.dense.update({parameter: decoder.model.get_parameter(parameter).data.to("cpu", stored)
                           for parameter, stored in scaled.items()})
        if mine or experts or scaled:
            step.run()  # the next block must see what this one gives now
        yield made
