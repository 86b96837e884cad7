"""Blocks that are quantized without any text: no row walks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sinkquant.artifacts import ModuleDecision, Plan
from sinkquant.models import Decoder
from sinkquant.quantize.block import QuantizedBlock, inside
from sinkquant.quantize.inputs import put
from sinkquant.quantize.layer import keep_dense
from sinkquant.quantize.module import quantize_module
from sinkquant.quantize.pruning import silence


def rounded(decoder: Decoder, plan: Plan, todo: dict[str, ModuleDecision], done: int) -> Iterator[QuantizedBlock]:
    """Quantize block after block from `done` on. todo: name -> decision of every module that is to be changed."""
    for index, (name, block) in enumerate(zip(decoder.block_names, decoder.blocks, strict=True)):
        if index >= done:
            with decoder.present([block]), torch.no_grad():
                made = QuantizedBlock(index, name, {}, {}, silent=silence(decoder, plan, index))
                for module, decision in inside(name, todo).items():
                    quantize_module(decoder, module, decision, plan, made, None)
                keep_dense(decoder, inside(name, todo), made)
                put(decoder, inside(name, todo), {})  # no static ones: those need rows
                yield made
