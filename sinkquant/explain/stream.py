"""The residual stream of both models: massive activations through depth, and how much of the loss comes through what
the sink tokens carry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkquant.artifacts.explanation import MassiveChange
from sinkquant.models import Decoder

SHOWN = 4
Hook = Callable[[int, torch.Tensor], torch.Tensor | None]


@contextlib.contextmanager
def after_blocks(model: PreTrainedModel, look: Hook) -> Iterator[None]:
    """Call `look` with a block's index and its output [rows, length, hidden_size]; what it returns takes its place."""
    def watch(index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            whole = isinstance(output, torch.Tensor)
            new = look(index, output if whole else output[0])
            return None if new is None else new if whole else (new, *output[1:])

        return hook

    handles = [block.register_forward_hook(watch(index)) for index, block in enumerate(Decoder.of(model).blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def massive_changes(original: PreTrainedModel, quantized: PreTrainedModel, rows: torch.Tensor,
                    ratio: float) -> list[MassiveChange]:
    """Channels whose largest |h| is at least `ratio` times the median of a block's output, the largest first."""
    before, medians = _peaks(original, rows)
    after, _ = _peaks(quantized, rows)
    over = (before / medians[:, None].clamp(min=1e-30)).amax(0) >= ratio
    channels = sorted(torch.nonzero(over).flatten().tolist(), key=lambda c: -float(before[:, c].max()))[:SHOWN]
    return [MassiveChange(channel=c, before=before[:, c].tolist(), after=after[:, c].tolist()) for c in channels]


def _peaks(model: PreTrainedModel, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every block's output: largest |h| by channel [blocks, hidden_size], and the median |h| [blocks]."""
    blocks = len(Decoder.of(model).blocks)
    found: list[list[torch.Tensor]] = [[] for _ in range(blocks)]
    medians: list[list[torch.Tensor]] = [[] for _ in range(blocks)]

    def look(index: int, output: torch.Tensor) -> None:
        size = output.detach().float().abs().flatten(0, -2)
        found[index].append(size.amax(0).cpu())
        medians[index].append(size.median().cpu())

    with torch.no_grad(), after_blocks(model, look):
        for row in rows.split(1):
            model(row.to(model.device), use_cache=False)
    return (torch.stack([torch.stack(one).amax(0) for one in found]),
            torch.stack([torch.stack(one).mean() for one in medians]))


def _carried(model: PreTrainedModel, row: torch.Tensor, here: torch.Tensor) -> list[torch.Tensor]:
    """What some tokens of a row [1, length] carry after every block, [tokens, hidden_size]. here: bool [length]."""
    found: list[torch.Tensor] = []

    def look(_: int, output: torch.Tensor) -> None:
        found.append(output[0, here.to(output.device)].clone())

    with torch.no_grad(), after_blocks(model, look):
        model(row.to(model.device), use_cache=False)
    return found


def loss_with_sinks_exact(original: PreTrainedModel, quantized: PreTrainedModel, rows: torch.Tensor,
                          marked: torch.Tensor, measure: Callable[[], float]) -> float:
    """What `measure` gives while the sink tokens carry what they carry in the original, after every block.

    Args:
        rows: int64 [rows, length], which `measure` runs one by one in this order. marked: bool, alike: the sinks.
    """
    kept: list[list[torch.Tensor]] = []
    for row, here in zip(rows.split(1), marked, strict=True):
        kept.append(_carried(original, row, here))
    place = [0]

    def mend(index: int, output: torch.Tensor) -> torch.Tensor | None:
        if output.shape[:2] != (1, rows.shape[1]):  # no row: the output head is read without the blocks
            return None
        row = place[0] % len(rows)
        changed = output.clone()
        changed[0, marked[row].to(output.device)] = kept[row][index].to(output.device, output.dtype)
        place[0] += index == len(kept[row]) - 1
        return changed

    with after_blocks(quantized, mend):
        return measure()
