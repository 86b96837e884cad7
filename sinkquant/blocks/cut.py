"""A model without some of its blocks: as a plain checkpoint, or in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.errors import RequestError
from sinkquant.formats.output import require_free
from sinkquant.formats.reshaped import write_reshaped
from sinkquant.models import Decoder, pieces, require_dense
from sinkquant.models.numerics import own_numerics
from sinkquant.models.shorter import NUMBER, old_name, shorter_config, shorter_model
from sinkquant.models.unused import require_nothing_carried
from sinkquant.quantize import is_quantized


@own_numerics()
def cut_blocks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kept: Sequence[int],
               folder: str | os.PathLike[str]) -> None:
    """Write a model with some of its blocks only, tensor by tensor; the model itself is not changed.

    Args:
        model: from `open_model`, or one in memory. kept: indices of the blocks that stay, ascending.

    Raises:
        RequestError: the model is quantized, cannot be built without the others, or the folder is not free.
        SinkquantError: the disk is full, or plain transformers loads something else.
    """
    require_free(Path(folder))
    decoder = _whole(model, kept)
    require_dense(model)
    write_reshaped(Path(folder), model, shorter_model(model, kept), tokenizer,
                   lambda name: pieces(decoder, old_name(decoder, name, kept)))


@own_numerics()
def drop_blocks(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Take the other blocks out of a model in memory, and out of its configuration.

    Raises:
        RequestError: the model is quantized or reads its weights from disk, or cannot be built without them.
    """
    decoder = _whole(model, kept)
    if decoder.source is not None:
        raise RequestError("this model's weights stay on disk; write it without its blocks by cut_blocks.")
    shorter_model(model, kept)
    place, _, leaf = decoder.block_names[0].rpartition(".")[0].rpartition(".")
    config = shorter_config(model.config, kept)
    blocks = [decoder.blocks[index] for index in kept]
    setattr(model.get_submodule(place), leaf, nn.ModuleList(blocks))
    for index, block in enumerate(blocks):
        for module in block.modules():
            for key in NUMBER:
                if isinstance(getattr(module, key, None), int):
                    setattr(module, key, index)
    model.name_or_path = model.config._name_or_path = ""  # it is not that folder's model any more
    mine = model.config.get_text_config(decoder=True)
    for key, value in config.get_text_config(decoder=True).to_dict().items():
        if key in vars(mine) and vars(mine)[key] != value and key not in ("transformers_version", "architectures",
                                                                          "dtype", "_name_or_path"):
            setattr(mine, key, value)


def _whole(model: PreTrainedModel, kept: Sequence[int]) -> Decoder:
    if is_quantized(model):
        raise RequestError("this model is quantized; drop blocks of the unquantized one.")
    decoder = Decoder.of(model)
    count = len(decoder.blocks)
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < count:
        raise RequestError(f"the blocks that stay have to be some of 0 to {count - 1}, ascending, not {list(kept)}.")
    require_nothing_carried(model, "blocks that are left")
    return decoder
