"""A checkpoint -> a model whose weights stay packed in memory: transformers reads it, then every packed linear makes
way for one that computes with torch's kernels."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from compressed_tensors.compressors.base import decompress_module
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer

from sinkquant.errors import RequestError
from sinkquant.formats.opened import InputRounding, check_readable, plain, read_json
from sinkquant.formats.optimum import load_by_optimum
from sinkquant.formats.own import SinkquantQuantizer
from sinkquant.formats.split import split_config
from sinkquant.inference import (
    PACKING,
    Int4,
    KernelLinear,
    Packing,
    RoundedEmbedding,
    int4_on,
    kernel_for,
    packed_embedding,
    round_ends,
    to_large_pages,
)
from sinkquant.models import cast_experts, check_finite
from sinkquant.models.experts import expert_linears, fused_parameters
from sinkquant.models.inputs import round_inputs
from sinkquant.models.loading import auto_class, loading_errors, require_complete
from sinkquant.models.memory import give_back, map_large
from sinkquant.models.progress import no_progress_bars
from sinkquant.quantize import UNPACKED, PackedWeight
from sinkquant.schemes import WeightFormat
from sinkquant.schemes.codecs.gptq import GPTQFiles
from sinkquant.schemes.codecs.packed import unpack
from sinkquant.schemes.codecs.packed_linear import PackedLinear
from sinkquant.schemes.codecs.reading import files_in

LOG = logging.getLogger("sinkquant")
LEFT = "left in 16 bits by the checkpoint"
FUSED = "fused experts: only those of a gate, an up and a down projection without biases are told apart"

KEPT = 1 << 28
"""Bytes of what packing leaves behind after which they are given back to the system: the linears of experts are so
small that the allocator keeps all of it."""


def load_packed(path: Path, dtype: torch.dtype | str = "auto", device: str = "cpu",
                head_bits: int = 16, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a compressed-tensors checkpoint, or one in sinkquant's own format, in bfloat16; weights that no
    kernel takes are dense, and named with the reason by `packing`. `head_bits` 8 or 4 rounds the token embedding and
    the output head, which the checkpoint has in 16 bits, as it is loaded.

    Raises:
        RequestError: the folder's weights are not packed, or packed by another library; another dtype is asked for; the
            device has no kernel; or as `load_dense`.
    """
    if dtype not in ("auto", "bfloat16", torch.bfloat16):
        raise RequestError(f"packed=True computes in bfloat16, as torch's kernels do, not in {dtype}; leave dtype away "
                           "or load without packed=True.")
    if head_bits not in (4, 8, 16):
        raise RequestError(f"head_bits is 4, 8 or 16, not {head_bits}.")
    settings = read_json(path / "config.json").get("quantization_config")
    library = files_in(path)
    if isinstance(library, GPTQFiles):
        if head_bits != 16:
            raise RequestError(f"{path} is in GPTQ's format, which optimum loads, and head_bits rounds what sinkquant "
                               "packs in memory; leave head_bits at 16.")
        return load_by_optimum(path, device, trust_remote_code)
    if library is not None:
        raise RequestError(f"packed=True reads compressed-tensors and sinkquant's own format, and {path} is in another "
                           "library's; load it without packed=True, or with transformers for that library's kernels.")
    if settings is None:
        raise RequestError(f"{path} holds no packed weights; quantize it first, or load it without packed=True.")
    check_readable(path, settings)
    int4 = int4_on(torch.device(device))
    map_large()  # more of what packing leaves behind would stay resident
    with loading_errors(path), no_progress_bars():
        config = split_config(path, trust_remote_code)
        model, info = auto_class(config).from_pretrained(
            path, config=config, dtype=torch.bfloat16, output_loading_info=True,
            trust_remote_code=trust_remote_code)
        require_complete(path, info)
        model = model.to(device).eval()
        cast_experts(model)
        inputs = _replace(model, int4, head_bits)
        to_large_pages(model)
    check_finite(model)
    round_inputs(model, dict(model.named_modules()), inputs.args, inputs.scales, inputs.zero_points)
    del model.config.quantization_config
    model.hf_quantizer = PackedInMemory(model.hf_quantizer.quantization_config)
    setattr(model, UNPACKED, True)
    give_back()
    LOG.info("%s: %s", path.name, getattr(model, PACKING))
    return model


class PackedInMemory(HfQuantizer):
    """What transformers asks about a model whose weights are packed for this machine: they are not saved."""

    requires_calibration = True

    def is_serializable(self) -> bool:
        """Raises RequestError: the order of the codes is this machine's, and the checkpoint is there already."""
        raise RequestError("a model with weights packed for this machine is not saved; copy the folder that it was "
                           "loaded from.")

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


@dataclass
class _Found:
    """`inputs`: how linears round them. `dense`: name -> why it is not packed. `stored`: bytes in the checkpoint of
    those of the blocks that are. `ends`: name -> kernel of the embedding and the head, `end_bytes` theirs in bfloat16.
    """

    inputs: InputRounding = field(default_factory=InputRounding)
    dense: dict[str, str] = field(default_factory=dict)
    stored: int = 0
    ends: dict[str, str] = field(default_factory=dict)
    end_bytes: int = 0


@torch.no_grad()
def _replace(model: PreTrainedModel, int4: Int4, head_bits: int) -> InputRounding:
    """Put kernels in place of the packed linears, one after the other, and make dense what none takes."""
    found, waste = _Found(), 0
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = getattr(head, "weight", None)
    tied = shared is not None and shared is getattr(table, "weight", None)
    for name in [name for name, _ in model.named_modules()]:  # a list of the modules would keep all of them
        module = model.get_submodule(name)
        form = _form_of(module)
        if form is None:
            if isinstance(module, nn.Linear | Conv1D):
                found.dense[name] = LEFT
            continue
        kernel = form if isinstance(form, str) else kernel_for(form, _columns(module))
        if isinstance(kernel, str):
            found.dense[name] = kernel
            continue
        assert isinstance(form, WeightFormat)
        weight = _weight_of(module, form)
        if not torch.isfinite(weight.scale).all():
            raise RequestError(f"the scales of {name} hold NaN or Inf; the checkpoint is broken, get it again.")
        if module is head and tied and isinstance(lookup := model.get_input_embeddings(), RoundedEmbedding):
            weight = replace(weight, codes=lookup.get_buffer("codes"))  # once in memory, as in the checkpoint
        if module is table:
            found.ends[name], found.end_bytes = f"{kernel}, looked up", found.end_bytes + 2 * weight.codes.numel()
            model.set_submodule(name, packed_embedding(name, module, KernelLinear(weight, kernel, int4)))
            continue
        found.inputs.note(name, module)
        if module is head:
            found.ends[name], found.end_bytes = str(kernel), found.end_bytes + (0 if tied else 2 * weight.codes.numel())
        else:
            found.stored += sum(tensor.nbytes for key, tensor in module.state_dict().items() if key != "bias")
        bias = None if module.bias is None else nn.Parameter(module.bias.detach(), requires_grad=False)
        linear = KernelLinear(weight, kernel, int4, bias, getattr(module, "transposed", False))
        model.set_submodule(name, linear.eval())
        module.__dict__.pop("forward", None)  # compressed-tensors' own, a cycle that would keep the words
        waste += 8 * linear.in_features * linear.out_features
        if waste > KEPT:
            give_back()
            waste = 0
    _make_dense(model, found)
    told_apart = {part.parameter for part in expert_linears(model).values()}
    found.dense |= {name: LEFT if name in told_apart else FUSED for name in fused_parameters(model)}
    if head_bits < 16 and found.ends:
        raise RequestError(f"head_bits rounds an embedding and a head of 16 bits, and the checkpoint has packed "
                           f"{' and '.join(found.ends)} already; leave head_bits at 16.")
    ends, end_bytes = round_ends(model, int4, head_bits) if head_bits < 16 else (found.ends, found.end_bytes)
    dense = {name: why for name, why in found.dense.items() if name not in ends}
    setattr(model, PACKING, Packing.of(model, dense, found.stored, ends, end_bytes))
    return found.inputs


def _make_dense(model: PreTrainedModel, found: _Found) -> None:
    """The linears that are still packed, by whoever packed them."""
    if isinstance(model.hf_quantizer, SinkquantQuantizer):
        for name in found.dense:
            module = model.get_submodule(name)
            if isinstance(module, PackedLinear):
                model.set_submodule(name, module.dense(model.dtype))
        return
    model.hf_quantizer.compressor.remove_decompression_hook(model)
    for name in found.dense:
        if isinstance(module := model.get_submodule(name), nn.Linear | nn.Embedding):
            decompress_module(module)
            plain(module, name, found.inputs)


def _form_of(module: nn.Module) -> WeightFormat | str | None:
    """How a linear is packed, in words what is not read here, or None where it is dense."""
    if isinstance(module, PackedLinear):
        return module.form
    scheme = getattr(module, "quantization_scheme", None)
    if not isinstance(module, nn.Linear | nn.Embedding) or scheme is None or scheme.weights is None:
        return None
    weights = scheme.weights
    if not weights.symmetric or weights.strategy not in ("group", "channel") or hasattr(module, "weight_g_idx"):
        how = f"{'' if weights.symmetric else 'asymmetrically '}by {weights.strategy}"
        return f"packed {how}, which is not read here"
    return WeightFormat(weights.num_bits, weights.group_size or -1, weights.type)


def _columns(module: nn.Module) -> int:
    columns = module.embedding_dim if isinstance(module, nn.Embedding) else module.in_features
    assert isinstance(columns, int)
    return columns


def _weight_of(module: nn.Module, form: WeightFormat) -> PackedWeight:
    """The codes of a packed linear, and what stands beside them."""
    if isinstance(module, PackedLinear):
        words, outliers = module.get_buffer("weight_packed"), module.outliers
        return PackedWeight(unpack(words, form.bits, module.in_features), module.get_buffer("weight_scale"), form.bits,
                            outliers)
    assert isinstance(module, nn.Linear | nn.Embedding)
    scale = module.get_parameter("weight_scale").data
    stored = module._parameters.get("weight_packed")
    codes = module.weight.data if stored is None else unpack(stored.data, form.bits, _columns(module))
    return PackedWeight(codes, scale, form.bits)
