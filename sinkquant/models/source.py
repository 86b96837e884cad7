"""A model whose weights stay on disk: a transformers model on the meta device, filled module by module.

transformers' own loader puts a checkpoint's tensors into the modules that are asked for, so that renamed and fused
tensors (experts) come out as `from_pretrained` gives them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from compressed_tensors.quantization import QuantizationArgs
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.loading_report import LoadStateDictInfo

from sinkquant.errors import RequestError, SinkquantError
from sinkquant.lazy import uncollected
from sinkquant.models.edits import Edit, EditedTensor
from sinkquant.models.folder import cached
from sinkquant.models.groups import groups_of, input_scales
from sinkquant.models.inputs import round_inputs
from sinkquant.models.loading import all_finite, auto_class, loading_errors, read_config
from sinkquant.models.progress import no_transformers_bars
from sinkquant.models.shards import ScaledTensor, Stored, StoredTensor, dense_tensors, stored_tensors
from sinkquant.models.stored import runs_of_rows

ATTRIBUTE = "sinkquant_source"
Unpack = Callable[[Mapping[str, StoredTensor], PreTrainedModel, torch.dtype], dict[str, Stored]]


def open_model(folder: Path, trust_remote_code: bool = False, dtype: torch.dtype | None = None,
               unpack: Unpack | None = None) -> PreTrainedModel:
    """The folder's causal language model in evaluation mode, with no weight read yet.

    `Decoder` and `Walk` read its weights block by block; anything else finds tensors on the meta device.

    Args:
        dtype: of the weights; None for the folder's own.
        unpack: gives the dense weights that the tensors of another library's format stand for.

    Raises:
        RequestError: no causal decoder of that architecture, missing tensors or wrong shapes, or a quantization format
            other than sinkquant's.
    """
    config = read_config(folder, trust_remote_code)
    stored = stored_tensors(folder)
    in_order = sorted(stored.items(), key=lambda one: (one[1].path, one[0]))  # the first decides, as in transformers
    dtype = dtype or getattr(config, "dtype", None) or next(
        (tensor.dtype for _, tensor in in_order if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1),
        torch.float32)
    with loading_errors(folder), uncollected(), init_empty_weights(include_buffers=False), no_init_weights():
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    quantization = getattr(config, "quantization_config", None)
    tensors: dict[str, Stored] = dict(stored)
    groups: dict[str, dict[str, Any]] = {}
    if unpack is not None:
        tensors = unpack(stored, model, dtype)
    elif quantization is not None:
        groups = groups_of(folder, quantization, stored)
        bits = {name: int(group["weights"]["num_bits"]) for name, group in groups.items()}
        transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        tensors = dense_tensors(stored, bits, dtype, transposed)
    source = WeightSource(folder, model, tensors, dtype)
    setattr(model, ATTRIBUTE, source)
    args = {name: QuantizationArgs(**group["input_activations"]) for name, group in groups.items()
            if group.get("input_activations")}
    round_inputs(model, _linears(source, args), args,
                 {name: stored[key][...] for name in args for key in input_scales(name) if key in stored})
    return model.eval()


def source_of(model: PreTrainedModel) -> WeightSource | None:
    """Where the weights of a model from `open_model` are read; None for a model that holds its own."""
    source = getattr(model, ATTRIBUTE, None)
    return source if isinstance(source, WeightSource) else None


def folder_of(model: PreTrainedModel) -> Path | None:
    """The local folder that a model was made from, by `open_model` or by `from_pretrained`; None for one that was made
    in memory, or whose folder is gone."""
    source = source_of(model)
    if source is not None:
        return source.folder
    name = str(getattr(model, "name_or_path", "") or "")
    if not name:
        return None
    folder = Path(name)
    if not folder.is_dir():
        folder = cached(name, getattr(model.config, "_commit_hash", None)) or folder
    return folder if (folder / "config.json").is_file() else None


def require_unquantized(model: PreTrainedModel) -> None:
    """Refuse a folder's model whose weights were quantized."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise RequestError("this model is quantized already; start from the unquantized one.")


def runs_own_code(loaded: object) -> bool:
    """Whether the code of a model or a tokenizer came with its folder, so that it was trusted before."""
    return type(loaded).__module__.startswith("transformers_modules")


class WeightSource:
    """Fills modules of a meta model from a checkpoint.

    Attributes:
        folder: the checkpoint.
        keys: parameter name -> the names on disk of the tensors that it is made of.
        edits: parameter name -> what is done to it whenever it is read.
        compared: whether it took the weights' values to find out which parameters are tied.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, tensors: dict[str, Stored], dtype: torch.dtype) -> None:
        self.folder, self.model, self.tensors = folder, model, tensors
        self.config = LoadStateDictConfig(
            dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=get_model_conversion_mapping(model),
            device_map={"": "meta"})
        self.keys: dict[str, list[str]] = {}
        self.edits: dict[str, Edit] = {}
        self.converted: set[str] = set()
        self.aliases: dict[str, str] = {}
        self.compared = False
        missing = self._match()
        self._tie(missing)
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.aliases = {name: self.names[id(parameter)]
                        for name, parameter in model.named_parameters(remove_duplicate=False)}
        for name, own in self.aliases.items():
            if own not in self.keys and name in self.keys:  # safetensors' save_model keeps the first name of a tensor
                self.tensors[own], self.keys[own] = self.tensors[self.keys[name][0]], [own]
        self.config = dataclasses.replace(self.config, device_map={"": "cpu"})
        self._fill({name for name, _ in model.named_buffers()} & set(self.keys))  # small, and they stay

    @contextlib.contextmanager
    def present(self, modules: Iterable[nn.Module], without: Iterable[nn.Module] = ()) -> Iterator[None]:
        """Hold the parameters of some modules in memory, in their own dtype on the CPU, while the context is open.

        Changes that are made to them are lost at its end.

        Args:
            without: modules inside these that stay on disk.

        Raises:
            RequestError: a weight holds NaN or Inf.
        """
        left = {id(module) for top in without for module in top.modules()}
        wanted = {id(module): module for top in modules for module in top.modules() if id(module) not in left}
        before = [(module, dict(module._parameters)) for module in self.model.modules()]
        slots = [(module, leaf, self.names[id(parameter)]) for module in wanted.values()
                 for leaf, parameter in module._parameters.items() if parameter is not None and parameter.is_meta]
        try:
            self._fill({name for _, _, name in slots})
            filled = {name: self.model.get_parameter(name) for _, _, name in slots}
            for module, leaf, name in slots:  # a tied parameter was filled where its name is
                module._parameters[leaf] = filled[name]
            yield
        finally:
            for module, parameters in before:
                module._parameters.update(parameters)

    def name_of(self, parameter: torch.Tensor) -> str:
        """The name of a parameter of the meta model; parameters that are tied have one."""
        return self.names[id(parameter)]

    def stored(self, name: str) -> StoredTensor | ScaledTensor | EditedTensor | None:
        """The tensor on disk that is this parameter as it stands, or by rows of itself; None where it has to be
        converted."""
        name = self.aliases.get(name, name)
        tensor = self.tensors[self.keys[name][0]] if name in self.keys and name not in self.converted else None
        edit = self.edits.get(name)
        if isinstance(tensor, StoredTensor | ScaledTensor) and edit is None:
            return tensor
        if not isinstance(tensor, StoredTensor) or edit is None:
            return None
        dtype = self.model.get_parameter(name).dtype
        return EditedTensor(tensor, edit, dtype) if edit.by_rows and len(tensor.shape) == 2 else None

    def replace(self, name: str, tensor: Stored) -> None:
        """Read a parameter from somewhere else from now on, unedited.

        Args:
            tensor: of the same shape.
        """
        if len(self.keys[name]) > 1 or name in self.converted:
            self.keys[name] = [name]
            self.converted.discard(name)
        (key,) = self.keys[name]
        self.tensors[key] = tensor
        self.edits.pop(name, None)

    def untie(self, name: str, parameter: nn.Parameter) -> None:
        """Give a parameter that is tied to another one a name of its own; it is read from where the other is, edited
        alike.

        Args:
            parameter: what the model holds in its place from now on.
        """
        other = self.aliases[name]
        self.tensors[name] = self.tensors[self.keys[other][0]]
        self.keys[name] = [name]
        if other in self.edits:
            self.edits[name] = self.edits[other]
        self.names[id(parameter)] = self.aliases[name] = name

    def replace_parts(self, name: str, tensors: dict[str, Stored]) -> None:
        """Read a fused parameter from other tensors from now on, unedited.

        Args:
            tensors: what it is stacked from, under names that transformers knows for them.
        """
        self.tensors |= tensors
        self.keys[name] = list(tensors)
        self.converted.add(name)
        self.edits.pop(name, None)

    def _match(self) -> set[str]:
        """Find out what every parameter is made of: transformers loads the checkpoint without its data.

        Returns:
            the names of the parameters and buffers that nothing on disk gives.
        """
        renamings = [entry for entry in self.config.weight_mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.config.weight_mapping if isinstance(entry, WeightConverter)]
        state = self.model.state_dict()
        direct: dict[str, str] = {}
        groups: dict[str, list[str]] = {}
        for key in self.tensors:
            name, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            if pattern is not None and name in state:
                groups.setdefault(name, []).append(key)
            else:
                direct[key] = name if name in state else key
        missing = set(state)
        for keys in (list(direct), *groups.values()):
            info = self._load({key: torch.empty(self.tensors[key].shape, dtype=self.tensors[key].dtype, device="meta")
                               for key in keys})
            if info.mismatched_keys:
                name, found, needed = sorted(info.mismatched_keys)[0]
                raise RequestError(f"{self.folder} holds {name} with the shape {list(found)} where {list(needed)} is "
                                   "needed; the checkpoint does not belong to its config.json.")
            made = set(state) - info.missing_keys
            missing -= made
            if keys and keys[0] not in direct:
                self.keys |= dict.fromkeys(made, keys)
                self.converted |= made
        self.keys |= {name: [key] for key, name in direct.items() if name in state}
        return missing

    def _tie(self, missing: set[str]) -> None:
        """Tie what the configuration ties, as `from_pretrained` does.

        Raises:
            RequestError: something is missing after that.
        """
        tied = getattr(self.model, "all_tied_weights_keys", {})
        for target, source in list(tied.items()):
            if target not in missing and source not in missing:
                if self._equal(target, source):
                    missing.add(target)
                else:
                    tied.pop(target)
        info = LoadStateDictInfo(missing_keys=missing, unexpected_keys=set(), mismatched_keys=set(), error_msgs=[],
                                 conversion_errors={}, skipped_pp_keys=set())
        self.model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        self.model._adjust_missing_and_unexpected_keys(info)
        if info.missing_keys:
            raise RequestError(f"{self.folder} lacks the tensor {sorted(info.missing_keys)[0]}; "
                               "the checkpoint does not belong to its config.json.")

    def _equal(self, first: str, second: str) -> bool:
        """Whether two parameters hold the same values on disk."""
        self.compared = True
        a, b = self.stored(first), self.stored(second)
        if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        return all(torch.equal(a.rows(*span), b.rows(*span)) for span in runs_of_rows(a.shape))

    def _fill(self, names: set[str]) -> None:
        """Read the named parameters, and whatever else is made of the same tensors, into the model."""
        keys = {key: self.tensors[key] for name in sorted(names) for key in self.keys[name]}
        if not keys:
            return
        info = self._load(keys)
        if info.conversion_errors:
            raise SinkquantError(f"{self.folder}: {next(iter(info.conversion_errors.values()))}")
        for name in names:
            tensor = self.model.get_parameter_or_buffer(name)
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                require_finite(name, tensor.data)
        for name, edit in self.edits.items():  # of all that was read, what shares a tensor on disk included
            if not keys.keys().isdisjoint(self.keys[name]):
                parameter = self.model.get_parameter(name)
                parameter.data = edit(parameter.data)

    def _load(self, tensors: dict[str, Any]) -> LoadStateDictInfo:
        with loading_errors(self.folder), no_transformers_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, self.config)
        return info


def require_finite(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight that was just read if it holds NaN or Inf."""
    if not all_finite(weight):
        raise RequestError(f"the weight {name} holds NaN or Inf; the checkpoint is broken, get it again.")


def _linears(source: WeightSource, names: Iterable[str]) -> dict[str, nn.Module]:
    """Name on disk -> module of linears whose inputs are rounded.

    Raises:
        RequestError: one is no module, such as an expert that transformers stacks with the others.
    """
    modules = dict(source.model.named_modules())
    loaded = {key: name for name, keys in source.keys.items() if name not in source.converted for key in keys}
    inside = {name: loaded.get(f"{name}.weight", name).removesuffix(".weight") for name in names}
    stacked = next((name for name in inside if inside[name] not in modules), None)
    if stacked is not None:
        raise RequestError(f"{source.folder} rounds the inputs of {stacked}, which is no module of its own in "
                           "transformers; start from the unquantized model.")
    return {name: modules[place] for name, place in inside.items()}
