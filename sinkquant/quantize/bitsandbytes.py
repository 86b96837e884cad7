"""bitsandbytes' number formats: NF4 and FP4 in blocks of 64 weights, and the int8 rows of LLM.int8()."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sinkquant.schemes.bitsandbytes import BLOCK
from sinkquant.schemes.bitsandbytes import FourBit as FourBitScheme

Leaves = dict[str, torch.Tensor]
THRESHOLD = 6.0
"""Inputs with a larger value anywhere in their column are multiplied in 16 bits (Dettmers et al., arXiv 2208.07339)."""


@dataclass(frozen=True)
class FourBit:
    """Round to the nearest of 16 levels, scaled by the largest weight of a block (QLoRA, arXiv 2305.14314, section
    3)."""

    scheme: FourBitScheme

    def encode(self, weight: torch.Tensor) -> Leaves:
        """weight: float [rows, columns], 64 divides columns. Returns leaf name -> tensor, as bitsandbytes saves."""
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type=self.scheme.quant_type,
                                     compress_statistics=self.scheme.double_quantization)
        found = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()
                 if isinstance(tensor, torch.Tensor)}
        dtype = str(weight.dtype).removeprefix("torch.")
        rows, columns = weight.shape
        packed = self.scheme.quant_state(rows, columns, dtype, float(state.offset) if state.nested else 0.0)
        found[self.scheme.state_name] = torch.tensor(list(packed), dtype=torch.uint8)
        return {"weight": codes, **found}

    def decode(self, leaves: Leaves, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The dense weight, [rows, columns] in `dtype`."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {name.removeprefix("weight."): leaf for name, leaf in leaves.items() if name.startswith("weight.")}
        state = QuantState.from_dict(parts, device=leaves["weight"].device)
        state.dtype = dtype
        return dequantize_4bit(leaves["weight"], state).reshape(shape)


@dataclass(frozen=True)
class LLMInt8:
    """Round every row to int8, scaled by its largest weight. Inputs are rounded too, when the module runs."""

    def encode(self, weight: torch.Tensor) -> Leaves:
        """weight: float [rows, columns]. Returns leaf name -> tensor, as bitsandbytes saves them."""
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, scale, _ = int8_vectorwise_quant(weight.to(torch.float16))
        return {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def decode(self, leaves: Leaves, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The dense weight, [rows, columns] in `dtype`; what the module does with its inputs does not show in it."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(leaves["weight"], leaves["SCB"]).reshape(shape).to(dtype)

    def module(self, leaves: Leaves, linear: nn.Linear) -> nn.Module:
        """bitsandbytes' own module in place of a linear: it rounds its inputs, which no dense weight can show."""
        import bitsandbytes

        made = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None,
                                            has_fp16_weights=False, threshold=THRESHOLD, device="meta")
        made.weight = bitsandbytes.nn.Int8Params(leaves["weight"], requires_grad=False, has_fp16_weights=False,
                                                 SCB=leaves["SCB"]).to(linear.weight.device)
        made.bias = linear.bias
        return made.eval()
