"""What of a packed model is packed, what is not and why, and the bytes that it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.inference.linear import KernelLinear

PACKING = "sinkquant_packing"
"""The attribute of a packed model that holds its summary."""


@dataclass(frozen=True)
class Packing:
    """Bytes are those of parameters and buffers in memory.

    `kernels`: module name -> kernel that computes with it; `dense`: name of a weight that is not packed -> the reason.
    `linear_bytes`: of the packed linears of the blocks, of `linear_bfloat16_bytes` that they have in bfloat16; `bytes`
    and `bfloat16_bytes`: of the whole model, tied weights once. `expanded_bytes`: by how much the packed linears take
    more than in the checkpoint, since torch's kernels have codes of 4 and 8 bits alone and a zero beside every scale.
    """

    kernels: dict[str, str]
    dense: dict[str, str]
    linear_bytes: int
    linear_bfloat16_bytes: int
    bytes: int
    bfloat16_bytes: int
    expanded_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel, dense: dict[str, str], stored_bytes: int, ends: dict[str, str] | None = None,
           end_bytes: int = 0) -> Packing:
        """Count a model whose linears were replaced.

        Args:
            stored_bytes: of the same linears in the checkpoint. ends, end_bytes: what `round_ends` gives.
        """
        ends = ends or {}
        packed = {name: module for name, module in model.named_modules()
                  if isinstance(module, KernelLinear) and name not in ends}
        weights = sum(2 * module.out_features * module.in_features for module in packed.values())
        biases = sum(module.bias.nbytes for module in packed.values() if module.bias is not None)
        inside = sum(_bytes([*module.parameters(), *module.buffers()]) for module in packed.values())
        everything = _bytes([*model.parameters(), *model.buffers()])
        rounded = _bytes([buffer for name in ends for buffer in model.get_submodule(name).buffers()])
        kernels = {name: str(module.kernel) for name, module in packed.items()} | ends
        return cls(kernels, dense, inside, weights + biases, everything,
                   everything - inside - rounded + weights + biases + end_bytes, inside - biases - stored_bytes)

    def __str__(self) -> str:
        """In a few words, for a log."""
        kernels = ", ".join(f"{count} by {name}" for name, count in Counter(self.kernels.values()).most_common())
        reasons = "".join(f"; {count} dense: {why}" for why, count in Counter(self.dense.values()).most_common())
        return (f"{kernels or 'nothing packed'}{reasons}; packed linears take "
                f"{self.linear_bytes / max(1, self.linear_bfloat16_bytes):.3f} of bfloat16, the whole model "
                f"{self.bytes / self.bfloat16_bytes:.3f}")


def packing(model: PreTrainedModel) -> Packing:
    """The summary of a model from `load(..., packed=True)`.

    Raises:
        RequestError: its weights are not packed.
    """
    found = getattr(model, PACKING, None)
    if not isinstance(found, Packing):
        raise RequestError("this model's weights are not packed; load its checkpoint with packed=True.")
    return found


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
