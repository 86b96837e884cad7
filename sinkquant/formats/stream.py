"""From disk to disk: a plan is carried out block by block, and every block is written as soon as it is done.

The checkpoint grows in `<folder>.partial`, which a run that was killed goes on with: `blocks.json` in it says how many
blocks are done. Blocks that are done are read back from there when rows have to walk through them again, so that the
result does not depend on where a run was interrupted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from sinkquant.artifacts import Plan, SinkMap
from sinkquant.artifacts.base import write_atomically
from sinkquant.artifacts.experts import few_tokens, in_short
from sinkquant.cache import needs_bases, save_bases
from sinkquant.errors import SinkquantError
from sinkquant.formats.carried import carry
from sinkquant.formats.load import KV_BASES, load_dense
from sinkquant.formats.output import require_free
from sinkquant.formats.save import copy_dense, disk_errors, open_writer, write_end, write_files, write_packed
from sinkquant.formats.scratch import Scratch
from sinkquant.formats.simulated import save_simulated
from sinkquant.formats.writer import CheckpointWriter
from sinkquant.models import ActivationStore, Decoder, source_of
from sinkquant.models.gguf_index import FILE
from sinkquant.models.shards import Stored, dense_tensors, stored_tensors
from sinkquant.models.source import runs_own_code
from sinkquant.models.steps import Progress
from sinkquant.quantize import PackedWeight, QuantizedBlock, check, distilled, quantized_blocks, teacher_targets
from sinkquant.quantize.bases import cache_bases
from sinkquant.quantize.costs import RELOADED
from sinkquant.quantize.ends import end_rows, untie
from sinkquant.quantize.kv_scheme import kv_scales
from sinkquant.quantize.ranks import join, leave, tell
from sinkquant.quantize.transforms import rotate
from sinkquant.recipe import Recipe
from sinkquant.schemes.codecs import LibraryFiles, files_of
from sinkquant.schemes.codecs.compressed import EXPERT
from sinkquant.schemes.codecs.reading import dense_view, open_checkpoint

LOG = logging.getLogger("sinkquant")
STATE = "blocks.json"


def quantize_to(folder: Path, model: PreTrainedModel, plan: Plan, tokenizer: PreTrainedTokenizerBase,
                sink_map: SinkMap | None = None, recipe: Recipe | None = None, device: str = "cpu",
                dtype: torch.dtype = torch.float32, store: ActivationStore | None = None,
                progress: Progress | None = None, teacher: PreTrainedModel | None = None) -> dict[str, float]:
    """Quantize a model from `open_model` into a checkpoint, or go on where a run that was killed has left it.

    Args:
        teacher: what the last stage learns from, where that is another model of the same ends: the whole one, where
            blocks were dropped; None for `model` as it is.

    Returns:
        module name -> relative error that it was left with, before the whole model is tuned.

    Raises:
        RequestError: the plan does not fit the model, or the folder is not free.
        SinkquantError: the disk is full, a Hessian cannot be inverted, or what was written reads back differently.
    """
    require_free(folder)
    decoder = Decoder.of(model)
    check(decoder, plan)
    partial = folder.with_name(f"{folder.name}.partial")
    with disk_errors(folder):
        partial.mkdir(parents=True, exist_ok=True)
        carry(partial, model, tokenizer)
        rotate(decoder, plan)
        untie(decoder, plan)
        done, over, losses, scales, tokens = _state(partial)
        if done is None:
            (partial / FILE).unlink(missing_ok=True)  # of a job that was killed while it read the whole back
        writer = open_writer(partial, model, plan)
        scratch = Scratch(partial)
        # The last stage learns from the unquantized model, before any block is read from what was written of it.
        learns = None if over else teacher_targets(_teacher(teacher, decoder, plan), plan, tokenizer, device, dtype,
                                                   store)
        if done and done < len(decoder.blocks) and plan.follows_unquantized:
            # The unquantized weights of the blocks that are done are no longer there to be followed: begin again.
            done, scales = 0, {}
            _remember(partial, done, {}, scales, {})
        if done is None:
            for name, scale in kv_scales(decoder, plan, tokenizer, device, dtype, store).items():
                writer.write(name, scale)
            _write_ends(writer, decoder, plan)
        _read_ends(partial, decoder, plan)
        tell({"folder": str(folder), "plan": plan.to_json(), "done": done or 0, "device": device, "dtype": dtype,
              "scales": scales})
        if needs_bases(plan.kv_cache) and not (partial / KV_BASES).is_file():
            # Before any block is read from what was written of it.
            bases = cache_bases(decoder, plan.kv_cache, plan.calibration, tokenizer, device, dtype, store)
            assert bases is not None
            save_bases(bases, partial / KV_BASES)
        if done is None:
            copy_dense(writer, decoder, plan)
            writer.sync()
            done = 0
            _remember(partial, done, losses, scales, tokens)
        elif done:
            _read_from(model, partial, decoder, plan, done)
            LOG.info("%s: goes on after %d of %d blocks", folder.name, done, len(decoder.blocks))
        for block in quantized_blocks(decoder, plan, tokenizer, device, dtype, progress, store, done, scales):
            _write_block(writer, block, plan)
            if learns is not None:
                scratch.keep(block)
            losses |= block.losses
            scales = scales | block.input_scales
            tokens |= block.tokens
            if block.ended:
                _remember(partial, block.index + 1, losses, scales, tokens)
                LOG.info("block %d of %d: %s", block.index + 1, len(decoder.blocks), in_words(block, losses, plan))
            del block  # or it would outlive the next one's making
        leave()
        if learns is not None:
            _read_from(model, partial, decoder, plan, len(decoder.blocks))
            starts = scratch.starts(len(decoder.blocks), plan.formats)
            found = distilled(decoder, plan, learns, starts, device, dtype, progress)
            for block in _by_block(decoder, found, scales):
                _write_block(writer, block, plan)
            _remember(partial, len(decoder.blocks), losses, scales, tokens, distilled=True)
        scratch.clear()
        save_simulated(partial, plan, scales)
        write_files(partial, model, plan, sink_map, recipe, tokens)
        files_of(plan.backend).finish(partial, plan, type(model).__name__, (partial / STATE).unlink)
        _check_reload(partial, decoder, plan)
        partial.rename(folder)
    return losses


def follow(open_source: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase | None,
           store: ActivationStore) -> None:
    """What every rank but the first does: share the work of each `quantize_to` of the first one until it is
    dismissed."""
    join()
    while (job := tell(None)) is not None:
        model = open_source()
        decoder, plan = Decoder.of(model), Plan.parse(json.loads(job["plan"]), "the first process's plan")
        rotate(decoder, plan)
        untie(decoder, plan)
        partial = Path(job["folder"]).with_name(f"{Path(job['folder']).name}.partial")
        _read_ends(partial, decoder, plan)
        if job["done"]:
            _read_from(model, partial, decoder, plan, job["done"])
        if plan.needs_rows:  # rounding is over before it could be shared out
            for _ in quantized_blocks(decoder, plan, tokenizer, job["device"], job["dtype"], store=store,
                                      done=job["done"], input_scales=job["scales"]):
                pass
        leave()
        join()
    leave()


def dismiss() -> None:
    """The first rank has no more blocks for the others. To be called once."""
    join()
    tell(None)
    leave()


def _teacher(teacher: PreTrainedModel | None, decoder: Decoder, plan: Plan) -> Decoder:
    """What the last stage learns from, with the same axes as the model that is tuned."""
    if teacher is None or not plan.calibration.distill:
        return decoder
    other = Decoder.of(teacher)
    rotate(other, plan)
    return other


def _state(partial: Path) -> tuple[int | None, bool, dict[str, float], dict[str, torch.Tensor], dict[str, list[int]]]:
    """Blocks that are done, None where nothing was written yet; whether the whole model was tuned after the last one;
    the losses of their modules, the stored scales of their inputs and the tokens of their experts."""
    if not (partial / STATE).is_file():
        return None, False, {}, {}, {}
    content = json.loads((partial / STATE).read_text(encoding="utf-8"))
    scales = {name: torch.tensor([value], dtype=getattr(torch, dtype))
              for name, (dtype, value) in content["input_scales"].items()}
    return int(content["done"]), content["distilled"], dict(content["losses"]), scales, dict(content["tokens"])


def _by_block(decoder: Decoder, weights: dict[str, PackedWeight],
              scales: dict[str, torch.Tensor]) -> Iterator[QuantizedBlock]:
    """What the tuning of the whole model has changed, a block at a time."""
    for index, name in enumerate(decoder.block_names):
        mine = {module: weight for module, weight in weights.items() if module.startswith(f"{name}.")}
        yield QuantizedBlock(index, name, dict(mine), {}, input_scales={
            module: scale for module, scale in scales.items() if module in mine})


def _remember(partial: Path, done: int, losses: dict[str, float], scales: dict[str, torch.Tensor],
              tokens: dict[str, list[int]], distilled: bool = False) -> None:
    stored = {name: (str(scale.dtype).removeprefix("torch."), float(scale)) for name, scale in scales.items()}
    content = {"done": done, "losses": losses, "input_scales": stored, "tokens": tokens, "distilled": distilled}
    write_atomically(partial / STATE, json.dumps(content) + "\n")


def _read_from(model: PreTrainedModel, partial: Path, decoder: Decoder, plan: Plan, done: int) -> None:
    """Let the model read the linears of the blocks that are done from what was written of them."""
    source = source_of(model)
    assert source is not None
    forms = {name: form for name, form in plan.formats.items() if decoder.block_of(name) < done}
    changed = [name for name in plan.changed if decoder.block_of(name) < done]
    stored = stored_tensors(partial)
    dense: dict[str, Stored]
    if isinstance(files_of(plan.backend), LibraryFiles):
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        dense = dense_view(stored, forms, shapes, model.dtype)
    else:
        transposed = {name for name, linear in decoder.linears.items() if isinstance(linear, Conv1D)}
        dense = dense_tensors(stored, {name: form.bits for name, form in forms.items()}, model.dtype, transposed)
    names = {f"{name}.weight" for name in [*forms, *changed] if name not in decoder.experts}
    fused = {decoder.experts[name].parameter for name in [*forms, *changed] if name in decoder.experts}
    if plan.rescales:  # norms and biases have changed as well, and experts that stay in 16 bits
        names |= {name for name, _ in model.named_parameters() if name not in fused and name.startswith(
            tuple(f"{block}." for block in decoder.block_names[:done]))}
    for name in sorted(names):
        source.replace(name, dense[name])
    parts: dict[str, dict[str, Stored]] = {}
    for name in [*forms, *changed]:
        if part := decoder.experts.get(name):
            key = f"{name}.weight" if name in forms else part.parameter  # which as a whole stays in 16 bits
            parts.setdefault(part.parameter, {})[key] = dense[key]
    for name, tensors in parts.items():
        source.replace_parts(name, tensors)


def _write_ends(writer: CheckpointWriter, decoder: Decoder, plan: Plan) -> None:
    """Write the token embedding and the output head as the plan stores them, before any block is worked on."""
    shape = decoder.shape("").ends if plan.ends else {}
    for name in plan.ends:
        for start, packed in end_rows(decoder, plan, name):
            write_end(writer, decoder, plan, name, shape[name], packed, start)
    writer.sync()


def _read_ends(partial: Path, decoder: Decoder, plan: Plan) -> None:
    """Let the model read both from what was written of them; a head that shares codes is the embedding."""
    if not plan.ends:
        return
    source = decoder.source
    assert source is not None
    own = {name: end.bits for name, end in plan.ends.items() if end.shares is None}
    dense = dense_tensors(stored_tensors(partial), own, decoder.model.dtype)
    for name in own:
        source.replace(f"{name}.weight", dense[f"{name}.weight"])


def _write_block(writer: CheckpointWriter, block: QuantizedBlock, plan: Plan) -> None:
    """Write what a block has that is new, and compare what the disk gives back."""
    written: dict[str, torch.Tensor] = {}
    for name, weight in block.weights.items():
        written |= write_packed(writer, name, weight, plan.modules[name].form, block.input_scales.get(name))
    for name, tensor in block.dense.items():
        writer.write(name, tensor)
    writer.sync()
    for name, tensor in (written | block.dense).items():
        if not _same_bytes(writer.read(name), tensor):
            raise SinkquantError(f"{name} reads back differently from what was written; check the disk.")


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.reshape(-1).view(torch.uint8),
                                                    other.reshape(-1).view(torch.uint8))


def _check_reload(partial: Path, decoder: Decoder, plan: Plan) -> None:
    """Load the checkpoint as any user would and compare every weight with what this package reads of it. A backend
    whose library cannot be run here leaves it at what `_write_block` has read back.

    Raises:
        SinkquantError: they differ.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in decoder.model.parameters())
    if size > RELOADED:
        LOG.info("not loaded as a whole by transformers, since it would take %d bytes", size)
        return
    files, dtype, trusted = files_of(plan.backend), decoder.model.dtype, runs_own_code(decoder.model)
    again = (files.reload(type(decoder.model), partial, dtype) if isinstance(files, LibraryFiles)
             else load_dense(partial, dtype=dtype, trust_remote_code=trusted).state_dict())
    if again is None:
        LOG.info("not loaded by %s itself, which cannot be run here", plan.backend)
        return
    mine = Decoder.of(open_checkpoint(partial, trusted))
    with mine.present([mine.model]):
        for name, tensor in mine.model.state_dict().items():
            if name in again and not torch.equal(again[name], tensor):
                raise SinkquantError(f"{name} of the checkpoint is not what transformers loads; nothing was written.")


def in_words(block: QuantizedBlock, losses: Mapping[str, float], plan: Plan) -> str:
    """The relative error of every module, experts together; tokens per expert, and who had too few of them.

    Args:
        losses: module name -> relative error, of this block and of any others.
    """
    start = f"{block.name}."
    losses = {name.removeprefix(start): loss for name, loss in losses.items() if name.startswith(start)}
    said = [f"{name} {loss:.3g}" for name, loss in losses.items() if not EXPERT.search(name)]
    experts = {name: loss for name, loss in losses.items() if EXPERT.search(name)}
    if experts:
        worst = max(experts, key=lambda name: experts[name])
        said.append(f"experts {sum(experts.values()) / len(experts):.3g} on average, {experts[worst]:.3g} at most "
                    f"({worst})")
    for owner, counts in block.tokens.items():
        said.append(f"tokens per expert of {owner.removeprefix(block.name + '.')} {in_short(counts)}")
        if few := few_tokens({owner: counts}, plan.calibration.min_expert_tokens):
            said.append(f"quantized as if all tokens went there: {few}")
    return ", ".join(said)
