"""End-to-end tuning of scales, and of codes where asked for: all blocks at once, towards what the unquantized model
predicts.

The student's loss is distillation's (Hinton et al. 1503.02531).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from sinkquant.errors import SinkquantError
from sinkquant.models import Decoder, as_stored, weight_matrix
from sinkquant.models.steps import Progress
from sinkquant.models.walk import stubbed
from sinkquant.quantize.refine.refine import ROWS, Tuned, refine
from sinkquant.schemes.codecs.packed import PackedWeight

LOGITS_BYTES = 1 << 28
"""What the float32 logits of one batch may take; one row is always run."""
LOG = logging.getLogger("sinkquant")


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
class Distill:
    """Refinement of the whole model."""

    iterations: int
    seed: int = 0

    def run(self, decoder: Decoder, tuned: Mapping[str, Tuned], teacher: TeacherTargets, device: str,
            stored: torch.dtype, progress: Progress | None = None) -> dict[str, PackedWeight]:
        """Tune the linears of a model together; afterwards they hold what is returned.

        Args:
            decoder: of the quantized model, all its weights in memory, in the dtype and on the `device` to compute in.
            tuned: module name -> what gradients change of it.
            stored: what the checkpoint rounds weights to.

        Returns:
            name -> packed weight; those that came where tuning does not lower the divergence over all rows.

        Raises:
            SinkquantError: the divergence is not finite.
        """
        linears = {name: decoder.linears[name] for name in tuned}
        if teacher.head is not None:  # once, in what the model computes in
            teacher = replace(teacher, head=teacher.head.to(decoder.model.get_output_embeddings().weight.data))
        objective = TeacherDivergence(decoder, linears, teacher, device, stored)

        def tell(done: int) -> None:
            if progress:
                progress(done, self.iterations, "tuning end to end")

        with _leaves(decoder.model, linears):
            refined = refine(tuned, objective, self.iterations, self.seed, tell)
        LOG.info("divergence on the calibration rows: %.5f, and %.5f after %d iterations end to end%s", refined.before,
                 refined.after, self.iterations, "" if refined.better else ", which are not kept")
        return refined.weights


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
