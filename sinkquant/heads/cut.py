"""A model without its no-op heads as a plain checkpoint of smaller shapes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import SinkMap
from sinkquant.errors import RequestError
from sinkquant.formats.output import require_free
from sinkquant.formats.reshaped import write_reshaped
from sinkquant.models import Decoder, head_columns, pieces, require_dense
from sinkquant.models.numerics import own_numerics
from sinkquant.models.smaller import HeadCounts, smaller_model, smaller_tensor
from sinkquant.models.unused import require_nothing_carried
from sinkquant.quantize import is_quantized
from sinkquant.recipe import Recipe

INSTEAD = "prune.heads=no-op in a recipe silences heads wherever they are."


@own_numerics()
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
    require_cuttable(model)
    decoder, counts, facts = Decoder.of(model), HeadCounts.of(model), sink_map.model
    if (facts.layers, facts.heads, facts.kv_heads) != (len(decoder.blocks), counts.heads, counts.kv_heads):
        raise RequestError(f"the sink map is of another model ({facts.name}); run detect on this one.")
    built = functools.cache(functools.partial(smaller_model, model))
    kept = kv_heads_to_keep(sink_map, built, (recipe or Recipe()).prune.head_loss)
    smaller = built(len(kept[0]))
    assert smaller is not None
    before, after = decoder.shape("").tensors, smaller.state_dict()

    def read(name: str) -> Iterable[tuple[int, torch.Tensor]]:
        shape = list(after[name].shape)
        return pieces(decoder, name) if shape == before[name][1] else [(0, smaller_tensor(decoder, name, kept, shape))]

    write_reshaped(Path(folder), model, smaller, tokenizer, read)
    return kept


def require_cuttable(model: PreTrainedModel) -> None:
    """Refuse a model that no heads are cut off, whatever is found of them; no weight is read."""
    if is_quantized(model):
        raise RequestError("this model is quantized; cut heads off the unquantized one.")
    require_dense(model)
    require_nothing_carried(model, "smaller heads")
    decoder, architecture = Decoder.of(model), type(model).__name__
    if decoder.quiet:
        raise RequestError("no heads can be cut off: every layer has to lose as many, and layer "
                           f"{min(decoder.quiet)} of {architecture} has no attention matrix. {INSTEAD}")
    for layer in range(len(decoder.blocks)):
        head_columns(decoder, layer)
    if not any(smaller_model(model, count) for count in range(1, HeadCounts.of(model).kv_heads)):
        raise RequestError(f"no heads can be cut off: transformers builds {architecture} with these smaller numbers: "
                           f"none. {INSTEAD}")


def kv_heads_to_keep(sink_map: SinkMap, built: Callable[[int], PreTrainedModel | None],
                     bound: float) -> list[list[int]]:
    """For every layer the key-value heads that stay, ascending: as few as can be `built` and the no-op heads give.

    A key-value head goes where all queries that read it are no-ops, and where the loss of a token changes by no more
    than `bound` nats without them, each alone and with all that change less. Every layer loses as many.

    Args:
        built: the model with so many key-value heads, None where the architecture cannot be built with them.

    Raises:
        RequestError: the sink map does not say what heads are worth, or no layer's heads can go.
    """
    found, facts = sink_map.head_ablations, sink_map.model
    if found is None:
        raise RequestError("the sink map does not say what heads are worth; run detect with --set prune.heads=no-op.")
    going: set[tuple[int, int]] = set()
    for head in found.heads:
        if max(head.loss_change, head.together) > bound:
            break
        going.add((head.layer, head.head))
    shared = facts.heads // facts.kv_heads
    # The order of the list: those that change least go first.
    order = list(dict.fromkeys((head.layer, head.head // shared) for head in found.heads))
    free = {layer: [kv for at, kv in order if at == layer and all(
        (layer, kv * shared + query) in going for query in range(shared))] for layer in range(facts.layers)}
    fewest = min(range(facts.layers), key=lambda layer: len(free[layer]))
    removable = min(len(free[fewest]), facts.kv_heads - 1)
    count = next((count for count in range(facts.kv_heads - removable, facts.kv_heads) if built(count)), None)
    if count is None:
        smaller = ", ".join(str(count) for count in range(1, facts.kv_heads) if built(count))
        raise RequestError(
            f"no heads can be cut off: layer {fewest} has {len(free[fewest])} of {facts.kv_heads} key-value heads "
            f"whose queries are all no-ops, every layer has to lose as many, and transformers builds "
            f"{facts.architecture} with these smaller numbers: {smaller}. {INSTEAD}")
    return [sorted(set(range(facts.kv_heads)) - set(free[layer][:facts.kv_heads - count]))
            for layer in range(facts.layers)]
