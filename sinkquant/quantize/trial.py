"""The form of a checkpoint is tried before anything is computed: a tiny random model of the same class is written as
the plan says, loaded by the library that reads such checkpoints, and compared.

What it finds out is whether transformers knows this family in this form: which modules it makes, which names it looks
for, how it stacks experts. That does not depend on how wide a layer is, nor on its values.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from sinkquant.artifacts import Calibration, ModelShape, ModuleDecision, Plan
from sinkquant.artifacts.ends import EndDecision
from sinkquant.artifacts.kv_scheme import KVScheme, kv_scale_tensors
from sinkquant.artifacts.sizes import module_bytes, own_format
from sinkquant.errors import RequestError, first_line
from sinkquant.models import Decoder, cast_experts
from sinkquant.models.progress import no_progress_bars
from sinkquant.models.shrunk import shrunk
from sinkquant.quantize.block import QuantizedBlock, inside
from sinkquant.quantize.ends import end_leaves, quantize_ends
from sinkquant.quantize.module import fused_scales, quantize_modules
from sinkquant.schemes import WeightFormat, scheme_of
from sinkquant.schemes.codecs import LibraryFiles, codec_of, files_of
from sinkquant.schemes.tensors import scale_dtype

MOST_LAYERS = 4
"""Layers of the tiny model: the first of every kind, up to so many kinds, and two where there is one kind."""
UNIT = 64
TRIED, NOT_SMALLER = "yes", "not tried: "


def require_loads(decoder: Decoder, shape: ModelShape, formats: Mapping[str, WeightFormat],
                  ends: Mapping[str, EndDecision] | None = None, kv_scheme: KVScheme | None = None) -> str:
    """Try whether a checkpoint in these formats is one that its library loads as it was written.

    Args:
        shape: of the model. formats: module name -> format of every packed linear. ends, kv_scheme: of the
            plan.

    Returns:
        "yes", or a sentence on why it was not tried.

    Raises:
        RequestError: it is not, and why.
    """
    packed = {name: form for name, form in formats.items() if form.packed}
    if not packed:
        return NOT_SMALLER + "nothing is packed"
    if own_format(shape, packed):
        return NOT_SMALLER + "it is in sinkquant's own format, which sinkquant loads"
    unread = sorted({scheme_of(form).words for form in packed.values()
                     if not any(one.engine.startswith("transformers") for one in scheme_of(form).loads)
                     and not isinstance(files_of(scheme_of(form).backend), LibraryFiles)})
    if unread:
        return f"{NOT_SMALLER}transformers is none of those that load {unread[0]}"
    layers = _kinds(decoder, packed)
    also = {end.form for end in (ends or {}).values()}
    unit = math.lcm(UNIT, *(max(form.group_size or 1, 1) for form in (*packed.values(), *also)))
    try:
        config = shrunk(decoder.model.config, layers, unit)
        text = config.to_json_string(use_diff=False)
    except Exception as error:  # every class of configuration refuses in its own way
        return f"{NOT_SMALLER}its configuration cannot be cut down ({first_line(error)})"
    forms = tuple(sorted((_place(decoder, layers, name), form) for name, form in packed.items()
                         if decoder.block_of(name) in layers))
    kinds: tuple[Any, Any] = (type(decoder.model), type(config))
    found = _outcome(*kinds, text, forms, tuple((name, end.model_dump_json()) for name, end in (ends or {}).items()),
                     kv_scheme.strategy if kv_scheme else None, decoder.model.dtype)
    if found == TRIED or found.startswith(NOT_SMALLER):
        return found
    words = " and ".join(sorted({scheme_of(form).words for form in packed.values()}))
    raise RequestError(f"{shape.architecture} cannot be quantized to {words}: {found}. Leave those linears in 16 bits "
                       "(weights.ignore), or take another backend.")


def _kinds(decoder: Decoder, formats: Mapping[str, WeightFormat]) -> list[int]:
    """The first layer of every kind: what its parameters are called, what config.json calls it, and its formats."""
    named = getattr(decoder.model.config.get_text_config(decoder=True), "layer_types", None) or ()
    firsts: dict[Any, int] = {}
    for index, block in enumerate(decoder.blocks):
        start = f"{decoder.block_names[index]}."
        inside = frozenset((_leaf(name.removeprefix(start)), form) for name, form in formats.items()
                           if name.startswith(start))
        parameters = frozenset(name for name, _ in block.named_parameters())
        firsts.setdefault((named[index] if index < len(named) else "", parameters, inside), index)
    found = sorted(firsts.values())[:MOST_LAYERS]
    return found if len(found) > 1 else list(range(min(2, len(decoder.blocks))))


def _leaf(path: str) -> str:
    """The path of a linear in its block; all experts have one."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _place(decoder: Decoder, layers: list[int], name: str) -> tuple[int, str]:
    index = decoder.block_of(name)
    return layers.index(index), _leaf(name.removeprefix(f"{decoder.block_names[index]}."))


@functools.lru_cache(maxsize=128)
def _outcome(kind: type[PreTrainedModel], config_kind: type[Any], config: str,
             forms: tuple[tuple[tuple[int, str], WeightFormat], ...], ends: tuple[tuple[str, str], ...],
             cache: str | None, dtype: torch.dtype) -> str:
    """"yes", why it was not tried, or what went wrong. One class with one configuration in one form is tried once."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind._from_config(config_kind.from_dict(json.loads(config)), dtype=dtype).eval()
        decoder = Decoder.of(model)
        plan = _plan(decoder, dict(forms), {name: EndDecision.model_validate_json(text) for name, text in ends},
                     None if cache is None else KVScheme(strategy=cache))  # type: ignore[arg-type]
        _run(model)
    except Exception as error:
        return f"{NOT_SMALLER}its configuration cannot be cut down ({first_line(error)})"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong is said in the end, once
        expected = _written(Path(folder), decoder, plan)
        files = files_of(plan.backend)
        read: Callable[[type[PreTrainedModel], Path, torch.dtype], dict[str, torch.Tensor] | None] = (
            files.reload if isinstance(files, LibraryFiles) else _read)
        try:
            with no_progress_bars():
                found = read(kind, Path(folder), dtype)
        except Exception as error:  # whatever transformers and the library's hooks raise
            return f"transformers does not load such a checkpoint of this family ({first_line(error)})"
    if found is None:
        return f"{NOT_SMALLER}{plan.backend} itself cannot be run here"
    for name, tensor in expected.items():
        if name not in found:
            return f"transformers loads such a checkpoint of this family into a model without {name}"
        if not torch.equal(found[name], tensor):
            return f"transformers loads such a checkpoint of this family with another {name} than was written"
    return TRIED


def _plan(decoder: Decoder, forms: Mapping[tuple[int, str], WeightFormat], ends: dict[str, EndDecision],
          kv_scheme: KVScheme | None) -> Plan:
    """Everything is rounded to nearest, in the format of the linear that it stands for.

    Raises:
        LookupError: the model lacks one of these linears.
    """
    shape, modules, met = decoder.shape(""), {}, set()
    for name, linear in shape.linears.items():
        place = (linear.block, _leaf(name.removeprefix(f"{decoder.block_names[linear.block]}.")))
        met.add(place)
        modules[name] = _decision(shape, name, forms.get(place))
    if not set(forms) <= met:
        raise LookupError(f"it then has no {min(set(forms) - met)[1]}")
    return Plan(name="trial", bits_per_weight=0, bits_per_parameter=0, weight_bytes=0, unquantized_bytes=0,
                modules=modules, ends=ends, kv_scheme=kv_scheme, seed=0, calibration=Calibration(
                    text=None, rows=1, length=2, bos="auto", batch_size=1, sinks=[], damping=0.01, act_order=False,
                    scale_search=False),
                predicted={}, loads_in=[])


def _decision(shape: ModelShape, name: str, form: WeightFormat | None) -> ModuleDecision:
    if form is None:
        return ModuleDecision(bits=16, group_size=None, method="none", bytes=0, reason="")
    return ModuleDecision(bits=form.bits,  # type: ignore[arg-type]
                          group_size=form.group_size, method="rtn", kind=form.kind,
                          activations=form.inputs, activation_scale=form.input_scale,  # type: ignore[arg-type]
                          storage=form.storage, bytes=module_bytes(shape, name, form), reason="")


def _written(folder: Path, decoder: Decoder, plan: Plan) -> dict[str, torch.Tensor]:
    """Quantize the model as the plan says, and write config.json and its tensors as a checkpoint has them.

    Returns:
        every parameter as it should come back.
    """
    model, shape, leaves = decoder.model, decoder.shape(""), dict[str, torch.Tensor]()
    with torch.no_grad():
        for name, packed in quantize_ends(decoder, plan).items():
            leaves |= end_leaves(decoder, plan, name, shape.ends[name], packed)
        for index, name in enumerate(decoder.block_names):
            mine = {one: decision for one, decision in inside(name, plan.modules).items() if decision.form.packed}
            made = QuantizedBlock(index, name, {}, {}, fused_scales=fused_scales(decoder, mine, shape))
            for one, decision in mine.items():
                quantize_modules(decoder, {one: decision}, plan, made, None)
                form = decision.form
                scale = torch.ones(1, dtype=getattr(torch, scale_dtype(str(model.dtype).removeprefix("torch."))))
                leaves |= {f"{one}.{leaf}": tensor.clone().contiguous() for leaf, tensor in codec_of(form).leaves(
                    made.weights[one], form, scale if form.static_inputs else None).items()}
    gone = {f"{name}.weight" for name in plan.stored} | {
        decoder.experts[name].parameter for name in plan.formats if name in decoder.experts}
    kept = {name: tensor.contiguous() for name, tensor in remove_tied_weights_from_state_dict(
        model.state_dict(), model).items() if name not in gone}
    leaves |= {name: torch.ones(size, dtype=model.dtype)
               for name, (_, size) in kv_scale_tensors(shape, plan.kv_scheme).items()}
    save_file(kept | leaves, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False))
    config |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch."),
               "quantization_config": files_of(plan.backend).settings(model, plan)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    files_of(plan.backend).write_more(folder, plan)
    return {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=not plan.ends)}


def _read(kind: type[PreTrainedModel], folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every dense parameter as transformers loads it; compressed-tensors unpacks weights in the first forward pass."""
    model = kind.from_pretrained(folder, dtype=dtype).eval()
    cast_experts(model)
    _run(model)
    return {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}


def _run(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
