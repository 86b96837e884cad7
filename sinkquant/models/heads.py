"""Where the output of a head is read: its columns of the attention's output projection."""

from __future__ import annotations

from sinkquant.errors import RequestError
from sinkquant.models.blocks import layer_config
from sinkquant.models.decoder import Decoder, weight_matrix

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


def head_columns(decoder: Decoder, layer: int) -> tuple[str, list[slice]]:
    """The output projection of a layer's attention, and the input columns that every query head fills.

    Raises:
        RequestError: the attention has no single linear after it that every head fills an equal part of.
    """
    found = [name for name in decoder.linears if decoder.block_of(name) == layer and _in_attention(decoder, name)
             and name.rpartition(".")[2] in OUTPUT_PROJECTIONS]
    heads = int(layer_config(decoder.model.config.get_text_config(decoder=True), layer).num_attention_heads)
    columns = weight_matrix(decoder.linears[found[0]]).shape[1] if len(found) == 1 else 1
    if len(found) != 1 or columns % heads:
        raise RequestError(f"{type(decoder.model).__name__} has no output projection that reads its heads side by "
                           "side, so none of them can be taken out; leave prune.heads out.")
    width = columns // heads
    return found[0], [slice(head * width, (head + 1) * width) for head in range(heads)]


def _in_attention(decoder: Decoder, name: str) -> bool:
    parent = decoder.model.get_submodule(name.rpartition(".")[0])
    return "attention" in type(parent).__name__.lower()
