"""The models of an evaluation: each loaded once where memory allows it, two at a time where it does not."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch
from transformers import PreTrainedModel

from sinkquant.models import pick_device
from sinkquant.models.memory import give_back
from sinkquant.recipe import Recipe

SHARE = 0.5
"""Of the memory that a run may take, what loaded models may; activations and logits have the rest."""

Load = Callable[[], PreTrainedModel]


def room(recipe: Recipe) -> float:
    """Bytes for loaded models, of the memory of the device that they are loaded to."""
    limit, device = recipe.compute.memory_limit, pick_device(recipe.compute.device)
    available = psutil.virtual_memory().available if limit is None else limit * 1e9
    return SHARE * (min(available, torch.cuda.mem_get_info()[0]) if device == "cuda" else available)


def size(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


class Shelf:
    """Loaded models by what loads them. The first one stays; others go where there is no room for one more, and always
    leave room for one.

    Args:
        room: bytes for all of them.
    """

    def __init__(self, room: float) -> None:
        self.room = room
        self._held: dict[Load, PreTrainedModel] = {}

    @property
    def beside_the_first(self) -> int:
        """How many other models there is room for, at least one; the first must have been loaded."""
        first = size(next(iter(self._held.values())))
        return max(1, int(self.room / max(first, 1)) - 1)

    def get(self, load: Load) -> PreTrainedModel:
        """The model, loaded now if it is not there. Nothing may hold another one that has to go for it."""
        if load not in self._held:
            while len(self._held) > 1 and len(self._held) > self.beside_the_first:
                del self._held[list(self._held)[1]]
            model = load()
            if self._held:
                share_equal(next(iter(self._held.values())), model)
            self._held[load] = model
            give_back()  # what loading took beside the model
        elif load != next(iter(self._held)):
            self._held[load] = self._held.pop(load)  # what was asked for last goes last
        return self._held[load]


def share_equal(first: PreTrainedModel, second: PreTrainedModel) -> None:
    """Let the second model use the first one's memory for parameters that are the same: embeddings, norms, the head."""
    known = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        same = known.get(name)
        if (same is not None and same.shape == parameter.shape and same.dtype == parameter.dtype
                and same.device == parameter.device and torch.equal(same, parameter)):
            parameter.data = same.data
