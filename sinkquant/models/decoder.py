"""What a decoder is: its blocks, the linears in them, what engines fuse, and the size of everything."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.pytorch_utils import Conv1D

from sinkquant.artifacts import EndShape, LinearShape, ModelFacts, ModelShape
from sinkquant.errors import RequestError
from sinkquant.models.alone import StoredPart
from sinkquant.models.attention import require_attention_interface
from sinkquant.models.blocks import (
    MIXER_REASON,
    attention_of,
    blocks_of,
    kv_layers,
    layer_config,
    mixers_of,
    without_attention,
)
from sinkquant.models.experts import EXPERTS_REASON, ExpertLinear, expert_linears, fused_parameters, not_loaded_from
from sinkquant.models.gguf import source_notes
from sinkquant.models.source import WeightSource, folder_of, source_of
from sinkquant.models.stored import StoredTensor
from sinkquant.models.structure import Structure, inputs, refusals, structure_of
from sinkquant.models.unused import unused_of
from sinkquant.schemes.tensors import scale_dtype

FUSED_BY_ENGINES = (("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"),
                    ("w1", "w3"))
ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.(proj|layer|wg|classifier))?$")
ROUTER_REASON = "router: its few weights decide which expert is read"


@dataclass(frozen=True)
class Decoder:
    """A causal language model seen as a list of blocks.

    Attributes:
        model: the model itself.
        block_names: module name of every block, in order.
        blocks: the blocks.
        linears: module name -> `nn.Linear` or `Conv1D`, for every one inside the blocks, in order.
        experts: name -> projection of one expert, for those that are parts of fused parameters.
        alone: name -> those of them that are in memory by themselves right now, [rows, columns].
        quiet: index of every block without an attention matrix -> what it is instead. Nothing in it is changed.
    """

    model: PreTrainedModel
    block_names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    linears: dict[str, nn.Module]
    experts: dict[str, ExpertLinear] = field(default_factory=dict)
    alone: dict[str, torch.Tensor] = field(default_factory=dict)
    quiet: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Decoder:
        """Find the blocks of a model.

        Raises:
            RequestError: the architecture is not a decoder whose attention can be observed, or the model is wrapped by
                torch.compile or PEFT.
        """
        _require_plain(model)
        require_attention_interface(model)
        config = model.config.get_text_config(decoder=True)
        name, blocks = blocks_of(model)
        quiet = {index: why for index, block in enumerate(blocks) if (why := without_attention(config, index, block))}
        if len(quiet) == len(blocks):
            raise RequestError(f"{type(model).__name__} is not supported: none of its layers has an attention matrix.")
        if any(getattr(module, "is_causal", True) is False for index, block in enumerate(blocks) if index not in quiet
               for module in attention_of(block)):
            raise RequestError(f"{type(model).__name__} is not supported: its attention also looks ahead; a decoder's "
                               "is causal (config.json: is_decoder).")
        names = tuple(f"{name}.{i}" for i in range(len(blocks)))
        linears = {f"{name}.{path}": module for path, module in blocks.named_modules()
                   if isinstance(module, nn.Linear | Conv1D)}
        attending = tuple(one for index, one in enumerate(names) if index not in quiet)
        return cls(model, names, tuple(blocks), linears, expert_linears(model, attending), quiet=quiet)

    @property
    def source(self) -> WeightSource | None:
        """Where the weights are read while they are needed; None where the model holds them all."""
        return source_of(self.model)

    @contextlib.contextmanager
    def present(self, modules: Sequence[nn.Module], without: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Hold the weights of some modules, but for others inside these, in memory while the context is open; a model
        that holds its own always does."""
        with self.source.present(modules, without) if self.source else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def present_alone(self, parts: Mapping[str, StoredPart]) -> Iterator[None]:
        """Hold some projections of experts in memory while the context is open, nothing else of their layer. Changes
        that are made to them are lost at its end."""
        try:
            for name, part in parts.items():
                self.alone[name] = part.read()
            yield
        finally:
            for name in parts:
                self.alone.pop(name, None)

    @property
    def structure(self) -> Structure:
        """What reads and what writes the residual stream; no weight is read."""
        return structure_of(self.model, self.block_names, self.blocks)

    @property
    def dtype_name(self) -> str:
        """What checkpoints call the dtype of the model's weights."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def scale_dtype(self) -> torch.dtype:
        """What scales of the model's packed weights are stored in."""
        return getattr(torch, scale_dtype(self.dtype_name))

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    @property
    def max_length(self) -> int:
        """Longest row that the model has positions for."""
        return max_length(self.model)

    @property
    def vocabulary(self) -> int:
        """Number of rows of the input embedding."""
        return vocabulary_of(self.model)

    def weight(self, name: str) -> torch.Tensor:
        """The weight of a linear, or of a part of a fused parameter, [out_features, in_features]; no copy."""
        if name in self.alone:
            return self.alone[name]
        return self.experts[name].weight if name in self.experts else weight_matrix(self.linears[name])

    def put(self, name: str, new: torch.Tensor) -> None:
        """Let a linear, or a part of a fused parameter, hold another weight [out_features, in_features] of the same
        dtype."""
        if name in self.experts:
            self.weight(name).copy_(new)
        else:
            self.linears[name].weight.data = as_stored(self.linears[name], new)

    @property
    def attending(self) -> list[int]:
        """The blocks with an attention matrix."""
        return [index for index in range(len(self.blocks)) if index not in self.quiet]

    def block_of(self, name: str) -> int:
        """Index of the block that a module name lies in."""
        for index, block in enumerate(self.block_names):
            if name.startswith(block + "."):
                return index
        raise KeyError(name)

    def facts(self, name: str) -> ModelFacts:
        """The model in a few numbers."""
        # Of the first layer, where they differ.
        config = layer_config(self.model.config.get_text_config(decoder=True), 0)
        heads = int(config.num_attention_heads)
        return ModelFacts(
            name=name, architecture=type(self.model).__name__, layers=len(self.blocks), heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads), hidden_size=self.hidden_size,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            dtype=self.dtype_name)

    def shape(self, name: str) -> ModelShape:
        """Names and shapes of everything that a checkpoint of this model holds."""
        mixers = tuple(f"{mixer}." for name, block in zip(self.block_names, self.blocks, strict=True)
                       for mixer in mixers_of(name, block))
        linears = {path: _linear_shape(self, path, module, mixers) for path, module in self.linears.items()}
        structure, folder = self.structure, folder_of(self.model)
        reads = inputs(structure)
        for path, linear in list(linears.items()):
            kind, takes = reads.get(path, (None, None))
            linears[path] = linear.model_copy(update={"fused_with": _fused_with(path, linears), "reads": kind,
                                                      "scaled_by": takes})
        linears |= self._expert_shapes()
        ignored = self.model._keys_to_ignore_on_save or ()
        state = {key: value for key, value in self.model.state_dict().items() if key not in ignored}
        tensors = {key: _declared(value)
                   for key, value in remove_tied_weights_from_state_dict(state, self.model).items()}
        unused, cannot = unused_of(self.model), refusals(structure)
        if unused.carried:
            cannot.setdefault("full", f"it comes with {next(iter(unused.carried))}, which transformers does not "
                                      "compute with and a rotation would leave behind")
        carried = {key: _declared(one) for key, one in unused.carried.items()}
        return ModelShape(name=name, architecture=type(self.model).__name__, blocks=len(self.blocks),
                          dtype=self.dtype_name, linears=linears, tensors=tensors,
                          kv_layers=kv_layers(self.model.config), not_rotated=cannot,
                          untied=self._untied(structure), not_loaded_from=not_loaded_from(self.model, self.block_names),
                          carried=carried, ends=self._ends(tensors),
                          attentions=self._attentions(), folder=None if folder is None else str(folder),
                          notes=[*source_notes(folder), *unused.notes()])

    def _attentions(self) -> dict[str, int]:
        """Attentions whose keys and values compressed-tensors rounds, with their KV heads."""
        config = self.model.config.get_text_config(decoder=True)
        inside = tuple(f"{name}." for name in self.block_names)
        heads = {name: int(getattr(layer_config(config, self.block_of(name)), "num_key_value_heads", None) or 0)
                 for name, module in self.model.named_modules()
                 if name.startswith(inside) and is_cached_attention_module(module)}
        return {name: count for name, count in heads.items() if count}

    def _ends(self, tensors: Mapping[str, object]) -> dict[str, EndShape]:
        """The token embedding and the output head. tensors: of the unquantized checkpoint, by name."""
        names = {id(module): name for name, module in self.model.named_modules()}
        table, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        found, first = {}, names.get(id(table), "")
        if isinstance(table, nn.Embedding) and f"{first}.weight" in tensors:
            buffers = {leaf: _declared(buffer)
                       for leaf, buffer in table.named_buffers() if f"{first}.{leaf}" not in tensors}
            found[first] = EndShape(kind="embedding", rows=table.weight.shape[0], columns=table.weight.shape[1],
                                    buffers=buffers)
        last = names.get(id(head), "")
        if isinstance(head, nn.Linear) and (f"{last}.weight" in tensors or first in found):
            found[last] = EndShape(kind="head", rows=head.weight.shape[0], columns=head.weight.shape[1],
                                   shared_with=None if f"{last}.weight" in tensors else first)
        return found

    def _untied(self, structure: Structure) -> dict[str, tuple[str, list[int]]]:
        """The output head's tensor where rotating the residual stream unties it from the token embedding: the gain of
        the last norm has to go into it."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        norm = structure.final
        if head is None or head.weight is not embedding.weight or structure.head is None or norm is None or (
                norm.gain is None):
            return {}
        return {structure.head.weight: _declared(head.weight)}

    def _expert_shapes(self) -> dict[str, LinearShape]:
        """Every projection of every expert; fused parameters whose experts cannot be told apart as a whole."""
        together = list(self.experts)
        split = {part.parameter for part in self.experts.values()}
        shapes = {}
        for name, parameter in fused_parameters(self.model, self.block_names).items():
            if name not in split:
                shapes[name] = LinearShape(rows=parameter.shape[0] * parameter.shape[1], columns=parameter.shape[2],
                                           block=self.block_of(name), fused_with=[name],
                                           fixed=self.quiet.get(self.block_of(name), EXPERTS_REASON))
        for name, part in self.experts.items():
            shapes[name] = LinearShape(rows=part.rows, columns=part.weight.shape[1], block=self.block_of(name),
                                       part_of=part.parameter).model_copy(update={"fused_with": together})
        return dict(sorted(shapes.items(), key=lambda item: item[1].block))


def _require_plain(model: PreTrainedModel) -> None:
    """Refuse modules that another library has wrapped, whose names and weights no checkpoint has."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise RequestError(f"{name or 'the model'} is compiled; hand over the model that torch.compile was given.")
        if hasattr(module, "base_layer"):
            raise RequestError(f"{name} carries an adapter; merge it first (PEFT's merge_and_unload), or name the "
                               "adapter's folder to a command.")


def _declared(tensor: torch.Tensor | StoredTensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def max_length(model: PreTrainedModel) -> int:
    """Longest row that a model has positions for."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit) if limit else 1 << 20


def vocabulary_of(model: PreTrainedModel) -> int:
    """Number of rows of a model's input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def require_dense(model: PreTrainedModel) -> None:
    """Raises RequestError if a linear keeps its weights packed, or a parameter is FP8, offloaded, or made in inference
    mode, which cannot be observed."""
    for name, module in model.named_modules():
        if getattr(type(module), "keeps_packed", False):
            raise RequestError(f"{name} keeps its weights packed; load the checkpoint without packed=True.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta and source_of(model) is None:
            raise RequestError(f"the weight {name} is not in memory (offloaded, or on the meta device); load the model "
                               "whole, or name its folder to a command.")
        if parameter.is_inference():
            raise RequestError("the model was loaded under torch.inference_mode(), where weights come that cannot be "
                               "cast; load it outside, or by sinkquant.load.")
        if parameter.is_floating_point() and parameter.itemsize == 1:
            raise RequestError(f"the weight {name} is in {str(parameter.dtype).removeprefix('torch.')}; give the "
                               "model's folder, from which it is dequantized.")


def weight_matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a linear as [out_features, in_features], whichever way the module stores it."""
    weight = module.weight.data
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def as_stored(module: nn.Module, matrix: torch.Tensor) -> torch.Tensor:
    """A weight [out_features, in_features] the way the module stores it."""
    return matrix.T.contiguous() if isinstance(module, Conv1D) else matrix


def _linear_shape(decoder: Decoder, path: str, module: nn.Module, mixers: tuple[str, ...]) -> LinearShape:
    rows, columns = weight_matrix(module).shape
    block = decoder.block_of(path)
    fixed = decoder.quiet.get(block) or (MIXER_REASON if path.startswith(mixers) else
                                         ROUTER_REASON if ROUTER.search(path) else None)
    return LinearShape(rows=rows, columns=columns, block=block, fixed=fixed, transposed=isinstance(module, Conv1D))


def _fused_with(path: str, linears: dict[str, LinearShape]) -> list[str]:
    parent, _, leaf = path.rpartition(".")
    for group in FUSED_BY_ENGINES:
        if leaf in group:
            members = [f"{parent}.{name}" for name in group if f"{parent}.{name}" in linears]
            return members if len(members) > 1 else [path]
    return [path]
