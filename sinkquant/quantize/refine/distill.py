"""End-to-end tuning of scales, and of codes where asked for: all blocks at once, towards what the unquantized model
predicts.

The student's loss is distillation's (Hinton et al. 1503.02531).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sinkquant.errors import SinkquantError
from sinkquant.models import Decoder, as_stored, weight_matrix
from sinkquant.models.walk import stubbed
from sinkquant.quantize.refine.refine import ROWS
from sinkquant.schemes.codecs.packed import PackedWeight

LOGITS_BYTES = 1 << 28
"""What the float32 logits of one batch may take; one row is always run."""


@dataclass(frozen=True)
class TeacherTargets:
    """What the unquantized model has to say about the calibration rows.

    rows: int64 [rows, length]. hidden: [rows, length, hidden_size], what its last block gives, in the compute dtype.
    head: the weight of its output head, where the quantized model's is packed.
    """

    rows: torch.Tensor
    hidden: torch.Tensor
    head: torch.Tensor | None = None


@dataclass(frozen=True)
class TeacherDivergence:
    """The mean over tokens of KL(unquantized || quantized) of the next token, over the full vocabulary, nats. What an
    error at a sink costs is what it does to all tokens that read the sink, which this loss sees without being told.

    linears: those whose weights take gradients. stored: what the checkpoint rounds weights to.
    """

    decoder: Decoder
    linears: Mapping[str, nn.Module]
    teacher: TeacherTargets
    device: str
    stored: torch.dtype

    @property
    def rows(self) -> int:
        return len(self.teacher.rows)

    @property
    def batch(self) -> int:
        """Rows whose logits are in memory together."""
        return max(1, min(ROWS, LOGITS_BYTES // (4 * self.decoder.vocabulary * self.teacher.rows.shape[1])))

    def put(self, name: str, packed: PackedWeight) -> None:
        """Let a linear hold a packed weight as the checkpoint will give it."""
        with torch.no_grad():
            weight_matrix(self.linears[name]).copy_(packed.dequantized(self.stored))

    def gradients(self, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        for part in chosen.split(self.batch):
            self._backward(part)
        return {name: gradient for name, linear in self.linears.items()
                if (gradient := _taken_gradient(linear)) is not None}

    def loss(self) -> float:
        total = 0.0
        with torch.no_grad():
            for part in torch.arange(self.rows).split(self.batch):
                wanted = torch.log_softmax(self._wanted(part), -1)
                given = torch.log_softmax(self._given(part).float(), -1)
                total += float((wanted.exp() * (wanted - given)).sum(-1).mean(1).sum())
        if not total < float("inf"):
            raise SinkquantError("the divergence from the unquantized model is not finite; run with "
                                 "compute.dtype=float32.")
        return total / self.rows

    def _backward(self, part: torch.Tensor) -> None:
        """Add the gradient of the divergence, summed over the tokens of some rows: steps see nothing of it but its
        sign."""
        wanted = torch.softmax(self._wanted(part), -1)
        logits = self._given(part)
        with torch.no_grad():
            away = torch.softmax(logits.detach().float(), -1).sub_(wanted)  # the divergence's gradient to the logits
        logits.backward(away.to(logits.dtype))

    def _given(self, part: torch.Tensor) -> torch.Tensor:
        rows = self.teacher.rows[part].to(self.device)
        return torch.as_tensor(self.decoder.model(rows, use_cache=False).logits)

    def _wanted(self, part: torch.Tensor) -> torch.Tensor:
        """Logits of the unquantized model, float32 [rows, length, vocabulary]. What follows the blocks is the quantized
        model's, but for a head that is packed."""
        parameter = self.decoder.model.get_output_embeddings().weight
        own = parameter.data
        with torch.no_grad(), stubbed(self.decoder, self.teacher.hidden[part].to(self.device)):
            parameter.data = own if self.teacher.head is None else self.teacher.head
            try:
                return self._given(part).float()
            finally:
                parameter.data = own


def _taken_gradient(linear: nn.Module) -> torch.Tensor | None:
    """That of a linear's weight, [rows, columns], which is taken away from it; None where no token came by."""
    assert isinstance(linear.weight, nn.Parameter)
    gradient = linear.weight.grad
    linear.weight.grad = None
    return None if gradient is None else as_stored(linear, gradient)
