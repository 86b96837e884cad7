"""The walk back: the gradient of the model's own log-likelihood, pulled through a decoder block by block.

The rows walk forward once and the inputs of every block are kept (in the walk's store, so on disk where they are
large). Then the last block comes first: it is replayed with gradients, and what comes out at its input goes to the
block before it. One block and the gradients of one batch are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sinkquant.models.attention import AttentionObserver, observed_attention
from sinkquant.models.ends import outside_modules, token_table
from sinkquant.models.hooks import compute_in, evaluating, learning
from sinkquant.models.memory import give_back
from sinkquant.models.walk import Step, Walk, stubbed


@dataclass
class BackStep:
    """One block on the way back.

    Attributes:
        step: the block, its walk standing at this block's inputs; `step.batch` are the rows at hand.
        gradients: [rows, length, hidden_size], of the block's outputs; after `pull`, of its inputs.
        ended: [rows, length, hidden_size], the outputs of the last block.
    """

    step: Step
    gradients: torch.Tensor
    ended: torch.Tensor
    watching: list[AttentionObserver]

    def pull(self, observers: list[AttentionObserver] | None = None) -> None:
        """Replay all rows with gradients. Hooks that the caller placed see every batch, forward and back.

        Args:
            observers: see the attention of the block, keys and values being part of the graph.
        """
        walk = self.step.walk
        pulled = walk.store.empty(tuple(walk.hidden.shape), walk.dtype)
        self.watching[:] = observers or []
        try:
            for batch in self.step.batches(walk.hidden):
                self.step.batch = batch
                with torch.enable_grad():
                    inputs = walk.hidden[self.step.batch].to(walk.device, copy=True).requires_grad_()
                    outputs = self.step.forward(inputs)
                    outputs.backward(self.gradients[self.step.batch].to(outputs.device, outputs.dtype))
                assert inputs.grad is not None
                pulled[self.step.batch] = inputs.grad.to(pulled.device)
        finally:
            self.watching.clear()
        self.gradients = pulled
        give_back()


def steps_back(walk: Walk, seed: int = 0) -> Iterator[BackStep]:
    """Every block, last first, with the gradient of -log p(y) at its outputs, one y drawn from the model's own
    prediction at every position: the score whose square is the Fisher information, and half of that the KL divergence
    to second order (Martens 1412.1193, section 9).

    Gradients are summed over the positions of a row; rows do not see each other. A step that the caller does not `pull`
    is pulled when the walk goes on.

    Raises:
        RequestError: the model hands its blocks something that depends on the text beside hidden states.
        SinkquantError: hidden states are not finite.
    """
    decoder = walk.decoder
    inputs = [step.walk.hidden for step in walk.steps()]
    watching: list[AttentionObserver] = []
    walk._watching = watching  # whoever replays a step forward sees its attention too
    with evaluating(decoder.model), learning(decoder.model):
        gradients, ended = _of_the_head(walk, seed), walk.hidden
        for index in reversed(range(len(decoder.blocks))):
            name, block = decoder.block_names[index], decoder.blocks[index]
            walk.hidden = inputs.pop()
            with (torch.no_grad(), observed_attention(decoder.model, watching), decoder.present([block]),
                  compute_in([block], walk.device, walk.dtype)):
                block.requires_grad_(False)
                back = BackStep(Step(index, name, block, walk), gradients, ended, watching)
                before = back.gradients
                yield back
                if back.gradients is before:
                    back.pull()
                gradients = back.gradients


def _of_the_head(walk: Walk, seed: int) -> torch.Tensor:
    """d sum_t -log p(y_t) / d (the last block's outputs), [rows, length, hidden_size], y drawn from p."""
    decoder, ended = walk.decoder, walk.hidden
    head = decoder.model.get_output_embeddings()
    outside = [*outside_modules(decoder), *([] if head is None else [head])]
    gradients = walk.store.empty(tuple(ended.shape), walk.dtype)
    generator = torch.Generator().manual_seed(seed)
    with decoder.present(outside), compute_in(outside, walk.device, walk.dtype):
        for module in outside:
            module.requires_grad_(False)
        for start in range(0, len(ended), walk.batch_size):
            batch = slice(start, start + walk.batch_size)
            rows = walk.rows[batch]
            with torch.enable_grad(), token_table(decoder, rows, walk.device, walk.dtype):
                hidden = ended[batch].to(walk.device, copy=True).requires_grad_()
                with stubbed(decoder, hidden):
                    logits = decoder.model(rows.to(walk.device), use_cache=False).logits.float()
                # Drawn on the CPU, so that every device draws the same.
                drawn = torch.multinomial(torch.softmax(logits.detach().flatten(0, 1), -1).cpu(), 1,
                                          generator=generator)[:, 0].to(logits.device)
                nn.functional.cross_entropy(logits.flatten(0, 1), drawn, reduction="sum").backward()
            assert hidden.grad is not None
            gradients[batch] = hidden.grad.to(gradients.device)
    return gradients
