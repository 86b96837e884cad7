"""A checkpoint -> model and tokenizer, with weights as dense as any other model's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload.dispatch import remove_dispatch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Plan, SinkMap
from sinkquant.cache import Bases, Prefix, install, load_bases, load_prefix
from sinkquant.errors import RequestError, first_line
from sinkquant.formats.opened import InputRounding, check_readable, plain, read_json
from sinkquant.formats.own import METHOD, made_dense
from sinkquant.formats.packed import load_packed
from sinkquant.formats.placed import DeviceMap, Placement
from sinkquant.formats.simulated import simulate
from sinkquant.models import cast_experts, check_finite, load_model, load_tokenizer, open_model, pick_device, resolve
from sinkquant.models.inputs import let_through, round_inputs
from sinkquant.models.loading import class_for, dtype_named, loading_errors, require_complete
from sinkquant.models.numerics import own_numerics
from sinkquant.models.progress import no_progress_bars
from sinkquant.quantize import UNPACKED
from sinkquant.schemes.codecs.reading import dense_of, is_library, open_checkpoint, rounds_inputs

KV_PREFIX = "kv_prefix/prefix.safetensors"
KV_BASES = "kv_bases/bases.safetensors"
"""In folders of their own: some engines load every safetensors file beside config.json as weights."""


@own_numerics()
def load(folder: str | os.PathLike[str], dtype: torch.dtype | str = "auto", device: str = "cpu", *,
         packed: bool = False, head_bits: int = 16, device_map: DeviceMap | None = None,
         max_memory: Mapping[int | str, int | str] | None = None,
         offload_folder: str | os.PathLike[str] | None = None,
         trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint that sinkquant wrote, or any other that transformers can.

    Packed weights are made dense at once, so that the model can be observed, evaluated and generated from. With
    `packed` they stay packed, to generate from in less memory and faster; `packing` says which do. `head_bits` 8 or 4
    then rounds the token embedding and the output head too, which changes what the model computes. Where the
    checkpoint's plan packs the KV cache, `generate` does so unless it is given another cache.

    `device_map`, `max_memory` and `offload_folder` are accelerate's. What is offloaded of an unquantized model is never
    in memory as a whole; a quantized one is loaded into main memory first, dense or packed, then sent where it belongs.

    Raises:
        RequestError: the folder is not a complete checkpoint, has no tokenizer, or is quantized in a way that is not
            read here; or the model cannot be packed or placed as asked.
    """
    if head_bits != 16 and not packed:
        raise RequestError("head_bits rounds a model that is loaded with packed=True; give that too.")
    placement = Placement.asked(device_map, max_memory, offload_folder, device)
    path = resolve(str(folder)).resolve()  # the model remembers it, wherever the process goes
    tokenizer = load_tokenizer(path, trust_remote_code)
    device = pick_device(device)
    if placement is not None and not packed and read_json(path / "config.json").get("quantization_config") is None:
        model = load_model(path, dtype, trust_remote_code=trust_remote_code, placement=placement.arguments())
        placement = None
    else:
        model = (load_packed(path, dtype, device, head_bits, trust_remote_code) if packed else
                 load_dense(path, dtype, device, trust_remote_code))
    content = read_checkpoint(path)
    if content and packed:
        simulate(model, content["plan"], path)
    if placement is not None:
        placement.apply(model, packed)
    if content and content["plan"].kv_cache is not None:
        install(model, content["plan"].kv_cache, prefix_of(path), bases_of(path), own=True)
    return model, tokenizer


def prefix_of(path: Path) -> Prefix | None:
    """The KV prefix of a checkpoint, or None where it has none."""
    file = path / KV_PREFIX
    return load_prefix(file) if file.is_file() else None


def bases_of(path: Path) -> Bases | None:
    """What a checkpoint's KV cache rotates by, or None where it has nothing of the kind."""
    file = path / KV_BASES
    return load_bases(file) if file.is_file() else None


def load_dense(path: Path, dtype: torch.dtype | str = "auto", device: str = "cpu",
               trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder in evaluation mode, packed weights made dense. Where the checkpoint rounds the inputs of
    linears, so does the model, to the bit as plain transformers does; simulated inputs are rounded too.

    Raises:
        RequestError: it is quantized in another format than compressed-tensors, quantizes outputs or its cache, lacks
            tensors or cannot be unpacked.
    """
    config = read_json(path / "config.json")
    if is_library(path):
        return _load_backend(path, dtype, device, trust_remote_code)
    if config.get("quantization_config") is None:
        return load_model(path, dtype, device, trust_remote_code)
    check_readable(path, config["quantization_config"])
    method = config["quantization_config"]["quant_method"]
    try:
        with no_progress_bars():
            model, info = class_for(path, trust_remote_code).from_pretrained(
                path, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code)
            require_complete(path, info)
            model = model.to(device).eval()
            cast_experts(model)
            with torch.no_grad():
                if method == METHOD:
                    made_dense(model, model.dtype)
                elif model.hf_quantizer.quantization_config.is_quantization_compressed:
                    model.hf_quantizer.compressor.decompress_model(model)
                    remove_dispatch(model)  # a placement of its own, by which a weight that is set is copied
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        raise RequestError(f"{path} is a {method} checkpoint that cannot be loaded: {first_line(error)}.") from error
    inputs = InputRounding()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            plain(module, name, inputs)
            module.weight.data = module.weight.data.to(model.dtype)  # FP4 is unpacked to bfloat16 in any model
    _share_ends(model)
    check_finite(model)
    round_inputs(model, dict(model.named_modules()), inputs.args, inputs.scales, inputs.zero_points)
    content = read_checkpoint(path)
    if content:
        simulate(model, content["plan"], path)
    del model.config.quantization_config
    model.hf_quantizer = None
    setattr(model, UNPACKED, True)
    return model


def _share_ends(model: PreTrainedModel) -> None:
    """Let a head hold the embedding's weight again, whose codes were unpacked once for each of them."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    tied = f"{name}.weight" in model.all_tied_weights_keys  # not of a configuration: which one says it differs
    if tied and head.weight is not table.weight and torch.equal(head.weight, table.weight):
        head.weight = table.weight


def _load_backend(path: Path, dtype: torch.dtype | str, device: str, trust_remote_code: bool) -> PreTrainedModel:
    """A checkpoint of another library: dense where only weights are rounded, so that what is measured is what they are
    worth and not which kernel a CPU has; the library's own modules where inputs are rounded too."""
    if rounds_inputs(path):
        with loading_errors(path), no_progress_bars():
            model, info = class_for(path, trust_remote_code).from_pretrained(
                path, dtype=dtype, device_map={"": device}, output_loading_info=True,
                trust_remote_code=trust_remote_code)
        require_complete(path, info)
    else:
        model = dense_of(open_checkpoint(path, trust_remote_code, dtype_named(dtype))).to(device)
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config
    check_finite(model)
    setattr(model, UNPACKED, True)
    return model.eval()


def open_quantized(path: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint with no weight read yet, for a walk: simulated inputs are rounded, and the tokens of
    its exact prefix let through.

    Raises:
        RequestError: it is quantized in a format that sinkquant does not write.
    """
    model, content = open_model(path, trust_remote_code), read_checkpoint(path)
    if content:
        simulate(model, content["plan"], path)
        let_through(model, content["plan"].kv_cache.prefix if content["plan"].kv_cache else [])
    return model


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """`sinkquant.json` of a checkpoint with "plan" and "sink_map" parsed, or None where there is none.

    Raises:
        RequestError: it is no JSON, or not what `save` writes.
    """
    path = folder / "sinkquant.json"
    if not path.is_file():
        return None
    content = read_json(path)
    content["plan"] = Plan.parse(content.get("plan"), str(path))
    if content.get("sink_map"):
        content["sink_map"] = SinkMap.parse(content["sink_map"], str(path))
    return content


def open_any(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder in any format that is read here, to be looked at: inputs are rounded where it rounds them,
    and weights are read when they are needed where its format allows it."""
    if not is_library(folder):
        return open_quantized(folder, trust_remote_code)
    return (load_dense(folder, trust_remote_code=trust_remote_code) if rounds_inputs(folder) else
            open_checkpoint(folder, trust_remote_code))
