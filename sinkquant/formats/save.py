"""A quantized model -> a checkpoint that plain transformers loads; written aside, checked, then renamed."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import EndShape, Plan, SinkMap
from sinkquant.artifacts.base import real_place
from sinkquant.artifacts.ends import end_tensors, with_ends
from sinkquant.artifacts.kv_scheme import kv_scale_tensors, with_kv_scales
from sinkquant.artifacts.sizes import GUARD, checkpoint_tensors, own_format, packed_tensors
from sinkquant.cache import save_bases, save_prefix
from sinkquant.errors import SinkquantError
from sinkquant.formats.carried import carry, write_config
from sinkquant.formats.load import KV_BASES, KV_PREFIX, load_dense
from sinkquant.formats.output import beside, put_in_place, require_free
from sinkquant.formats.own import own_config
from sinkquant.formats.simulated import save_simulated
from sinkquant.formats.writer import CheckpointWriter
from sinkquant.models import Decoder, pieces
from sinkquant.models.hooks import evaluating
from sinkquant.models.numerics import own_numerics
from sinkquant.models.source import runs_own_code
from sinkquant.models.unused import unused_of
from sinkquant.quantize import state_of
from sinkquant.quantize.ends import end_leaves
from sinkquant.recipe import Recipe
from sinkquant.schemes import DEFAULT_BACKEND, WeightFormat, packages_of, scheme_of
from sinkquant.schemes.codecs import PackedWeight, StoredWeight, codec_of, files_of
from sinkquant.schemes.inputs import NO_ROUNDING

CHECKPOINT_SCHEMA = "sinkquant/checkpoint@1"
STORED = ("weight", "weight_packed", "weight_scale", "weight_shape", "input_scale", "weight_columns", "weight_exact",
          "weight_places", "weight_values", "weight_global_scale", "input_global_scale")
"""What is stored of a quantized linear beside its bias."""
SHAPE = ".weight_shape"
PACKAGES = ("sinkquant", "torch", "transformers", "compressed-tensors", "safetensors")


@own_numerics()
def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str],
         sink_map: SinkMap | None = None, recipe: Recipe | None = None) -> Path:
    """Write a model that `quantize` has worked on, with its tokenizer and `sinkquant.json`.

    The checkpoint is loaded back from the temporary folder and its logits compared with the model's, bit by bit.

    Raises:
        RequestError: the folder exists and is not empty, or the model was not quantized.
        SinkquantError: the disk is full, or the checkpoint does not give the model's logits.
    """
    state = state_of(model)
    target = real_place(folder)
    require_free(target)
    with written_aside(target) as temporary:
        carry(temporary, model, tokenizer)
        writer = open_writer(temporary, model, state.plan)
        decoder = Decoder.of(model)
        copy_dense(writer, decoder, state.plan)
        for name, scale in state.kv_scales.items():
            writer.write(name, scale)
        shape = decoder.shape("").ends if state.ends else {}
        for name, rows in state.ends.items():
            write_end(writer, decoder, state.plan, name, shape[name], rows)
        for name, weight in state.weights.items():
            write_packed(writer, name, weight, state.plan.modules[name].form, state.input_scales.get(name))
        save_simulated(temporary, state.plan, state.input_scales)
        if state.bases is not None:
            save_bases(state.bases, temporary / KV_BASES)
        if state.prefix is not None:
            save_prefix(state.prefix, temporary / KV_PREFIX)
        write_files(temporary, model, state.plan, sink_map or state.plan.sink_map, recipe, state.tokens)
        files_of(state.plan.backend).finish(temporary, state.plan, type(model).__name__, lambda: None)
        check_reload(model, temporary, state.plan)
    return target


def open_writer(folder: Path, model: PreTrainedModel, plan: Plan) -> CheckpointWriter:
    """The weight files of a plan's checkpoint, ready to be written."""
    shape = with_kv_scales(with_ends(Decoder.of(model).shape(""), plan.ends), plan.kv_scheme)
    return CheckpointWriter(folder, checkpoint_tensors(shape, plan.formats))


def copy_dense(writer: CheckpointWriter, decoder: Decoder, plan: Plan) -> None:
    """Write every tensor that the plan leaves as it is."""
    shape = decoder.shape("")
    packed = {key for name, form in plan.formats.items() for key in packed_tensors(
        name, shape.linears[name].rows, shape.linears[name].columns, form, shape.dtype)}
    packed |= {key for name, end in plan.ends.items() for key in end_tensors(shape, name, end.form, end.shares)}
    packed |= kv_scale_tensors(shape, plan.kv_scheme).keys()
    unused = unused_of(decoder.model)
    for name in unused.carried:
        for start, rows in unused.pieces(name):
            writer.write(name, rows, start)
    for name in writer.tensors:
        if name not in packed and name not in unused.carried and writer.tensors[name] != GUARD:
            for start, rows in pieces(decoder, name):
                writer.write(name, rows, start)


def write_end(writer: CheckpointWriter, decoder: Decoder, plan: Plan, name: str, shape: EndShape,
              packed: PackedWeight, start: int = 0) -> None:
    """Write the token embedding or the output head, or some of their rows from row `start` on."""
    for key, tensor in end_leaves(decoder, plan, name, shape, packed).items():
        if key.endswith(SHAPE):
            tensor = torch.tensor([shape.rows, shape.columns], dtype=tensor.dtype)
        by_rows = tensor.dim() == 2
        if by_rows or start == 0:
            writer.write(key, tensor, start if by_rows else 0)


def write_packed(writer: CheckpointWriter, name: str, weight: StoredWeight, form: WeightFormat,
                 input_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Write the tensors of a quantized linear, and return them."""
    found = linear_tensors(name, weight, form, input_scale)
    for key, tensor in found.items():
        writer.write(key, tensor)
    return found


def linear_tensors(name: str, weight: StoredWeight, form: WeightFormat,
                   input_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The tensors that a quantized linear becomes, by their names."""
    return {f"{name}.{leaf}": tensor for leaf, tensor in codec_of(form).leaves(weight, form, input_scale).items()}


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, or inside it where it is there and empty, that takes its place if all goes
    well and is removed if not.

    Raises:
        SinkquantError: the disk is full or not writable.
    """
    target, unique = real_place(target), uuid.uuid4().hex
    try:
        # Not tempfile's names, which only the owner may read: a checkpoint follows the umask.
        temporary = beside(target, f".{target.name}.{unique}", f".{unique}")
        temporary.mkdir(parents=True)
    except OSError as error:
        raise SinkquantError(f"cannot write beside {target}: {error.strerror or error}.") from error
    try:
        with disk_errors(target):
            yield temporary
            put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """What the file system raises while `target` is written becomes one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full; free some space and run again" if full else str(error)
        raise SinkquantError(f"cannot write {target}: {reason}.") from error


def versions(backend: str = DEFAULT_BACKEND) -> dict[str, str]:
    """Versions of the packages that decide what a checkpoint holds."""
    return {package: importlib.metadata.version(package) for package in (*PACKAGES, *packages_of(backend))}


def write_files(folder: Path, model: PreTrainedModel, plan: Plan, sink_map: SinkMap | None, recipe: Recipe | None,
                tokens: dict[str, list[int]] | None = None) -> None:
    """What of a checkpoint says how it was made: config.json and sinkquant.json.

    Args:
        tokens: module name of a layer's experts -> calibration tokens that went to each of them.
    """
    packed = bool(plan.stored)
    if packed:
        asked = files_of(plan.backend).settings(model, plan)
        if "ignore" in asked:
            asked["ignore"] = [*asked["ignore"], *unused_of(model).modules]
        needs_own = own_format(Decoder.of(model).shape(""), plan.formats)
        model.config.quantization_config = own_config(asked, plan, model.dtype) if needs_own else asked
    try:
        write_config(folder, model)
    finally:
        if packed:
            del model.config.quantization_config
    files_of(plan.backend).write_more(folder, plan)
    content: dict[str, Any] = {
        "schema": CHECKPOINT_SCHEMA, "versions": versions(plan.backend), "seed": plan.seed,
        "recipe": recipe.model_dump(mode="json") if recipe else plan.recipe,
        "plan": plan.model_dump(mode="json", by_alias=True),
        "sink_map": sink_map.model_dump(mode="json", by_alias=True, exclude={"shape"}) if sink_map else None}
    if tokens:
        content["expert_tokens"] = tokens
    ours = folder / "sinkquant.json"
    ours.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in filter(Path.is_file, folder.rglob("*")):  # safetensors makes files that only their owner may read.
        path.chmod(ours.stat().st_mode)


def check_reload(model: PreTrainedModel, folder: Path, plan: Plan) -> None:
    """Load a checkpoint as any user would and compare logits on one row. An embedding and a head that are rounded as
    they are written are taken from the model.

    Raises:
        SinkquantError: they differ.
    """
    again = load_dense(folder, model.dtype, str(model.device), runs_own_code(model))
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    if attention and again.config.get_text_config(decoder=True)._attn_implementation != attention:
        again.set_attn_implementation(attention)  # others round differently
    if any(scheme_of(form).ends != NO_ROUNDING for form in plan.formats.values()):
        for mine, theirs in ((again.get_input_embeddings(), model.get_input_embeddings()),
                             (again.get_output_embeddings(), model.get_output_embeddings())):
            mine.weight.data.copy_(theirs.weight.data)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(vocabulary, (1, 16), generator=generator)
    with evaluating(model), torch.no_grad():
        expected = model(row.to(model.device), use_cache=False).logits.cpu()
        found = again(row.to(again.device), use_cache=False).logits.cpu()
    if not torch.equal(expected, found):
        worst = float((expected.float() - found.float()).abs().max())
        raise SinkquantError(f"the checkpoint does not give the model's logits when loaded back (off by {worst:.3g}); "
                             "nothing was written.")
