"""The output head apart from the rest: logits are needed of a few positions at a time, and of some never."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sinkquant.models.decoder import Decoder
from sinkquant.models.ends import outside_modules, token_table
from sinkquant.models.hooks import compute_in, computing
from sinkquant.models.walk import stubbed

PIECE_VALUES = 1 << 23
"""Logits that are held at a time, per model: 32 MB in float32, whatever the vocabulary."""


@contextlib.contextmanager
def headless(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Let a model's forward passes end before its output head; their logits mean nothing then.

    Yields:
        what the head was given by every pass, [rows, length, hidden_size].
    """
    head, states = model.get_output_embeddings(), []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        states.append(hidden)
        return hidden[..., :1]

    with computing([(head, forward)]):
        yield states


class OutputHead:
    """The output head of a model by itself, with all that the architecture does to logits (soft caps, factors)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.decoder = model, Decoder.of(model)
        self.vocabulary = self.decoder.vocabulary

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """float32 logits [positions, vocabulary] of what the head is given, [positions, hidden_size]."""
        given = states.to(self.model.device)[:, None]
        # The blocks hand on nothing of worth: what the head gets of it is replaced.
        nothing = given.new_zeros(len(states), 1, self.decoder.hidden_size)
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _module, _args: (given,))
        with hook, torch.no_grad(), stubbed(self.decoder, nothing):
            tokens = torch.zeros(len(states), 1, dtype=torch.long, device=self.model.device)
            return torch.as_tensor(self.model(tokens, use_cache=False).logits)[:, 0].float()


@contextlib.contextmanager
def what_follows(decoder: Decoder, device: str, dtype: torch.dtype) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Hold what follows the blocks in the compute dtype, the model's own or from disk, while the context is open.

    Yields:
        a function of what a block gives, [positions, hidden_size]: float32 logits [positions, vocabulary].
    """
    head, nothing = decoder.model.get_output_embeddings(), torch.zeros(1, 1, dtype=torch.long)
    outside = [*outside_modules(decoder), *([] if head is None else [head])]

    def logits(states: torch.Tensor) -> torch.Tensor:
        with stubbed(decoder, states.to(device, dtype)[:, None]):
            tokens = nothing.expand(len(states), 1).to(device)
            return torch.as_tensor(decoder.model(tokens, use_cache=False).logits)[:, 0].float()

    with (torch.no_grad(), decoder.present(outside), compute_in(outside, device, dtype),
          token_table(decoder, nothing, device, dtype)):
        yield logits


def keep_head(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Let a configuration that a copy of the model is built from tie no head which is one of its own in the model."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "weight", None) is not getattr(table, "weight", None):
        untie(config)


def untie(config: PreTrainedConfig) -> None:
    """Say in a configuration that head and token embedding are two parameters."""
    for one in {id(one): one for one in (config, config.get_text_config(decoder=True))}.values():
        if getattr(one, "tie_word_embeddings", False):
            one.tie_word_embeddings = False


def runs_of_positions(vocabulary: int, positions: int) -> list[slice]:
    """Positions in runs whose logits are `PIECE_VALUES` at most, or one position."""
    size = max(1, PIECE_VALUES // vocabulary)
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]
