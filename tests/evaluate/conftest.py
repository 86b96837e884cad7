"""Shared by the tests of evaluation: a tiny model, what it was given to read, and a text that it has tokens for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import tiny_model
from tiny_tokenizer import random_text
from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    """A random Llama with 96 positions."""
    return tiny_model("llama", max_position_embeddings=96)


@pytest.fixture
def inputs(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Every batch of token ids that the model is called with; none where its head alone is wanted, with zeros."""
    seen: list[torch.Tensor] = []

    def record(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if ids.any():
            seen.append(ids.detach().clone())

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.fixture(scope="session")
def text() -> str:
    """Prose without meaning, some 80,000 characters."""
    return random_text(20_000)
