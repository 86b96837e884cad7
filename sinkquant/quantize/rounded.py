"""Blocks that are quantized without any text: no row walks.

A layer's experts need not be in memory together then. Where each of their projections can be read from disk by itself,
they come a few experts at a time, after what else the block has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from sinkquant.artifacts import ModelShape, ModuleDecision, Plan
from sinkquant.models import Decoder
from sinkquant.models.alone import StoredPart, in_groups, stored_parts
from sinkquant.models.experts import fused_parameters
from sinkquant.quantize.block import QuantizedBlock, inside
from sinkquant.quantize.inputs import put
from sinkquant.quantize.layer import keep_dense
from sinkquant.quantize.module import fused_scales, quantize_modules
from sinkquant.quantize.pruning import silence

TOGETHER = 1 << 25
"""Weights of experts that are in memory together, or one expert that has more."""


def rounded(decoder: Decoder, plan: Plan, todo: dict[str, ModuleDecision], done: int) -> Iterator[QuantizedBlock]:
    """Quantize block after block from `done` on. todo: name -> decision of every module that is to be changed."""
    shape = decoder.shape("")
    for index, name in enumerate(decoder.block_names):
        if index >= done:
            mine = inside(name, todo)
            alone = _alone(decoder, mine)
            groups = in_groups({module: decoder.experts[module] for module in alone}, TOGETHER)
            with torch.no_grad():
                rest = {module: one for module, one in mine.items() if module not in alone}
                yield _rest(decoder, plan, index, rest, shape, not groups)
                for place, group in enumerate(groups):
                    made = QuantizedBlock(index, name, {}, {}, ended=place == len(groups) - 1)
                    with decoder.present_alone({module: alone[module] for module in group}):
                        made.fused_scales.update(fused_scales(decoder, {x: mine[x] for x in group}, None))
                        for module in group:
                            quantize_modules(decoder, {module: mine[module]}, plan, made, None)
                    yield made
                    del made  # or it would outlive the next one's making


def _rest(decoder: Decoder, plan: Plan, index: int, mine: dict[str, ModuleDecision], shape: ModelShape,
          ended: bool) -> QuantizedBlock:
    """A block without the experts that are not in `mine`."""
    name = decoder.block_names[index]
    owners = {parameter.rpartition(".")[0] for parameter in fused_parameters(decoder.model, (name,))}
    needed = {decoder.experts[module].owner for module in mine if module in decoder.experts}
    without = [decoder.model.get_submodule(owner) for owner in sorted(owners - needed)]
    with decoder.present([decoder.blocks[index]], without):
        made = QuantizedBlock(index, name, {}, {}, silent=silence(decoder, plan, index), ended=ended,
                              fused_scales=fused_scales(decoder, mine, shape))
        for module, decision in mine.items():
            quantize_modules(decoder, {module: decision}, plan, made, None)
        keep_dense(decoder, mine, made)
        put(decoder, mine, {})  # no static ones: those need rows
    return made


def _alone(decoder: Decoder, mine: Mapping[str, ModuleDecision]) -> dict[str, StoredPart]:
    """The experts of a block that are read by themselves. Those that stay in 16 bits are changed and written as the
    whole that transformers holds them in."""
    if decoder.source is None:
        return {}
    parts = {name: decoder.experts[name] for name in mine if name in decoder.experts}
    found = stored_parts(decoder.source, parts)
    whole = {part.owner for name, part in parts.items() if name not in found or mine[name].bits >= 16}
    return {name: stored for name, stored in found.items() if parts[name].owner not in whole}
