"""The residual stream of both models: massive activations through depth, and how much of the loss comes through what
the sink tokens carry."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkquant.artifacts.explanation import MassiveChange
from sinkquant.models import Decoder
from sinkquant.models.hooks import computing, hooked
from sinkquant.models.walk import Handed

SHOWN = 4
Stream = list[list[torch.Tensor]]
"""By row and block: the block's output, [1, length, hidden_size]."""
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

    with hooked(block.register_forward_hook(watch(index)) for index, block in enumerate(Decoder.of(model).blocks)):
        yield


@contextlib.contextmanager
def recorded(model: PreTrainedModel) -> Iterator[Stream]:
    """What every block gives for the rows that are run while the context is open, one row at a time."""
    found: Stream = []

    def look(index: int, output: torch.Tensor) -> None:
        if len(output) > 1:  # the output head is read without the blocks, its positions as rows
            return
        if index == 0:
            found.append([])
        found[-1].append(output.detach().clone())

    with after_blocks(model, look):
        yield found


@contextlib.contextmanager
def from_block(model: PreTrainedModel, stream: Stream, first: int) -> Iterator[None]:
    """Let the blocks before `first` give what they gave when `stream` was recorded, on the same rows in their order:
    what is changed behind them does not change them."""
    blocks, turn = list(Decoder.of(model).blocks)[:first], itertools.cycle(stream)

    def passed(*args: Any, **named: Any) -> Any:
        return (args[0] if args else named["hidden_states"]).as_subclass(Handed)

    def given(*_: Any, **__: Any) -> torch.Tensor:
        return next(turn)[first - 1].as_subclass(Handed)

    with computing((block, given if block is blocks[-1] else passed) for block in blocks):
        yield


def massive_changes(before: Stream, after: Stream, ratio: float) -> list[MassiveChange]:
    """Channels whose largest |h| is at least `ratio` times the median of a block's output, the largest first."""
    one, medians = _peaks(before)
    two, _ = _peaks(after)
    over = (one / medians[:, None].clamp(min=1e-30)).amax(0) >= ratio
    channels = sorted(torch.nonzero(over).flatten().tolist(), key=lambda c: -float(one[:, c].max()))[:SHOWN]
    return [MassiveChange(channel=c, before=one[:, c].tolist(), after=two[:, c].tolist()) for c in channels]


def _peaks(stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every block's output: largest |h| by channel [blocks, hidden_size], and the median |h| [blocks]."""
    sizes = [[output.float().abs().flatten(0, -2).cpu() for output in row] for row in stream]
    return (torch.stack([torch.stack([size.amax(0) for size in row]) for row in sizes]).amax(0),
            torch.stack([torch.stack([size.median() for size in row]) for row in sizes]).mean(0))


def loss_with_sinks_exact(stream: Stream, quantized: PreTrainedModel, rows: torch.Tensor, marked: torch.Tensor,
                          measure: Callable[[], float]) -> float:
    """What `measure` gives while the sink tokens carry what they carry in the original, after every block.

    Args:
        stream: the original's, of these rows. rows: int64 [rows, length], which `measure` runs one by one in this
            order. marked: bool, alike: the sinks.
    """
    place = [0]

    def mend(index: int, output: torch.Tensor) -> torch.Tensor | None:
        if output.shape[:2] != (1, rows.shape[1]):  # no row: the output head is read without the blocks
            return None
        row = place[0] % len(rows)
        changed, here = output.clone(), marked[row].to(output.device)
        changed[0, here] = stream[row][index][0].to(output.device, output.dtype)[here]
        place[0] += index == len(stream[row]) - 1
        return changed

    with after_blocks(quantized, mend):
        return measure()
