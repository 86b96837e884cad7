"""Parameters by name, in a model that holds its weights or reads them from disk."""

from __future__ import annotations

import torch
from torch import nn

from sinkquant.models import Decoder
from sinkquant.models.edits import Edit
from sinkquant.models.head import untie
from sinkquant.models.structure import Matrix


def read(decoder: Decoder, name: str) -> torch.Tensor:
    """A copy of a parameter in its own dtype, on the CPU."""
    owner = decoder.model.get_submodule(name.rpartition(".")[0])
    with decoder.present([owner]):
        return decoder.model.get_parameter(name).data.detach().cpu().clone()


def read_matrix(decoder: Decoder, matrix: Matrix) -> torch.Tensor:
    """A weight as [..., out, in]."""
    weight = read(decoder, matrix.weight)
    return weight.transpose(-1, -2) if matrix.transposed else weight


def edit(decoder: Decoder, edits: dict[str, Edit]) -> None:
    """Change parameters: now where the model holds them, and whenever they are read where it does not."""
    if decoder.source is not None:
        decoder.source.edits |= edits
        return
    for name, one in edits.items():
        parameter = decoder.model.get_parameter(name)
        parameter.data = one(parameter.data.cpu()).to(parameter.device)


def untie_head(decoder: Decoder) -> None:
    """Give the output head weights of its own, the same as the token embedding's, and let config.json say so."""
    model = decoder.model
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head) + ".weight"
    head.weight = nn.Parameter(head.weight.data.clone(), requires_grad=False)
    if decoder.source is not None:
        decoder.source.untie(name, head.weight)
    untie(model.config)
    getattr(model, "all_tied_weights_keys", {}).pop(name, None)
