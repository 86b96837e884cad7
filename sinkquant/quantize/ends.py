"""The token embedding and the output head: rounded to nearest, some rows at a time, before any block is.

The blocks are then calibrated on what the embedding of the checkpoint gives.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sinkquant.artifacts import EndShape, Plan
from sinkquant.artifacts.ends import WEIGHT
from sinkquant.models import Decoder
from sinkquant.models.tensors import pieces
from sinkquant.quantize.transforms.parameters import untie_head
from sinkquant.schemes.codecs import PackedWeight, codec_of


def untie(decoder: Decoder, plan: Plan) -> None:
    """Give a tied head a weight of its own where the plan stores it in another way than the embedding."""
    shape = decoder.shape("").ends if plan.ends else {}
    for name, end in shape.items():
        if end.shared_with is not None and (name not in plan.ends or plan.ends[name].shares is None):
            untie_head(decoder)


def end_rows(decoder: Decoder, plan: Plan, name: str) -> Iterator[tuple[int, PackedWeight]]:
    """The embedding or the head as it is stored, as (first row, rows): every row is rounded by itself. A head that
    shares codes is the embedding."""
    end = plan.ends[name]
    nearest = codec_of(end.form).nearest(end.form, decoder.scale_dtype, plan.calibration.scale_search)
    for start, rows in pieces(decoder, f"{end.shares or name}.weight"):
        yield start, nearest.quantize(rows)


@torch.no_grad()
def quantize_ends(decoder: Decoder, plan: Plan) -> dict[str, PackedWeight]:
    """Round both in a model that holds its weights, in place.

    Returns:
        module name -> what its checkpoint stores.
    """
    untie(decoder, plan)
    found: dict[str, PackedWeight] = {}
    for name, end in plan.ends.items():
        ((_, packed),) = end_rows(decoder, plan, name) if end.shares is None else ((0, found[end.shares]),)
        found[name] = packed.to("cpu")
        weight = decoder.model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        weight.data = packed.dequantized(decoder.model.dtype).to(weight.device, weight.dtype)
    return found


def end_leaves(decoder: Decoder, plan: Plan, name: str, shape: EndShape,
               packed: PackedWeight) -> dict[str, torch.Tensor]:
    """The tensors of the embedding or the head, or of some of their rows, by their names in a checkpoint."""
    end = plan.ends[name]
    leaves = codec_of(end.form).leaves(packed, end.form) | {
        leaf: decoder.model.get_submodule(name).get_buffer(leaf).cpu() for leaf in shape.buffers}
    return {f"{name}.{leaf}": tensor.clone().contiguous() for leaf, tensor in leaves.items()
            if not (end.shares and leaf == WEIGHT)}
