"""The scales of an FP8 KV cache, from the calibration rows, and a model that rounds keys and values with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from compressed_tensors.modeling.kvcache import initialize_hooked_kv_cache
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Plan
from sinkquant.artifacts.kv_scheme import LEAVES, KVScheme
from sinkquant.errors import RequestError
from sinkquant.models import ActivationStore, AttentionRecord, Decoder, Walk
from sinkquant.quantize.rows import text_rows
from sinkquant.quantize.statistics import TokenWeights

LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)
SMALLEST = 1e-6
"""Of a scale: a layer whose values are all zero has one, too."""


def kv_scales(decoder: Decoder, plan: Plan, tokenizer: PreTrainedTokenizerBase | None, device: str, dtype: torch.dtype,
              store: ActivationStore | None = None) -> dict[str, torch.Tensor]:
    """The largest key and value of every layer, or of every head, over FP8's largest number, by the names of their
    tensors and in the model's dtype; empty where the plan asks for none.

    Args:
        decoder: of the unquantized model, rotated as the plan says.

    Raises:
        RequestError: no tokenizer, or too little text.
    """
    scheme = plan.kv_scheme
    if scheme is None:
        return {}
    if tokenizer is None:
        raise RequestError("kv_cache_scheme takes its scales from calibration rows; hand over the tokenizer.")
    settings = plan.calibration
    rows = text_rows(decoder, settings, tokenizer)
    excluded = TokenWeights(rows, settings).sinks if scheme.sinks == "exclude" else torch.zeros(
        rows.shape, dtype=torch.bool)
    found: dict[str, torch.Tensor] = {}
    walk = Walk(decoder, rows, settings.batch_size, device, dtype, store=store)
    names = list(decoder.shape("").attentions)
    for step in walk.steps():
        seen = _Ranges(excluded, lambda step=step: step.batch)  # type: ignore[misc]
        walk.observers.append(seen)
        step.run()
        walk.observers.remove(seen)
        for leaf, largest in zip(LEAVES, (seen.keys, seen.values), strict=True):
            reach = largest.amax().reshape(1) if scheme.strategy == "tensor" else largest.reshape(-1, 1, 1)
            scale = (reach.float() / LARGEST).clamp(min=SMALLEST)
            found[f"{names[step.index]}.{leaf}"] = scale.to("cpu", decoder.model.dtype)
    return found


@dataclass
class _Ranges:
    """The largest |key| and |value| of every KV head of a layer, [heads]. excluded: bool [rows, length]; batch: which
    rows are at hand."""

    excluded: torch.Tensor
    batch: Callable[[], slice]
    keys: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    values: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def attention(self, record: AttentionRecord) -> None:
        """Look at one batch."""
        counted = ~self.excluded[self.batch()].to(record.key.device)[:, None, :, None]
        for name, states in (("keys", record.key), ("values", record.value)):
            largest = (states.float().abs() * counted).amax((0, 2, 3)).cpu()
            setattr(self, name, torch.maximum(getattr(self, name), largest))


def round_cache(model: PreTrainedModel, scheme: KVScheme, scales: dict[str, torch.Tensor]) -> None:
    """Let every attention of a model round its keys and values as compressed-tensors does in transformers.

    Args:
        scales: as `kv_scales` gives them.
    """
    arguments = QuantizationArgs(**scheme.arguments())
    for name in dict.fromkeys(key.rpartition(".")[0] for key in scales):
        module = model.get_submodule(name)
        module.quantization_scheme = QuantizationScheme(targets=[name], input_activations=arguments)
        initialize_hooked_kv_cache(model, module)
        initialize_module_for_quantization(module, force_zero_point=False)
        module.quantization_status = QuantizationStatus.COMPRESSED
        for leaf in LEAVES:
            parameter = module.get_parameter(leaf)
            parameter.data = scales[f"{name}.{leaf}"].to(parameter.device, parameter.dtype)
