"""The models that are measured, and what is known of them before and beside their evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Plan, SinkFidelity, SinkMap
from sinkquant.artifacts.experts import few_tokens, in_short
from sinkquant.artifacts.report import Fidelity
from sinkquant.cache import prepare
from sinkquant.detect import detect
from sinkquant.diagnose.fidelity import SinkComparison
from sinkquant.evaluate import Candidate, Compare
from sinkquant.formats import (
    STORED,
    bases_of,
    is_library,
    load_dense,
    open_any,
    open_checkpoint,
    prefix_of,
    read_checkpoint,
)
from sinkquant.models.folder import ADAPTER, FP8, method_of, published, weight_files
from sinkquant.models.gguf import contents, gguf_at
from sinkquant.models.gguf_index import is_gguf_checkpoint
from sinkquant.models.headers import read_header
from sinkquant.models.processes import this_process
from sinkquant.models.steps import Progress
from sinkquant.quantize.bases import prepare_cache
from sinkquant.recipe import Recipe


def weight_bytes(folder: Path) -> int:
    """Bytes of the files with a checkpoint's weights."""
    return sum(path.stat().st_size for path in weight_files(folder))


def bits_on_disk(folder: Path, trust_remote_code: bool = False) -> float:
    """Average bits per value of a checkpoint as it is stored; scales count, and packed words as what they hold."""
    if is_library(folder):  # its tensors hold several codes each: the model tells how many weights they stand for
        values = sum(parameter.numel() for parameter in open_checkpoint(folder, trust_remote_code).parameters())
        return 8 * weight_bytes(folder) / max(values, 1)
    size, values = 0, 0
    for path in weight_files(folder):
        with path.open("rb") as file:
            size += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
        with safe_open(path, framework="pt") as tensors:
            names = set(tensors.keys())
            for name in names:
                if name.endswith(".weight_shape") and name.replace(".weight_shape", ".weight_packed") in names:
                    values += math.prod(tensors.get_tensor(name).tolist())
                elif name.endswith(".weight_packed") and tensors.get_slice(name).get_dtype() == "U8":
                    values += 2 * math.prod(tensors.get_slice(name).get_shape())  # FP4, two in a byte
                elif name.endswith(".weight") or name.rpartition(".")[2] not in STORED:
                    values += math.prod(tensors.get_slice(name).get_shape())
    return 8 * size / max(values, 1)


def stored_size(named: str, folder: Path, trust_remote_code: bool = False) -> tuple[int, float]:
    """Bytes of a model's weights and bits per value: of a GGUF file, or a folder in FP8 or MXFP4, its own, not those of
    the folder that it was made dense in.

    Args:
        named: as the user names it. folder: what is loaded.
    """
    if (origin := published(named)) is not None:
        size = weight_bytes(origin)
        return size, 8 * size / sum(math.prod(one.shape) for path in weight_files(folder)
                                    for one in read_header(path).values())
    packed = None if is_gguf_checkpoint(folder) else gguf_at(named)
    if packed is None:
        return weight_bytes(folder), bits_on_disk(folder, trust_remote_code)
    size, values, _ = contents(packed)
    return size, 8 * size / values


def reading_notes(named: str) -> list[str]:
    """What is to be said of a checkpoint that is made dense before it is loaded, or merged.

    Args:
        named: as the user names it.
    """
    if (Path(named) / ADAPTER).is_file():
        return ["an adapter, merged into its base model before it is measured: bytes and bits are those of the merged "
                "model"]
    if (origin := published(named)) is None:
        return []
    form = method_of(origin)
    return [f"measured with the dense weights that its {form} stands for" + (
        "; its inputs, which an engine rounds to FP8 too, are not rounded" if form == FP8 else "")]


def loader(path: Path, dtype: torch.dtype | str, device: str,
           trust_remote_code: bool = False) -> Callable[[], PreTrainedModel]:
    """A checkpoint's model, given the KV prefix and bases that it has."""
    def load() -> PreTrainedModel:
        model = load_dense(path, dtype, device, trust_remote_code)
        prefix, bases = prefix_of(path), bases_of(path)
        return model if prefix is None and bases is None else prepare(model, prefix, bases, own=True)

    return load


def mechanisms(candidates: list[Candidate], plans: list[Plan],
               tokenizer: PreTrainedTokenizerBase) -> list[Candidate]:
    """Rows that tell the weights from the KV cache where both are quantized: each alone, beside its control. They are
    measured by divergence only.

    Args:
        candidates: the unquantized model first, then one per plan.
        plans: the sink-aware one, and the control where there is one.
    """
    base, *quantized = candidates
    rows = []
    for candidate, one, name in zip(quantized, plans, ("", "_control"), strict=False):
        rows.append(candidate.unmeasured(name=f"weights{name}", kv=None, tasks_too=False))
        load = _with_own_cache(base.load, one, tokenizer) if one.kv_cache is not None else base.load
        rows.append(base.unmeasured(name=f"cache{name}", load=load, kv=one.kv_cache, tasks_too=False))
    return rows


def _with_own_cache(load: Callable[[], PreTrainedModel], one: Plan,
                    tokenizer: PreTrainedTokenizerBase) -> Callable[[], PreTrainedModel]:
    """The unquantized model; its own keys and values of the prefix, and its own bases, are those that a checkpoint is
    given."""
    def loaded() -> PreTrainedModel:
        model = load()
        return prepare_cache(model, model, one, tokenizer)

    return loaded


def sinks_after(checkpoint: Path, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, name: str,
                progress: Progress | None = None, trust_remote_code: bool = False) -> SinkMap:
    """The sinks of a quantized checkpoint on the rows that the unquantized model was detected on, without ablations."""
    fast = recipe.changed(detect={"super_weights": False}, prune={"heads": "none", "blocks": None})
    return detect(open_any(checkpoint, trust_remote_code), tokenizer, recipe=fast, name=name, progress=progress)


def fidelity(maps: dict[str, SinkMap]) -> Fidelity:
    """Sink rates and the largest massive activation of several models on the same rows."""
    def largest(sink_map: SinkMap, field: str) -> float:
        return max((float(getattr(channel, field)) for channel in sink_map.channels), default=0.0)

    return Fidelity(sink_rate={name: one.sink_rate for name, one in maps.items()},
                    massive_peak={name: largest(one, "peak") for name, one in maps.items()},
                    massive_ratio={name: largest(one, "ratio") for name, one in maps.items()})


def comparison(tokenizer: PreTrainedTokenizerBase, sink_map: SinkMap | None, recipe: Recipe,
               kept: list[int] | None = None) -> Compare | None:
    """Sink fidelity of a quantized model, where the sinks of the original are known and the recipe asks for it.

    Args:
        kept: the blocks of the original that the others have, where some were dropped.
    """
    if sink_map is None or not recipe.evaluate.fidelity or this_process()[0] > 0:  # the first process reports
        return None
    looked: list[SinkComparison] = []

    def compare(original: PreTrainedModel, quantized: PreTrainedModel) -> SinkFidelity:
        if not looked:  # the original is looked at once
            looked.append(SinkComparison(original, tokenizer, sink_map.tokens, recipe))
        return looked[0].compare(quantized, kept)

    return compare


def expert_notes(checkpoint: Path, one: Plan) -> list[str]:
    """How many calibration tokens went to the experts of a checkpoint, and to whom too few; empty without experts."""
    content = read_checkpoint(checkpoint)
    tokens = content.get("expert_tokens") if content else None
    if not tokens:
        return []
    least = one.calibration.min_expert_tokens
    notes = [f"{one.name}: tokens per expert of {owner}: {in_short(counts)}" for owner, counts in tokens.items()]
    if few := few_tokens(tokens, least):
        notes.append(f"{one.name}: fewer than {least} tokens went to these experts, quantized as if all tokens of "
                     f"their layer had (expert, with its tokens): {few}")
    return notes
