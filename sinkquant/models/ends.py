"""What stands before and after the blocks: embeddings and output head, without a second copy of either in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkquant.models.decoder import Decoder
from sinkquant.models.hooks import compute_in, computing

HEAD_VALUES = 1 << 25
"""Weights of the output head that are computed with at a time: 128 MB in float32."""
LOGITS = 1 << 28
"""Logits that are held at a time: 1 GB in float32."""


def outside_modules(decoder: Decoder) -> list[nn.Module]:
    """Every leaf module outside the blocks but the token embedding, the output head, and what models beside the decoder
    hold, which no text goes through: towers for images and sound."""
    inside = {id(module) for block in decoder.blocks for module in block.modules()}
    models = [one for one in decoder.model.modules() if isinstance(one, PreTrainedModel)]
    towers = [one for one in models if inside.isdisjoint(map(id, one.modules()))]
    firsts = {id(next(one.parameters(), None)) for one in models}  # transformers takes device and dtype from them
    beside = {id(module) for one in towers for module in one.modules()
              if firsts.isdisjoint(map(id, module.parameters(recurse=False)))}
    ends = (decoder.model.get_input_embeddings(), decoder.model.get_output_embeddings())
    return [module for module in decoder.model.modules()
            if id(module) not in inside | beside and not any(module is end for end in ends)
            and not any(id(child) in inside for child in module.modules())
            and not any(True for _ in module.children())]


@contextlib.contextmanager
def token_table(decoder: Decoder, rows: torch.Tensor, device: str, dtype: torch.dtype) -> Iterator[None]:
    """Give the token embedding, while the context is open, a table in the compute dtype that holds nothing but the
    ids of these rows; it finds them there by itself.

    Args:
        rows: int64, of any shape.
    """
    embedding = decoder.model.get_input_embeddings()
    weight, padding, look_up = embedding.weight, getattr(embedding, "padding_idx", None), embedding.forward
    ids = rows.unique()
    table = _rows_of(decoder, weight, ids.cpu()).to(device, dtype)
    ids = ids.to(device)
    embedding._parameters["weight"] = nn.Parameter(table, requires_grad=False)
    embedding.padding_idx = None

    def find(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return look_up(torch.searchsorted(ids, tokens.contiguous()), *args, **kwargs)

    try:
        with computing([(embedding, find)]):
            yield
    finally:
        embedding._parameters["weight"] = weight
        embedding.padding_idx = padding


def next_token_losses(decoder: Decoder, rows: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor],
                      device: str, dtype: torch.dtype) -> torch.Tensor:
    """Cross-entropy of the next token, float32 [rows, length - 1] on the CPU. The head is read piece by piece.

    Args:
        rows: int64 [rows, length]. logits: runs the model from its last block's outputs on; called once per piece.
    """
    outside = outside_modules(decoder)
    rows = rows.to(device)
    targets = rows[:, 1:]
    with torch.no_grad(), decoder.present(outside), compute_in(outside, device, dtype):
        total, wanted = None, torch.zeros(targets.shape, device=device)
        for start, stop in _head_pieces(decoder, rows.numel(), device, dtype):
            with token_table(decoder, rows, device, dtype):  # opened last: a tied head is filled through it
                piece = logits(rows).float()[:, :-1]
            if stop is None:
                return nn.functional.cross_entropy(piece.flatten(0, 1), targets.flatten(),
                                                   reduction="none").view(targets.shape).cpu()
            part = piece.logsumexp(-1)
            total = part if total is None else torch.logaddexp(total, part)
            here = (targets >= start) & (targets < stop)
            wanted[here] = piece.gather(-1, (targets - start).clamp(0, stop - start - 1)[..., None])[..., 0][here]
        assert total is not None
        return (total - wanted).cpu()


def _head_pieces(decoder: Decoder, tokens: int, device: str, dtype: torch.dtype) -> Iterator[tuple[int, int | None]]:
    """Put one piece of the output head after the other into its place: the rows start..stop; stop is None where head
    and logits are small enough to be one piece, or the head is no linear."""
    head = decoder.model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or (
            head.weight.numel() <= HEAD_VALUES and tokens * len(head.weight) <= LOGITS):
        heads = [] if head is None else [head]
        with decoder.present(heads), compute_in(heads, device, dtype):
            yield 0, None
        return
    before = dict(head._parameters)
    count, piece = len(head.weight), max(1, min(HEAD_VALUES // head.weight.shape[1], LOGITS // tokens))
    try:
        for start in range(0, count, piece):
            stop = min(start + piece, count)
            for leaf, parameter in before.items():
                if parameter is not None:
                    part = _rows_of(decoder, parameter, torch.arange(start, stop)).to(device, dtype)
                    head._parameters[leaf] = nn.Parameter(part, requires_grad=False)
            yield start, stop
            head._parameters.update(before)
    finally:
        head._parameters.update(before)


def _rows_of(decoder: Decoder, parameter: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Some rows of a parameter, in its own dtype, from memory or from disk. ids: int64, ascending."""
    if decoder.source is None or not parameter.is_meta:
        return parameter.data[ids.to(parameter.device)]
    name = decoder.source.name_of(parameter)
    stored = decoder.source.stored(name)
    if stored is not None:
        return stored.pick(ids).to(parameter.dtype)
    owner = decoder.model.get_submodule(name.rpartition(".")[0])
    with decoder.present([owner]):
        return decoder.model.get_parameter(name).data[ids]
