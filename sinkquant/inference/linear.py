"""A linear that computes with packed weights: one copy of them in memory, in the order of torch's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from sinkquant.inference.kernels import ROWS, Int4, Kernel
from sinkquant.schemes.codecs.outliers import Outliers
from sinkquant.schemes.codecs.packed import PackedWeight, dequantize

CHUNK = 1 << 20
"""Weights that are made dense at a time."""
ALIGNMENT = 64
"""Bytes: where torch's allocator lets every tensor begin."""


class KernelLinear(nn.Module):
    """Stands in for an `nn.Linear` or a `Conv1D` of bfloat16 inputs. A few tokens go through torch's kernel; for many
    the weight is made dense, some rows at a time. What stands beside the codes is added in both cases.

    Buffers: `words_i` and `scales_i` [columns / group, rows, 2] of every int4 plane i, or `codes` int8 [rows, columns]
    and `scale` [rows] for the int8 kernel; and those of `Outliers`.

    Args:
        weight: codes int8 [rows, columns], 16-bit scales [rows, groups]. zeros: [rows, groups], added to code * scale,
            or None; the int4 kernel alone has them.
        kernel: as `kernel_for` chose it. int4: torch's int4 kernel of the device.
        bias: bfloat16 [rows] or None. transposed: it stands in for a `Conv1D`.
    """

    keeps_packed: ClassVar[bool] = True

    def __init__(self, weight: PackedWeight, kernel: Kernel, int4: Int4, bias: nn.Parameter | None = None,
                 transposed: bool = False, zeros: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.kernel, self.int4, self.transposed, self.bias = kernel, int4, transposed, bias
        self.has_outliers = weight.outliers is not None
        if kernel.name == "int8":
            self.register_buffer("codes", aligned(weight.codes.contiguous()))
            self.register_buffer("scale", weight.scale[:, 0].to(torch.bfloat16))
        else:
            self._register_planes(weight, zeros)
        for name, tensor in (weight.outliers.tensors() if weight.outliers else {}).items():
            self.register_buffer(name, tensor)

    def _register_planes(self, weight: PackedWeight, zeros: torch.Tensor | None) -> None:
        repeat = self.in_features // self.kernel.group // weight.scale.shape[1]
        scale = weight.scale.float().repeat_interleave(repeat, 1)
        zero = torch.zeros_like(scale) if zeros is None else zeros.float().repeat_interleave(repeat, 1)
        planes = [(weight.codes, scale, zero)]
        if self.kernel.planes == 2:  # code = 16 * high + 8 + low, so that what low adds is centred
            high = weight.codes >> 4
            low = weight.codes - (high << 4) - 8
            planes = [(high, 16 * scale, 8 * scale), (low, scale, zero)]  # all of it exact in bfloat16
        missing = -self.out_features % ROWS
        for index, (codes, factor, added) in enumerate(planes):
            filled = functional.pad((codes + 8).to(torch.uint8), (0, 0, 0, missing))
            both = functional.pad(torch.stack((factor, added), -1).to(torch.bfloat16), (0, 0, 0, 0, 0, missing))
            words = self.int4.pack(filled)
            self.register_buffer(f"words_{index}", words)
            self.register_buffer(f"scales_{index}", both.transpose(0, 1).contiguous().to(words.device))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: bfloat16 [..., in_features]. Returns bfloat16 [..., out_features]."""
        flat = inputs.reshape(-1, self.in_features)
        prefill = self.int4.prefill
        many = prefill is not None and len(flat) >= prefill
        product = self._dense_product(flat) if many else self._kernel_product(flat.contiguous())
        if self.bias is not None:
            product += self.bias
        return product.to(inputs.dtype).reshape(*inputs.shape[:-1], self.out_features)

    def _kernel_product(self, flat: torch.Tensor) -> torch.Tensor:
        """Parts are added in float32, so that the sum is rounded once; a single part is bfloat16."""
        if self.kernel.name == "int8":
            parts = [torch._weight_int8pack_mm(aligned(flat), aligned(self.get_buffer("codes")),
                                               self.get_buffer("scale"))]
        else:
            parts = [self.int4.product(flat, self.get_buffer(f"words_{index}"), self.kernel.group,
                                       self.get_buffer(f"scales_{index}")) for index in range(self.kernel.planes)]
        outliers = self.outliers
        if outliers is None and len(parts) == 1:
            return parts[0][:, :self.out_features]
        product = sum(parts[1:], parts[0].float())[:, :self.out_features]
        return product if outliers is None else product + outliers.times(flat.float())

    def _dense_product(self, flat: torch.Tensor) -> torch.Tensor:
        # Without instructions for bfloat16 a CPU multiplies float32 several times as fast.
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        kind = torch.bfloat16 if fast else torch.float32
        given = flat.to(kind)
        return torch.cat([functional.linear(given, rows.to(kind)) for rows in self._dense_rows()], -1)

    @property
    def outliers(self) -> Outliers | None:
        """What stands beside the codes."""
        if not self.has_outliers:  # looking among the buffers takes 2 % of a small step
            return None
        return Outliers.of(dict(self._buffers), self.out_features, torch.bfloat16)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight in bfloat16, the way the original module stores it. It is made anew at every access:
        changing it changes nothing."""
        dense = torch.cat([rows.to(torch.bfloat16) for rows in self._dense_rows()])
        return dense.T if self.transposed else dense

    def extra_repr(self) -> str:
        """What is shown of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel={self.kernel}"

    def _dense_rows(self) -> Iterator[torch.Tensor]:
        """The weight in float32, some rows at a time."""
        block = self.int4.block if self.kernel.name == "int4" else 1
        step = max(block, CHUNK // self.in_features // block * block)
        outliers = self.outliers
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            dense = self._int8_rows(start, stop) if self.kernel.name == "int8" else self._int4_rows(start, stop)
            yield dense if outliers is None else outliers.add_to(dense, start)

    def _int8_rows(self, start: int, stop: int) -> torch.Tensor:
        return dequantize(self.get_buffer("codes")[start:stop], self.get_buffer("scale")[start:stop, None])

    def _int4_rows(self, start: int, stop: int) -> torch.Tensor:
        filled = stop + -stop % ROWS
        total = None
        for index in range(self.kernel.planes):
            words = self.get_buffer(f"words_{index}")
            codes = self.int4.unpack(words[start:filled], filled - start)[:stop - start]
            scale, zero = self.get_buffer(f"scales_{index}")[:, start:stop].float().unbind(-1)
            grouped = codes.reshape(stop - start, -1, self.kernel.group).float()
            dense = ((grouped - 8) * scale.T[..., None] + zero.T[..., None]).flatten(1)
            total = dense if total is None else total + dense
        assert total is not None
        return total


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if it begins in the middle of a vector, as one in a mapped file or a part of another may.
    torch's int8 kernel for AVX-512 ends the process on such inputs and codes."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
