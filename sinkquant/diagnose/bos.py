"""`<bos>` removed, moved, doubled: what the sink at the start is worth."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from sinkquant.artifacts.diagnosis import BosVariant
from sinkquant.detect.table import attention_of
from sinkquant.diagnose.null import measured
from sinkquant.diagnose.rows import with_bos
from sinkquant.diagnose.survey import WalkSettings
from sinkquant.models import Decoder

SINK = 0.3
Variant = Literal["once", "none", "moved", "twice"]


def bos_variants(decoder: Decoder, text: torch.Tensor, bos: int, compute: WalkSettings) -> list[BosVariant]:
    """Loss and sink rate with `<bos>` once, nowhere, in the middle of the text, and twice (Barbero et al. 2504.02732).

    Args:
        text: int64 [rows, length] without any `<bos>`; length at most the model's limit less 2.
    """
    found: list[BosVariant] = []
    reference: torch.Tensor | None = None
    places: dict[Variant, list[int]] = {"once": [0], "none": [], "moved": [text.shape[1] // 2], "twice": [0, 0]}
    for name in get_args(Variant):
        rows = with_bos(text, bos, places[name])
        walk = compute.walk(decoder, rows)
        layers = attention_of(walk).of_heads().layers
        loss = text_losses(walk.losses(), places[name]).double().mean(1)
        mass = torch.cat([layer.received[:, :, 0].double() / layer.visible[0] for layer in layers], dim=1)
        first = places[name][0] if places[name] else None
        reference = loss if reference is None else reference
        attention = None if first is None else float(torch.stack(
            [layer.received[:, :, first].double().mean() / layer.visible[first] for layer in layers]).mean())
        found.append(BosVariant(
            name=name, loss=measured(loss, compute.seed), loss_increase=measured(loss - reference, compute.seed),
            sink_rate=measured((mass > SINK).double().mean(1), compute.seed), bos_attention=attention))
    return found


def text_losses(losses: torch.Tensor, places: list[int]) -> torch.Tensor:
    """The losses of the text's tokens but the first, which is not predicted without `<bos>`, nor are put-in tokens.

    Args:
        losses: [rows, length - 1] of rows that `with_bos` made with these places.

    Returns:
        [rows, text length - 1].
    """
    is_text = [True] * (losses.shape[1] + 1 - len(places))
    for inserted, place in enumerate(places):
        is_text.insert(place + inserted, False)
    is_text[is_text.index(True)] = False
    return losses[:, torch.tensor(is_text[1:])]
