"""A plain checkpoint of a model with fewer blocks or heads, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.errors import SinkquantError
from sinkquant.formats.carried import carry, write_config
from sinkquant.formats.save import written_aside
from sinkquant.formats.writer import CheckpointWriter
from sinkquant.models import Decoder, load_model
from sinkquant.models.source import runs_own_code
from sinkquant.quantize.costs import RELOADED


def write_reshaped(folder: Path, model: PreTrainedModel, made: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                   read: Callable[[str], Iterable[tuple[int, torch.Tensor]]]) -> None:
    """Write a checkpoint, and compare every tensor with what plain transformers loads.

    Args:
        model: whose files are taken along. made: on the meta device, what the checkpoint is of.
        read: name of a tensor of `made` -> its values, as (first row, rows).

    Raises:
        SinkquantError: the disk is full, or transformers loads something else.
    """
    tensors = Decoder.of(made).shape("").tensors
    with written_aside(folder) as aside:
        writer = CheckpointWriter(aside, tensors)
        for name in tensors:
            for start, rows in read(name):
                writer.write(name, rows, start)
        write_config(aside, made, model)
        carry(aside, model, tokenizer)
        if sum(path.stat().st_size for path in aside.glob("*.safetensors")) > RELOADED:
            return
        loaded = load_model(aside, trust_remote_code=runs_own_code(model)).state_dict()
        for name in tensors:
            if not torch.equal(loaded[name], torch.cat([rows for _, rows in read(name)])):
                raise SinkquantError(f"{name} of the checkpoint is not what transformers loads; nothing was written.")
