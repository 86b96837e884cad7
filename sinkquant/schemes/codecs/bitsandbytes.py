"""bitsandbytes: NF4 and FP4 in blocks of 64 weights, the int8 rows of LLM.int8(), and checkpoints as plain transformers
loads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.models.progress import no_progress_bars
from sinkquant.models.shards import StoredTensor
from sinkquant.schemes import WeightFormat, scheme_of
from sinkquant.schemes.bitsandbytes import BACKEND, BLOCK, FP4, LLM_INT8, NF4, FourBit
from sinkquant.schemes.codecs.codec import Leaves, LibraryCodec
from sinkquant.schemes.codecs.files import LibraryFiles, kept_linears

THRESHOLD = 6.0
"""Inputs with a larger value anywhere in their column are multiplied in 16 bits (Dettmers et al., arXiv 2208.07339)."""


@dataclass(frozen=True)
class FourBitCodec(LibraryCodec):
    """Round to the nearest of 16 levels, scaled by the largest weight of a block (QLoRA, arXiv 2305.14314, section
    3)."""

    scheme: FourBit

    def encode(self, weight: torch.Tensor, form: WeightFormat) -> Leaves:
        """weight: float [rows, columns], 64 divides columns."""
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

    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The dense weight, [rows, columns] in `dtype`."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {name.removeprefix("weight."): leaf for name, leaf in leaves.items() if name.startswith("weight.")}
        state = QuantState.from_dict(parts, device=leaves["weight"].device)
        state.dtype = dtype
        return dequantize_4bit(leaves["weight"], state).reshape(shape)


@dataclass(frozen=True)
class LLMInt8Codec(LibraryCodec):
    """Round every row to int8, scaled by its largest weight. Inputs are rounded too, when the module runs."""

    def encode(self, weight: torch.Tensor, form: WeightFormat) -> Leaves:
        """weight: float [rows, columns]."""
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, scale, _ = int8_vectorwise_quant(weight.to(torch.float16))
        return {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def decode(self, leaves: Leaves, form: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
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


class BitsAndBytesFiles(LibraryFiles):
    """Written tensor by tensor, never through a module that has run: bitsandbytes repacks 4-bit weights for AVX512-BF16
    CPUs in a forward pass, and what is saved after it is wrong."""

    backend = BACKEND

    def settings(self, model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        """Every linear that is not packed is skipped by name; a list of one's own replaces the default, `lm_head`."""
        (scheme,) = {scheme_of(form) for form in plan.formats.values()}
        skipped = list(kept_linears(model, plan))  # as they are: vLLM compares names, transformers takes patterns too
        if not isinstance(scheme, FourBit):
            return dict(BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped).to_dict())
        return dict(BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=scheme.quant_type, bnb_4bit_compute_dtype=model.dtype,
            bnb_4bit_use_double_quant=scheme.double_quantization, llm_int8_skip_modules=skipped).to_dict())

    def forms(self, folder: Path, settings: dict[str, Any], stored: Mapping[str, StoredTensor]) -> dict[
            str, WeightFormat]:
        """By the tensors that stand beside a weight."""
        found: dict[str, WeightFormat] = {}
        for key in stored:
            for scheme in (NF4, FP4):  # double quantization or not: the state tells
                if key.endswith(f".{scheme.state_name}"):
                    found[key.removesuffix(f".{scheme.state_name}")] = WeightFormat(4, BLOCK, storage=scheme.storage)
            if key.endswith(".SCB"):
                found[key.removesuffix(".SCB")] = WeightFormat(8, -1, storage=LLM_INT8.storage)
        if not found:
            raise RequestError(f"{folder} says that bitsandbytes quantizes it, but holds no packed weight; load the "
                               "unquantized model without that setting.")
        return found

    def reload(self, kind: type[PreTrainedModel], folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """By transformers, on the CPU: without a word of devices it takes a GPU that is there."""
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # brings bitsandbytes along

        with no_progress_bars():
            model = kind.from_pretrained(folder, dtype=dtype, device_map={"": "cpu"})
        dense = {}
        for name, parameter in model.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            dense[name] = dequantize_bnb_weight(parameter, getattr(module, "state", None)).to(dtype)
        return dense
