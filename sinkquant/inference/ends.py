"""The token embedding and the output head in 8 bits, tied ones once: at 128,000 tokens they weigh more than all packed
linears of a model of a billion parameters."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkquant.artifacts.formats import WeightFormat
from sinkquant.errors import RequestError
from sinkquant.inference.kernels import Int4, kernel_for
from sinkquant.inference.linear import KernelLinear
from sinkquant.quantize.packed import PackedWeight, group_scales, row_chunks, to_codes

ALLOWED = 0.02
"""Relative error of rounding to 8 bits with a scale per row that an embedding may show; it is 0.005 to 0.01."""


class RoundedEmbedding(nn.Module):
    """Stands in for an `nn.Embedding`: `codes` int8 [tokens, width] and `scale` bfloat16 [tokens], looked up.

    Args:
        factor: what the original multiplies its rows by.
    """

    def __init__(self, weight: PackedWeight, factor: float) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.codes.shape
        self.factor = factor
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale[:, 0])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: integers [...]. Returns bfloat16 [..., width]."""
        rows = self.get_buffer("codes")[ids].float() * self.get_buffer("scale")[ids].float()[..., None]
        return rows.bfloat16() * self.factor

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight in bfloat16, made anew at every access, without the factor."""
        return (self.get_buffer("codes").float() * self.get_buffer("scale").float()[:, None]).bfloat16()

    def extra_repr(self) -> str:
        """What is shown of it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits=8"


@torch.no_grad()
def round_ends(model: PreTrainedModel, int4: Int4) -> tuple[dict[str, str], int]:
    """Round the embedding and the head of a bfloat16 model to 8 bits, with a scale per token, in place. This changes
    what the model computes.

    Returns:
        module name -> kernel, and the bytes that they had in bfloat16, tied ones once.

    Raises:
        RequestError: the embedding is more than a lookup, or no kernel takes the head.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(kernel := kernel_for(WeightFormat(8, -1), embedding.weight.shape[1]), str):
        raise RequestError(f"head_bits=8 does not fit {names[embedding]}: {kernel}; leave head_bits at 16.")
    packed = _rounded(embedding.weight)
    lookup = RoundedEmbedding(packed, float(getattr(embedding, "embed_scale", 1.0)))
    ids = torch.arange(min(64, lookup.num_embeddings), device=packed.codes.device)
    expected, found = embedding(ids).float(), lookup(ids).float()
    if found.shape != expected.shape or not (found - expected).norm() <= ALLOWED * expected.norm():
        raise RequestError(f"head_bits=8 does not fit {names[embedding]}: a {type(embedding).__name__} does more than "
                           "look rows up; leave head_bits at 16.")
    kernels = {names[embedding]: "int8, looked up"}
    saved = sum(tensor.nbytes for tensor in (*embedding.parameters(), *embedding.buffers()))
    if isinstance(head, nn.Linear):
        tied = head.weight.data_ptr() == embedding.weight.data_ptr()
        saved += 0 if tied else head.weight.nbytes
        both = packed if tied else _rounded(head.weight)
        bias = None if head.bias is None else nn.Parameter(head.bias.detach(), requires_grad=False)
        model.set_submodule(names[head], KernelLinear(both, kernel, int4, bias).eval())
        kernels[names[head]] = str(kernel)
    model.set_submodule(names[embedding], lookup.eval())
    return kernels, saved


def _rounded(weight: torch.Tensor) -> PackedWeight:
    """Some rows at a time: in float32 an embedding would take twice its own memory."""
    scale = torch.cat([group_scales(weight[rows], 8, -1, torch.bfloat16) for rows in row_chunks(weight)])
    codes = torch.cat([to_codes(weight[rows], scale[rows], 8) for rows in row_chunks(weight)])
    return PackedWeight(codes, scale, 8)
