"""Codes of a key chosen together, so that what its channels err by makes up for each other.

A query meets all channels of a key at once: with second moment Q of the queries, errors e of the channels cost e' Q e,
which is not the sum of their squares where Q is not even. From the nearest codes on, every channel in turn takes the
code that costs least beside the errors of the others (coordinate descent, as for weights in QuantEase 2309.01885,
section 3); no step costs more than the one before. Codes, scales and zeros are stored as without it, and read alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SWEEPS = 2
"""Times that all channels are gone through; a third one takes off 1 % more."""
EVEN = 0.5
"""Part of the mean variance of the queries that is added to every channel: what other texts ask than the calibration
text."""
STRIP = 16
"""Channels whose changes go to all others in one product."""


@dataclass(frozen=True, eq=False)
class Descent:
    """Attributes:
        moment: float32 [heads, D, D], second moment of what packed states are multiplied with, made more even.
    """

    moment: torch.Tensor

    @classmethod
    def of_moment(cls, readers: torch.Tensor) -> Descent:
        """From float64 [heads, D, D], whose diagonals are not all zero."""
        mean = readers.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        return cls((readers / mean + EVEN * torch.eye(readers.shape[-1], dtype=readers.dtype)).float())

    def of(self, heads: Sequence[int]) -> Descent:
        """That of some heads, in this order."""
        return Descent(self.moment[list(heads)])

    def codes(self, states: torch.Tensor, step: torch.Tensor, start: torch.Tensor, levels: int) -> torch.Tensor:
        """uint8 codes on a given grid.

        Args:
            states: float32 [batch, heads, blocks, G, D].
            step, start: float32 [batch, heads, blocks, 1, D], what one code is worth, and what code 0 stands for.
            levels: the largest code.
        """
        moment = self.moment.to(states.device)
        shape = states.shape
        # Heads and channels first, so that a channel of all tokens lies in one piece.
        x, step, start = (one.expand(shape).permute(1, 4, 0, 2, 3).flatten(2).contiguous()
                          for one in (states, step, start))
        x, own = x.sub_(start).div_(step), moment.diagonal(dim1=-2, dim2=-1)
        codes = x.round().clamp_(0, levels)
        pull = moment @ ((x - codes) * step)
        worth = (step * own[..., None]).reciprocal_()  # of a pull, in codes
        for _ in range(SWEEPS):
            for first in range(0, shape[-1], STRIP):
                strip = slice(first, first + STRIP)
                here, changes = pull[:, strip].clone(), torch.empty_like(pull[:, strip])
                for place, channel in enumerate(range(*strip.indices(shape[-1]))):
                    code, later = codes[:, channel], slice(channel + 1, strip.stop)
                    better = torch.addcmul(code, here[:, place], worth[:, channel]).round_().clamp_(0, levels)
                    torch.sub(code, better, out=changes[:, place]).mul_(step[:, channel])
                    code.copy_(better)
                    here[:, place + 1:].addcmul_(moment[:, later, channel, None], changes[:, place:place + 1])
                pull.baddbmm_(moment[:, :, strip], changes)
        heads, width, (batch, _, blocks, size, _) = *codes.shape[:2], shape
        return codes.view(heads, width, batch, blocks, size).permute(2, 0, 3, 4, 1).to(torch.uint8)
