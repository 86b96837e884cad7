"""A linear whose weight stays packed in memory, as the checkpoint holds it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sinkquant.schemes import WeightFormat, scheme_of
from sinkquant.schemes.codecs.outliers import Outliers
from sinkquant.schemes.codecs.packed import dequantize, unpack

CHUNK = 1 << 22
"""Weights that are made dense at a time."""


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear` or a `Conv1D`: int32 words, 16-bit scales and what stands beside them are its
    buffers, under the names that they have in a checkpoint. Every call makes the weight dense, some rows at a time.

    Args:
        out_features, in_features: rows and columns of the weight.
        form: how it is stored. scale_dtype: "bfloat16" or "float16". dtype: the model's, which the bias has.
        transposed: it stands in for a `Conv1D`.
    """

    keeps_packed: ClassVar[bool] = True

    def __init__(self, out_features: int, in_features: int, form: WeightFormat, scale_dtype: str,
                 dtype: torch.dtype, bias: bool, transposed: bool = False,
                 device: torch.device | str | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features, self.form, self.transposed = out_features, in_features, form, transposed
        self.dtype = dtype
        for name, (kind, shape) in scheme_of(form).tensors(out_features, in_features, form, scale_dtype, False).items():
            self.register_buffer(name, torch.empty(shape, dtype=getattr(torch, kind), device=device))
        empty = torch.empty(out_features, dtype=dtype, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @property
    def outliers(self) -> Outliers | None:
        """What stands beside the codes."""
        return Outliers.of(dict(self._buffers), self.out_features, self._scale().dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight in the model's dtype, the way the original module stores it. It is made anew at every
        access: changing it changes nothing."""
        dense = self.rows(0, self.out_features, self.dtype)
        return dense.T if self.transposed else dense

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows start..stop of the weight, [stop - start, in_features]: code * scale in float32, then rounded."""
        words = self.get_buffer("weight_packed")[start:stop]
        dense = dequantize(unpack(words, self.form.bits, self.in_features), self._scale()[start:stop])
        outliers = self.outliers
        return (dense if outliers is None else outliers.add_to(dense, start)).to(dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: [..., in_features], float of any dtype. Returns [..., out_features] in that dtype."""
        step = max(1, CHUNK // self.in_features)
        parts = []
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            bias = None if self.bias is None else self.bias[start:stop]
            parts.append(self._product(inputs, self.rows(start, stop, inputs.dtype), bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """The module that it stands in for, with the dense weight."""
        weight = self.rows(0, self.out_features, dtype)
        with torch.device("meta"):
            module: nn.Module = (Conv1D(self.out_features, self.in_features) if self.transposed
                                 else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None))
        module.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight)
        if self.bias is not None:
            module.bias = self.bias
        return module

    def extra_repr(self) -> str:
        """What is shown of it."""
        return (f"in_features={self.in_features}, out_features={self.out_features}, bits={self.form.bits}, "
                f"group_size={self.form.group_size}, columns={self.form.columns}, scalars={self.form.scalars}")

    def _product(self, inputs: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As the original module multiplies, so that the last bit is the same."""
        if not self.transposed or bias is None:
            return functional.linear(inputs, rows, bias)
        product = torch.addmm(bias, inputs.reshape(-1, self.in_features), rows.T.contiguous())
        return product.reshape(*inputs.shape[:-1], -1)

    def _scale(self) -> torch.Tensor:
        return self.get_buffer("weight_scale")
