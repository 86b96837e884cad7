"""The same architecture with fewer blocks: its configuration, the model on the meta device, and what every tensor was
called before.

A block that stays has to be built as it was. What a configuration says of single layers is shortened by the names that
transformers gives to it; then every module of every block that stays is compared with the one that it stands for, so
that what follows from the index of a layer by a rule that is not known here is refused and never changes in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sinkquant.errors import RequestError, first_line
from sinkquant.models.decoder import Decoder
from sinkquant.models.head import keep_head
from sinkquant.models.loading import auto_class

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "indexer_types",
             "sliding_windows", "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "layers_num_experts",
             "activation_sparsity_pattern", "intermediate_size", "swiglu_limits", "swiglu_limits_shared")
"""Keys of a configuration that hold a list with a value for every layer."""
INDICES = ("mlp_only_layers", "moe_layers", "rope_scaling_layers", "attn_layer_indices")
"""Keys that hold a list of layers."""
LEADING = ("first_k_dense_replace", "num_dense_layers")
"""Keys that hold a number of layers at the beginning that are of another kind than the rest."""
OF_FOLDER = ("quantization_config", "transformers_version", "architectures", "model_type", "auto_map", "_name_or_path",
             "transformers_weights")
"""Keys of the whole model's folder, whose other blocks would count as tensors that nothing computes with."""
SHARED = ("num_kv_shared_layers", "kv_sharing_modes", "num_hidden_groups")
"""Keys by which layers read the keys and values, or the weights, of other layers."""
NUMBER = ("layer_idx", "layer_index", "layer_id")
"""Attributes that hold the index of a layer, which names its place in a cache."""


def require_blocks_apart(model: PreTrainedModel) -> None:
    """Refuse a model whose configuration lets blocks read each other's keys and values or weights; weights that are the
    same in two blocks `Decoder.of` refuses."""
    config = model.config.get_text_config(decoder=True)
    for key in SHARED:
        value = getattr(config, key, None)
        value = any(value) if isinstance(value, list | tuple) else value  # of every layer; none: its own
        if value and not (key == "num_hidden_groups" and value == config.num_hidden_layers):
            raise RequestError(f"{type(model).__name__} shares keys and values or weights between blocks ({key} is "
                               f"{value!r}), so that none can be taken out alone; leave prune.blocks out.")


def shorter_model(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """The model on the meta device with some of its blocks only.

    Args:
        kept: indices of the blocks that stay, ascending.

    Raises:
        RequestError: transformers cannot build it, or would build a block that stays in another way.
    """
    require_blocks_apart(model)
    try:
        config = shorter_config(model.config, kept)
        keep_head(model, config)
        with init_empty_weights(include_buffers=False):
            shorter = auto_class(model.config).from_config(config, dtype=model.dtype)
    except Exception as error:  # every architecture has its own way to say so
        raise RequestError(f"transformers cannot build {type(model).__name__} with {len(kept)} blocks "
                           f"({first_line(error)}); leave prune.blocks out.") from error
    shorter.tie_weights()
    _require_same(model, shorter, kept)
    return shorter.eval()


def shorter_config(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """A copy of a configuration for some of the layers; what it says of single layers is shortened.

    Raises:
        Exception: whatever its class says of numbers that it does not take.
    """
    text = config.get_text_config(decoder=True)
    settings = config.to_dict()
    inside = next((key for key, value in vars(config).items() if value is text), None)
    settings = settings | {inside: _shortened(settings[inside], text, kept)} if inside else _shortened(settings, text,
                                                                                                    kept)
    return type(config)(**{key: value for key, value in settings.items() if key not in OF_FOLDER})


def old_name(decoder: Decoder, name: str, kept: Sequence[int]) -> str:
    """What a tensor of the shorter model is called in the whole one.

    Args:
        decoder: of the whole model.
    """
    prefix = decoder.block_names[0].rpartition(".")[0] + "."
    if not name.startswith(prefix):
        return name
    index, dot, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{kept[int(index)]}{dot}{rest}"


def _shortened(settings: dict[str, Any], text: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    count = text.num_hidden_layers
    found = {key: told_of(key, value, kept) for key, value in settings.items()}
    found[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    for key, value in settings.items():
        if key in PER_LAYER and isinstance(value, list | tuple) and len(value) == count:
            found[key] = [value[index] for index in kept]
    return found


def told_of(key: str, value: Any, kept: Sequence[int]) -> Any:
    """What a setting that counts or names layers is where only these are there; any other as it is."""
    if key in INDICES and isinstance(value, list | tuple):
        return [place for place, index in enumerate(kept) if index in value]
    if key in LEADING and isinstance(value, int):
        return sum(index < value for index in kept)
    if key == "per_layer_config" and isinstance(value, dict):
        return {place: value[name] for place, index in enumerate(kept) for name in (index, str(index)) if name in value}
    return value


def _require_same(model: PreTrainedModel, shorter: PreTrainedModel, kept: Sequence[int]) -> None:
    """Refuse a shorter model one of whose blocks is built otherwise than the one that it stands for, or that differs
    outside the blocks."""
    before, after = Decoder.of(model), Decoder.of(shorter)
    whole, left = model.state_dict(), shorter.state_dict()
    for name, tensor in left.items():
        old = old_name(before, name, kept)
        if old not in whole or whole[old].shape != tensor.shape:
            raise RequestError(f"{type(model).__name__} holds {old} in another shape with {len(kept)} blocks, so that "
                               "none can be taken out; leave prune.blocks out.")
    for place, index in enumerate(kept):
        one, other = before.blocks[index], after.blocks[place]
        told, built = dict(_facts(one)), dict(_facts(other))
        for key in sorted(told.keys() | built.keys()):
            if told.get(key) != built.get(key):
                raise RequestError(f"the blocks of {type(model).__name__} differ in kind: as number {place}, block "
                                   f"{index} would have {key} {built.get(key)!r} instead of {told.get(key)!r}; leave "
                                   "prune.blocks out.")


def _facts(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """What modules of a block are, and their plain attributes, by dotted name; not the index of the layer."""
    for path, module in block.named_modules():
        yield f"{path or 'block'}'s class", type(module).__name__
        for key, value in vars(module).items():
            plain = isinstance(value, int | float | bool | str | tuple) or value is None
            if plain and key not in NUMBER and not key.startswith("_") and key != "training":
                yield f"{path}.{key}".lstrip("."), value
        for key, tensor in module.named_parameters(recurse=False):
            yield f"{path}.{key}".lstrip("."), tuple(tensor.shape)
        for key, tensor in module.named_buffers(recurse=False):
            yield f"{path}.{key}".lstrip("."), tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else None
