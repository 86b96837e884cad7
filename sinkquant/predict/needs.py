"""The memory that every stage of a run needs, from the shapes of a model and the recipe alone.

Every term is a buffer that a stage holds at its worst moment.
"""

from __future__ import annotations

import torch

from sinkquant.artifacts import LinearShape
from sinkquant.detect.residual import TOP
from sinkquant.detect.survey import batch_rows
from sinkquant.evaluate.divergence import BATCH_ROWS
from sinkquant.evaluate.likelihood import TOKENS_AT_ONCE
from sinkquant.evaluate.shelf import SHARE
from sinkquant.methods import need_hessian, need_unquantized_inputs
from sinkquant.models import Decoder
from sinkquant.models.alone import in_groups
from sinkquant.models.experts import fused_parameters
from sinkquant.models.head import PIECE_VALUES
from sinkquant.models.memory import LARGE
from sinkquant.models.on_disk import find_on_disk
from sinkquant.quantize.layer import WAITING
from sinkquant.quantize.refine.distill import LOGITS_BYTES as DISTILL_LOGITS
from sinkquant.quantize.refine.refine import ROWS as DISTILL_ROWS
from sinkquant.quantize.rounded import TOGETHER
from sinkquant.recipe import Recipe

RELOADED = 1 << 30
SPILL_SHARE = 8
"""Hidden states that take more than this part of the memory go to a mapped file."""
EVALUATED_AT_ONCE = 1024
"""Tokens of the longest request of sinkquant's own tasks, where the model has positions for them."""
EVALUATION_LOADS = 0.25e9
"""lm-eval, datasets, pyarrow and matplotlib, which only evaluation needs."""
PIECES = 32e6
"""What is looked at of hidden states at a time, with its copies."""
KEPT_OF_SMALL = 1.2
"""What is resident over what is in use where tensors are too small for the allocator to map each by itself."""
KEPT_BY_ALLOCATOR = 1.15
"""What is resident over what is in use, measured over the blocks of a walk."""


class Needs:
    """Sizes of one model under one recipe. memory: bytes that the run may take."""

    def __init__(self, decoder: Decoder, recipe: Recipe, memory: float) -> None:
        self.decoder, self.recipe, self.memory = decoder, recipe, memory
        dtype = getattr(torch, recipe.compute.dtype)
        self.item, self.stored = dtype.itemsize, decoder.model.dtype.itemsize
        shape = decoder.shape("")
        self.linears = [[linear for linear in shape.linears.values() if linear.block == index]
                        for index in range(len(decoder.blocks))]
        self.block = max(sum(p.numel() for p in block.parameters()) for block in decoder.blocks)
        self.read = _read_at_once(decoder)
        self.held, self.expert = _held_on_a_walk(decoder)
        self.total = sum(p.numel() for p in decoder.model.parameters())
        self.largest = max(linear.parameters for block in self.linears for linear in block)
        self.tensor = max(p.numel() for block in decoder.blocks for p in block.parameters())
        self.widest = max(max(linear.columns, linear.rows) for block in self.linears for linear in block)
        self.hidden, self.vocabulary = decoder.hidden_size, decoder.vocabulary
        self.heads = int(decoder.model.config.get_text_config(decoder=True).num_attention_heads)
        static = recipe.activations.format != "16-bit" and recipe.activations.scale == "tensor"
        self.scaled = recipe.weights.smooth != "none" or recipe.protect.channels == "scale"
        self.calibrated = need_hessian(recipe.methods) or static or self.scaled or recipe.weights.distill > 0 or (
            recipe.prune.method in ("wanda", "sparsegpt"))
        self.asymmetric = need_unquantized_inputs(recipe.methods)

    def detect_bytes(self) -> float:
        settings = self.recipe.detect
        sets = self._detected_tokens()
        batch = max(batch_rows(self.decoder, self.recipe, length) * length
                    for length in (settings.length, min(settings.long_length, self.decoder.max_length)))
        # With experts on disk: what they are handed and what they answer, and what the recorder keeps.
        apart = 2 * sum(sets) + max(sets) if self.expert else 0
        buffers = (sum(sets) + max(sets) + apart) * self.hidden * self.item
        watched = batch * (self.widest + 3 * self.hidden) * 4 + PIECES
        tables = sum(sets) * (4 * self.heads + 2 * 12 * TOP) * len(self.linears)
        running = (self.held + self.expert) * self.item + watched + self._activations(batch, settings.length)
        return max(self._walked(self.held, self.expert), running) + buffers + tables

    def quantize_bytes(self) -> float:
        dense = 2 * self.total * self.stored if self.total * self.stored <= RELOADED else 0
        if not self.calibrated:
            read = self.block if self.recipe.prune.asked else self.read
            return max(read * (self.stored + 1) + self.largest * (4 + self.stored), dense)
        settings = self.recipe.calibration
        states = settings.rows * settings.length * self.hidden * self.item
        whole = self.scaled or self.asymmetric or self.recipe.weights.tune > 0
        held, expert = (self.block, 0) if whole else (self.held, self.expert)
        buffers = 0 if states > self.memory / SPILL_SHARE else (6 if expert else 3) * states
        codes = held + (max(WAITING, expert) if expert else 0)
        if self.block * self.stored <= self.memory / SPILL_SHARE:
            codes += self.stored * (self.block - held)  # what experts on disk were changed to
        hessians, solve = 0.0, 0.0
        for block in self.linears:
            inputs = {_input(linear, i): linear for i, linear in enumerate(block) if not linear.fixed}
            sums = 8.0 * sum(linear.columns ** 2 for linear in inputs.values())
            hessians = max(hessians, sums + 4 * max((linear.columns ** 2 for linear in inputs.values()), default=0))
            solve = max([solve, *(sums + 48.0 * linear.columns ** 2 + 16 * linear.parameters
                                  for linear in inputs.values())])
        return max(self._walked(held, expert) + codes + buffers + max(
            hessians + self._activations(settings.batch_size * settings.length, settings.length), solve), dense)

    def sensitivity_bytes(self) -> float:
        settings, longest = self.recipe.sensitivity, self.decoder.max_length
        length = min(settings.length, longest)
        tokens, batch = settings.rows * length, settings.batch_size * length
        small = batch * self.hidden * self.item < LARGE
        solved = need_hessian(settings.methods or [self.recipe.weights.method])
        seen, solve = 0.0, 0.0
        for block in self.linears:
            free = [(_input(linear, i), linear) for i, linear in enumerate(block) if not linear.fixed]
            wide = sum({name: linear.columns for name, linear in free}.values())
            # Every linear's gradient; of experts that of the layer, and what one of them makes of its tokens.
            wide += sum({(linear.part_of or i): self.hidden if linear.part_of else linear.rows
                         for i, (_, linear) in enumerate(free)}.values())
            wide += max((2 * (linear.rows + linear.columns) for _, linear in free if linear.part_of), default=0)
            seen = max(seen, float(tokens * wide * self.item))
            solve = max([solve, *(max(12.0 * linear.columns ** 2, (4.0 + (40 if solved else 0))
                                      * linear.columns ** 2 + 16 * linear.parameters + 12 * batch * linear.rows)
                                  for _, linear in free)])
        peaks = [self._walked_back(tokens, batch, length) + seen + max(solve, self._graph(batch, length))]
        if settings.kv_bits:
            length = min(settings.kv_length, longest)
            batch = min(settings.batch_size, settings.kv_rows) * length
            scores = 7.0 * 4 * batch * self.heads * length
            peaks.append(self._walked_back(settings.kv_rows * length, batch, length) + self._graph(batch, length)
                         + scores)
        if settings.measure_rows:
            length = min(settings.measure_length, longest)
            base, at_once = settings.measure_rows, min(settings.measure_rows, settings.batch_size)
            logits = 4.0 * self.vocabulary * length * (base + 3 * at_once + 8)
            peaks.append(self.total * self.item + self.tensor * self.stored + 3.0 * tokens * self.hidden * self.item
                         + logits + solve)
        return (KEPT_OF_SMALL if small else 1.0) * (max(peaks) + PIECES)

    def _walked_back(self, tokens: int, batch: int, length: int) -> float:
        """A walk back: a block, and what comes into every block and its gradient; or the head with a batch's logits."""
        states = tokens * self.hidden * self.item
        kept = 0 if states > self.memory / SPILL_SHARE else (len(self.linears) + 3) * states
        head = self.vocabulary * self.hidden * (self.item + self.stored) + 4 * 4.0 * batch * self.vocabulary
        return max(self._walked(self.block, 0), head - self._graph(batch, length)) + kept

    def _graph(self, batch: int, length: int) -> float:
        """What one batch leaves in a block for the way back, beside inputs and gradients of the linears."""
        return self._activations(batch, length) + 3 * 4.0 * batch * self.heads * length

    def distill_bytes(self) -> float:
        settings, tuned = self.recipe.calibration, sum(x.parameters for block in self.linears for x in block)
        rows = max(1, min(DISTILL_ROWS, DISTILL_LOGITS // (4 * self.vocabulary * settings.length)))
        tokens = rows * settings.length
        # Dense weights, and of every tuned one its gradient, how far its code has moved, and what it started from.
        weights = self.total * self.item + tuned * (self.item + 4 + 3) + 24 * self.largest
        states = settings.rows * settings.length * self.hidden * self.item
        blocks = len(self.linears) * tokens * (6 * self.widest + 12 * self.hidden) * self.item
        return KEPT_BY_ALLOCATOR * (weights + states + blocks + 7 * 4.0 * tokens * self.vocabulary)

    def evaluate_bytes(self) -> float:
        settings = self.recipe.evaluate
        longest = min(self.decoder.max_length, EVALUATED_AT_ONCE)
        rows = max(1, min(settings.batch_size, TOKENS_AT_ONCE // longest))
        length = min(self.decoder.max_length, settings.divergence_length)
        read = max(self._activations(rows * longest, longest), self._activations(BATCH_ROWS * length, length))
        # Both distributions of some positions, and what the divergence makes of them.
        logits = 6 * 4.0 * max(PIECE_VALUES, self.vocabulary)
        # The unquantized model beside another, or all where there is room; they share embeddings and head.
        whole = self.total * self.item
        models = min(2 + settings.control, max(2, int(SHARE * self.memory / whole)))
        others = (models - 1) * (whole - self.vocabulary * self.hidden * self.item)
        return EVALUATION_LOADS + whole + others + KEPT_BY_ALLOCATOR * (read + logits)

    def _detected_tokens(self) -> list[int]:
        """Tokens of every set of rows that detection walks with."""
        settings = self.recipe.detect
        rows = settings.rows * settings.length
        return [rows, rows, 20 * settings.length, settings.long_rows * settings.long_length]

    def _walked(self, held: int, expert: int) -> float:
        """So many weights of a block that is being walked, cast tensor by tensor, their stored values gone; with an
        expert beside them that comes from disk."""
        tensor = min(self.tensor, held)
        kept = held * self.stored if self.item <= self.stored else tensor * self.stored
        return held * self.item + max(kept, expert * (self.item + self.stored))

    def _activations(self, tokens: int, length: int) -> float:
        """What a block's forward pass holds for one batch: of the MLP, and of attention by chunks of queries."""
        mlp = tokens * (4 * self.widest + 8 * self.hidden) * self.item
        return mlp + 5 * 4 * tokens / max(length, 1) * self.heads * min(length, 128) * length


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


def _read_at_once(decoder: Decoder) -> int:
    """Weights of a block that are in memory together where no rows walk: its experts come a few at a time."""
    most = 0
    for name, block in zip(decoder.block_names, decoder.blocks, strict=True):
        fused = sum(parameter.numel() for parameter in fused_parameters(decoder.model, (name,)).values())
        alone = {part: one for part, one in decoder.experts.items() if part.startswith(f"{name}.")}
        groups = [sum(alone[part].weight.numel() for part in group) for group in in_groups(alone, TOGETHER)]
        most = max(most, sum(p.numel() for p in block.parameters()) - fused, *groups)
    return most


def _input(linear: LinearShape, index: int) -> str:
    """What linears with one Hessian in memory have in common: engines fuse them, or they are experts, whose turn comes
    one after the other."""
    return linear.part_of or (linear.fused_with[0] if linear.fused_with else str(index))
