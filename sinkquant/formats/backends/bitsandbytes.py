"""bitsandbytes: NF4, FP4 and LLM.int8() as plain transformers loads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.formats.backends.base import kept_linears
from sinkquant.formats.bars import no_bars
from sinkquant.models.shards import StoredTensor
from sinkquant.quantize import BackendWeight, PackedWeight
from sinkquant.schemes import WeightFormat


@dataclass(frozen=True)
class BitsAndBytes:
    """Written tensor by tensor, never through a module that has run: bitsandbytes repacks 4-bit weights for AVX512-BF16
    CPUs in a forward pass, and what is saved after it is wrong."""

    def settings(self, model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        """Every linear that is not packed is skipped by name; a list of one's own replaces the default, `lm_head`."""
        (storage,) = {form.storage for form in plan.formats.values()}
        skipped = [re.escape(name) for name in kept_linears(model, plan)]
        if storage == "llm.int8":
            return dict(BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped).to_dict())
        return dict(BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=storage[:3], bnb_4bit_compute_dtype=model.dtype,
            bnb_4bit_use_double_quant=storage.endswith("double"), llm_int8_skip_modules=skipped).to_dict())

    def write_more(self, folder: Path, plan: Plan) -> None:
        """Nothing more."""

    def leaves(self, weight: PackedWeight | BackendWeight) -> dict[str, torch.Tensor]:
        """As bitsandbytes itself saves them."""
        assert isinstance(weight, BackendWeight)
        return weight.leaves

    def forms(self, folder: Path, settings: dict[str, Any], stored: Mapping[str, StoredTensor]) -> dict[
            str, WeightFormat]:
        """By the tensors that stand beside a weight."""
        found: dict[str, WeightFormat] = {}
        for key in stored:
            name, mark, kind = key.partition(".weight.quant_state.bitsandbytes__")
            if mark and kind in ("nf4", "fp4"):
                found[name] = WeightFormat(4, 64, storage=kind)  # double or not: the state tells
            elif key.endswith(".SCB"):
                found[key.removesuffix(".SCB")] = WeightFormat(8, -1, storage="llm.int8")
        if not found:
            raise RequestError(f"{folder} says that bitsandbytes quantizes it, but holds no packed weight; load the "
                               "unquantized model without that setting.")
        return found

    def reload(self, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """By transformers."""
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # brings bitsandbytes along

        with no_bars():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        dense = {}
        for name, parameter in model.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            dense[name] = dequantize_bnb_weight(parameter, getattr(module, "state", None)).to(dtype)
        return dense
