"""End-to-end tuning of codes and scales: all blocks at once, towards what the unquantized model predicts.

The student's loss is distillation's (Hinton et al. 1503.02531), the step that of SignRound (Cheng et al. 2309.05516),
which there sees one block at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sinkquant.errors import SinkquantError
from sinkquant.models import Decoder, as_stored, weight_matrix
from sinkquant.models.walk import stubbed
from sinkquant.quantize.offsets import SCALE_RATE, Offsets
from sinkquant.quantize.packed import PackedWeight

ROWS = 4
"""Rows of an iteration."""
LOGITS_BYTES = 1 << 28
"""What the float32 logits of one batch may take; one row is always run."""
RATE = 1.0
"""Steps of a code go from this over the number of iterations down to nothing."""
LOG = logging.getLogger("sinkquant")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Distill:
    """Sign-gradient descent on the divergence of a whole quantized model from the unquantized one.

    The loss is the mean over tokens of KL(unquantized || quantized) of the next token, over the full vocabulary. What
    an error at a sink costs is what it does to all tokens that read the sink, which this loss sees without being told.
    """

    iterations: int
    seed: int = 0
    rows: int = ROWS

    def run(self, decoder: Decoder, tuned: Mapping[str, Offsets], rows: torch.Tensor, target: torch.Tensor,
            device: str, stored: torch.dtype, progress: Progress | None = None) -> dict[str, PackedWeight]:
        """Tune the linears of a model together; afterwards they hold what is returned.

        Args:
            decoder: of the quantized model, all its weights in memory, in the dtype and on the `device` to compute in.
            tuned: module name -> codes and scales to start from.
            rows: int64 [rows, length]. target: [rows, length, hidden_size], what the last block of the unquantized
                model gives for them.
            stored: what the checkpoint rounds weights to.

        Returns:
            name -> packed weight; those that came where tuning does not lower the divergence over all rows.

        Raises:
            SinkquantError: the divergence is not finite.
        """
        model, vocabulary = decoder.model, decoder.vocabulary
        batch = max(1, min(self.rows, LOGITS_BYTES // (4 * vocabulary * rows.shape[1])))
        before = {name: offsets.packed for name, offsets in tuned.items()}
        linears = {name: decoder.linears[name] for name in tuned}
        generator = torch.Generator().manual_seed(self.seed)
        for name, packed in before.items():
            _put(linears[name], packed, stored)
        first = self._total(decoder, rows, target, batch, device)
        with _leaves(model, linears):
            for iteration in range(self.iterations):
                rate = RATE * (1 - iteration / self.iterations) / self.iterations
                chosen = torch.randperm(len(rows), generator=generator)[:self.rows]
                for part in chosen.split(batch):
                    _backward(decoder, rows[part].to(device), target[part].to(device))
                for name, offsets in tuned.items():
                    if (gradient := _gradient(linears[name])) is not None:
                        offsets.step(gradient, rate, rate * SCALE_RATE)
                        _put(linears[name], offsets.now(), stored)
                if progress:
                    progress(iteration + 1, self.iterations, "tuning end to end")
        found = {name: offsets.now() for name, offsets in tuned.items()}
        last = self._total(decoder, rows, target, batch, device)
        LOG.info("divergence on the calibration rows: %.5f, and %.5f after %d iterations end to end%s", first, last,
                 self.iterations, "" if last < first else ", which are not kept")
        if last < first:
            return found
        for name, packed in before.items():
            _put(linears[name], packed, stored)
        return before

    def _total(self, decoder: Decoder, rows: torch.Tensor, target: torch.Tensor, batch: int, device: str) -> float:
        """The mean divergence over all rows, in nats per token."""
        total = 0.0
        for part in torch.arange(len(rows)).split(batch):
            with torch.no_grad():
                ids = rows[part].to(device)
                wanted = torch.log_softmax(_teacher(decoder, ids, target[part].to(device)), -1)
                given = torch.log_softmax(_logits(decoder, ids).float(), -1)
                total += float((wanted.exp() * (wanted - given)).sum(-1).mean(1).sum())
        if not total < float("inf"):
            raise SinkquantError("the divergence from the unquantized model is not finite; run with "
                                 "compute.dtype=float32.")
        return total / len(rows)


def _backward(decoder: Decoder, rows: torch.Tensor, target: torch.Tensor) -> None:
    """Add the gradient of the divergence, summed over the tokens of some rows: steps see nothing of it but its sign."""
    wanted = torch.softmax(_teacher(decoder, rows, target), -1)
    logits = _logits(decoder, rows)
    with torch.no_grad():
        away = torch.softmax(logits.detach().float(), -1).sub_(wanted)  # the divergence's gradient to the logits
    logits.backward(away.to(logits.dtype))


def _logits(decoder: Decoder, rows: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(decoder.model(rows, use_cache=False).logits)


def _teacher(decoder: Decoder, rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Logits of the unquantized model, float32 [rows, length, vocabulary]. What follows the blocks is not quantized:
    the quantized model's serves."""
    with torch.no_grad(), stubbed(decoder, target):
        return _logits(decoder, rows).float()


def _gradient(linear: nn.Module) -> torch.Tensor | None:
    """That of a linear's weight, [rows, columns], which is taken away from it; None where no token came by."""
    assert isinstance(linear.weight, nn.Parameter)
    gradient = linear.weight.grad
    linear.weight.grad = None
    return None if gradient is None else as_stored(linear, gradient)


def _put(linear: nn.Module, packed: PackedWeight, stored: torch.dtype) -> None:
    """Let a linear hold a packed weight as the checkpoint will give it."""
    weight_matrix(linear).copy_(packed.dequantized(stored))


@contextlib.contextmanager
def _leaves(model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let the weights of some linears alone take gradients while the context is open."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for linear in linears.values():
        assert isinstance(linear.weight, torch.Tensor)
        linear.weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, wanted in before:
            parameter.grad = None
            parameter.requires_grad_(wanted)
