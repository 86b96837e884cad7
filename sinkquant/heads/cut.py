"""A model without its no-op heads as a plain checkpoint of smaller shapes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import SinkMap
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.formats.carried import carry, write_config
from sinkquant.formats.output import require_free
from sinkquant.formats.save import written_aside
from sinkquant.formats.writer import CheckpointWriter
from sinkquant.models import Decoder, load_model, pieces
from sinkquant.models.smaller import HeadCounts, smaller_model, smaller_tensor
from sinkquant.policy.smaller import kv_heads_to_keep
from sinkquant.quantize import is_quantized
from sinkquant.recipe import Recipe

RELOADED = 1 << 30
"""A checkpoint of no more bytes is loaded by plain transformers and compared."""


def cut_heads(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sink_map: SinkMap,
              folder: str | os.PathLike[str], recipe: Recipe | None = None) -> list[list[int]]:
    """Write the model without the heads that do nothing, tensor by tensor; the model itself is not changed.

    Args:
        model: from `open_model`, or one in memory.
        sink_map: of this model, from a detection with prune.heads=no-op. recipe: `prune.head_loss` is its bound.

    Returns:
        for every layer the key-value heads that stay.

    Raises:
        RequestError: the model is quantized, the sink map is of another one, no head can go in every layer, or the
            folder is not free.
        SinkquantError: the disk is full, or plain transformers loads something else.
    """
    require_free(Path(folder))
    if is_quantized(model):
        raise RequestError("this model is quantized; cut heads off the unquantized one.")
    decoder, counts, facts = Decoder.of(model), HeadCounts.of(model), sink_map.model
    if (facts.layers, facts.heads, facts.kv_heads) != (len(decoder.blocks), counts.heads, counts.kv_heads):
        raise RequestError(f"the sink map is of another model ({facts.name}); run detect on this one.")
    whole = decoder.shape("")
    if whole.carried:
        raise RequestError(f"this model comes with {next(iter(whole.carried))}, which transformers does not compute "
                           "with: it would not fit the smaller heads.")
    built = {count: smaller for count in range(1, counts.kv_heads)
             if (smaller := smaller_model(model, count)) is not None}
    kept = kv_heads_to_keep(sink_map, list(built), (recipe or Recipe()).prune.head_loss)
    smaller = built[len(kept[0])]
    before, after = whole.tensors, Decoder.of(smaller).shape("").tensors
    with written_aside(Path(folder)) as aside:
        writer = CheckpointWriter(aside, after)
        for name, (_, shape) in after.items():
            if shape == before[name][1]:
                for start, rows in pieces(decoder, name):
                    writer.write(name, rows, start)
            else:
                writer.write(name, smaller_tensor(decoder, name, kept, shape))
        write_config(aside, smaller, model)
        carry(aside, model, tokenizer)
        _check(aside, decoder, kept, after)
    return kept


def _check(folder: Path, decoder: Decoder, kept: list[list[int]], tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Load the checkpoint as any user would, and compare every tensor."""
    if sum(path.stat().st_size for path in folder.glob("*.safetensors")) > RELOADED:
        return
    loaded = load_model(folder).state_dict()
    before = decoder.shape("").tensors
    for name, (_, shape) in tensors.items():
        whole = shape == before[name][1]
        expected = (torch.cat([rows for _, rows in pieces(decoder, name)]) if whole
                    else smaller_tensor(decoder, name, kept, shape))
        if not torch.equal(loaded[name], expected):
            raise SinkquantError(f"{name} of the checkpoint is not what transformers loads; nothing was written.")
