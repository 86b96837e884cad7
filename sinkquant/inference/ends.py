"""The token embedding and the output head in 8 or 4 bits, tied ones once: at 128,000 tokens they weigh more than all
packed linears of a model of a billion parameters."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.inference.int4_cpu import Int4CPU
from sinkquant.inference.kernels import Int4, Kernel, kernel_for
from sinkquant.inference.linear import KernelLinear
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.packed import PackedWeight, group_scales, row_chunks, to_codes

FORMATS = {8: WeightFormat(8, -1), 4: WeightFormat(4, 32)}
"""Bits -> a scale per token, or a scale and a zero for every 32 values of it. In groups of 32, 4 bits lose a quarter
less than in groups of 64 (KL divergence of the bundled model), for half a bit more."""
ALLOWED = {8: 0.02, 4: 0.2}
"""Bits -> relative error of rounding that an embedding may show; it is 0.005 to 0.01, and 0.07 to 0.1."""
PART = 4096
"""Rows that are made dense at a time."""


class RoundedEmbedding(nn.Module):
    """Stands in for an `nn.Embedding`: rows of the weight of a `KernelLinear`, whose buffers it shares, looked up.

    Args:
        table: a linear without anything beside its codes. factor: what the original multiplies its rows by.
    """

    def __init__(self, table: KernelLinear, factor: float) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.kernel, self.int4, self.factor = table.kernel, table.int4, factor
        for name, buffer in table.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: integers [...]. Returns bfloat16 [..., width]."""
        rows = self._rows(ids.flatten().long())
        return rows.reshape(*ids.shape, self.embedding_dim) * self.factor

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight in bfloat16, made anew at every access, without the factor."""
        device = next(self.buffers()).device
        return torch.cat([self._rows(ids) for ids in torch.arange(self.num_embeddings, device=device).split(PART)])

    def extra_repr(self) -> str:
        """What is shown of it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, kernel={self.kernel}"

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        if self.kernel.name == "int8":
            scale = self.get_buffer("scale")[ids].float()[:, None]
            return (self.get_buffer("codes")[ids].float() * scale).bfloat16()
        assert isinstance(self.int4, Int4CPU)
        codes = self.int4.rows(self.get_buffer("words_0"), ids).reshape(len(ids), -1, self.kernel.group).float()
        scale, zero = self.get_buffer("scales_0")[:, ids].float().unbind(-1)
        return ((codes - 8) * scale.T[..., None] + zero.T[..., None]).flatten(1).bfloat16()


@torch.no_grad()
def packed_embedding(name: str, embedding: nn.Embedding, table: KernelLinear) -> RoundedEmbedding:
    """What stands in for an embedding whose codes are in a checkpoint.

    Args:
        table: of the codes, without anything beside them.

    Raises:
        RequestError: the embedding is more than a lookup.
    """
    lookup = RoundedEmbedding(table, float(getattr(embedding, "embed_scale", 1.0)))
    ids = torch.arange(min(64, lookup.num_embeddings), device=next(lookup.buffers()).device)
    found, whole = lookup(ids), embedding._parameters["weight"]
    embedding._parameters["weight"] = nn.Parameter(lookup._rows(ids), requires_grad=False)
    expected = type(embedding).forward(embedding, ids)
    embedding._parameters["weight"] = whole
    if not torch.equal(found, expected):
        raise RequestError(f"{name} does more than look rows up ({type(embedding).__name__}); load the checkpoint "
                           "without packed=True.")
    return lookup.eval()


@torch.no_grad()
def round_ends(model: PreTrainedModel, int4: Int4, bits: int) -> tuple[dict[str, str], int]:
    """Round the embedding and the head of a bfloat16 model to 8 or 4 bits (`FORMATS`), in place. This changes what the
    model computes.

    Returns:
        module name -> kernel, and the bytes that they had in bfloat16, tied ones once.

    Raises:
        RequestError: the embedding is more than a lookup, no kernel takes the head, or 4 bits are asked for on CUDA.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if bits == 4 and not isinstance(int4, Int4CPU):
        raise RequestError("head_bits=4 reads rows of the embedding in the order of the CPU's kernel; on CUDA "
                           "head_bits is 8 or 16.")
    if isinstance(kernel := kernel_for(FORMATS[bits], embedding.weight.shape[1]), str):
        raise RequestError(f"head_bits={bits} does not fit {names[embedding]}: {kernel}; leave head_bits at 16.")
    table = _rounded(embedding.weight, kernel, int4)
    lookup = RoundedEmbedding(table, float(getattr(embedding, "embed_scale", 1.0)))
    ids = torch.arange(min(64, lookup.num_embeddings), device=embedding.weight.device)
    expected, found = embedding(ids).float(), lookup(ids).float()
    if found.shape != expected.shape or not (found - expected).norm() <= ALLOWED[bits] * expected.norm():
        raise RequestError(f"head_bits={bits} does not fit {names[embedding]}: a {type(embedding).__name__} does more "
                           "than look rows up; leave head_bits at 16.")
    kernels = {names[embedding]: f"{kernel}, looked up"}
    saved = sum(tensor.nbytes for tensor in (*embedding.parameters(), *embedding.buffers()))
    if isinstance(head, nn.Linear):
        tied = head.weight.data_ptr() == embedding.weight.data_ptr()
        saved += 0 if tied else head.weight.nbytes
        linear = table if tied else _rounded(head.weight, kernel, int4)
        linear.bias = None if head.bias is None else nn.Parameter(head.bias.detach(), requires_grad=False)
        model.set_submodule(names[head], linear.eval())
        kernels[names[head]] = str(kernel)
    model.set_submodule(names[embedding], lookup.eval())
    return kernels, saved


def _rounded(weight: torch.Tensor, kernel: Kernel, int4: Int4) -> KernelLinear:
    """Some rows at a time: in float32 an embedding would take twice its own memory."""
    parts = [_rounded_rows(weight[rows], kernel) for rows in row_chunks(weight)]
    codes, scale, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    if kernel.name == "int8":
        return KernelLinear(PackedWeight(codes, scale, 8), kernel, int4)
    return KernelLinear(PackedWeight(codes, scale, 4), kernel, int4, zeros=zeros)


def _rounded_rows(weight: torch.Tensor, kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zeros. The int4 kernel has a zero in any case, so that 16 steps reach from the least to the
    largest value of a group, with an error a sixth smaller than of codes around zero."""
    if kernel.name == "int8":
        scale = group_scales(weight, 8, -1, torch.bfloat16)
        return to_codes(weight, scale, 8), scale, torch.zeros_like(scale)
    grouped = weight.float().unflatten(1, (-1, kernel.group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    zeros = (low + 8 * scale.float()).bfloat16()
    return to_codes((grouped - zeros.float()[..., None]).flatten(1), scale, 4), scale, zeros
