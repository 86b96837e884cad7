"""Sizes that stages count their memory and time with, from the shapes of a model and the recipe alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sinkquant.artifacts import LinearShape
from sinkquant.methods import need_hessian, need_unquantized_inputs
from sinkquant.models import Decoder
from sinkquant.models.experts import fused_parameters
from sinkquant.models.on_disk import find_on_disk
from sinkquant.recipe import Recipe

SPILL_SHARE = 8
"""Hidden states that take more than this part of the memory go to a mapped file."""
PIECES = 32e6
"""What is looked at of hidden states at a time, with its copies."""
KEPT_BY_ALLOCATOR = 1.15
"""What is resident over what is in use, measured over the blocks of a walk."""


class Sizes:
    """Sizes of one model under one recipe.

    Attributes:
        memory: bytes that the run may take. item, stored: bytes of a value as it computes, and in the checkpoint.
        linears: those of every block. block, weights, total: values of the largest block, of all blocks, of the model.
        held, expert: weights of a block that are in memory while rows walk through it, and of an expert beside them.
        largest, tensor: values of the largest linear that is not left alone, and of the largest tensor of a block.
        widest: channels.
        scaled: whether channels are scaled. calibrated: whether rows walk while quantizing. asymmetric: whether those
            of the unquantized model walk beside them.
    """

    def __init__(self, decoder: Decoder, recipe: Recipe, memory: float) -> None:
        self.decoder, self.recipe, self.memory = decoder, recipe, memory
        dtype = getattr(torch, recipe.compute.dtype)
        self.item, self.stored = dtype.itemsize, decoder.model.dtype.itemsize
        shape = decoder.shape("")
        self.linears = [[linear for linear in shape.linears.values() if linear.block == index]
                        for index in range(len(decoder.blocks))]
        self.block = max(sum(p.numel() for p in block.parameters()) for block in decoder.blocks)
        self.held, self.expert = _held_on_a_walk(decoder)
        self.weights = sum(p.numel() for block in decoder.blocks for p in block.parameters())
        self.total = sum(p.numel() for p in decoder.model.parameters())
        self.largest = max((linear.parameters for linear in shape.linears.values() if not linear.fixed), default=0)
        self.tensor = max(p.numel() for block in decoder.blocks for p in block.parameters())
        fused = fused_parameters(decoder.model, decoder.block_names)  # as a whole where experts cannot be told apart
        self.widest = max(max(fused[name].shape[1:] if name in fused else (linear.rows, linear.columns))
                          for name, linear in shape.linears.items())
        self.hidden, self.vocabulary = decoder.hidden_size, decoder.vocabulary
        self.heads = decoder.facts("").heads
        static = recipe.activations.format != "16-bit" and recipe.activations.ranged
        self.scaled = recipe.weights.smooth != "none" or recipe.protect.channels == "scale"
        self.calibrated = need_hessian(recipe.methods) or static or self.scaled or (
            recipe.weights.tune > 0 or recipe.weights.distill > 0 or recipe.prune.method in ("wanda", "sparsegpt"))
        self.asymmetric = need_unquantized_inputs(recipe.methods)

    def walked(self, held: int, expert: int) -> float:
        """So many weights of a block that is being walked, cast tensor by tensor, their stored values gone; with an
        expert beside them that comes from disk."""
        tensor = min(self.tensor, held)
        kept = held * self.stored if self.item <= self.stored else tensor * self.stored
        return held * self.item + max(kept, expert * (self.item + self.stored))

    def activations(self, tokens: int, length: int) -> float:
        """What a block's forward pass holds for one batch: of the MLP, and of attention by chunks of queries."""
        mlp = tokens * (4 * self.widest + 8 * self.hidden) * self.item
        return mlp + 5 * 4 * tokens / max(length, 1) * self.heads * min(length, 128) * length


def by_input(block: Iterable[LinearShape]) -> dict[str, list[LinearShape]]:
    """The linears of a block that are quantized, those with one Hessian in memory together: engines fuse them, or they
    are experts, whose turn comes one after the other."""
    found: dict[str, list[LinearShape]] = {}
    for index, linear in enumerate(block):
        if not linear.fixed:
            name = linear.part_of or (linear.fused_with[0] if linear.fused_with else str(index))
            found.setdefault(name, []).append(linear)
    return found


def _held_on_a_walk(decoder: Decoder) -> tuple[int, int]:
    """Weights of a block that are in memory while rows walk through it, and of the largest expert that is beside them
    for a while; 0 where all experts are in memory with their block. One mixture of a model speaks for all."""
    held, expert, apart = 0, 0, None
    for name, block in zip(decoder.block_names, decoder.blocks, strict=True):
        fused = fused_parameters(decoder.model, (name,))
        if fused and apart is None:
            apart = bool(find_on_disk(decoder, name))
        away = sum(parameter.numel() for parameter in fused.values()) if apart else 0
        held = max(held, sum(p.numel() for p in block.parameters()) - away)
        expert = max(expert, away // max((len(parameter) for parameter in fused.values()), default=1))
    return held, expert
