"""What a layer's experts are handed: recorded while rows walk as far as there, and no further."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sinkquant.models.activations import ActivationStore
from sinkquant.models.experts import handed_to_experts, shares_of
from sinkquant.models.hooks import hooked
from sinkquant.models.inputs import RoundedInputs


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens of one layer.

    Attributes:
        states: [tokens, hidden_size]; where they are of all rows on the CPU, a large one in the walk's store.
        chosen, shares: int64 and float [tokens, experts per token].
    """

    states: torch.Tensor
    chosen: torch.Tensor
    shares: torch.Tensor


def recorded(modules: Mapping[str, nn.Module], batches: Sequence[slice], length: int, store: ActivationStore,
             forward: Callable[[slice], object]) -> dict[str, RoutedTokens]:
    """Replay rows through a block, each batch until all of its experts were called.

    Args:
        modules: name -> experts. batches: of the rows, in order. length: tokens of a row.
        forward: runs the block for a batch.
    """
    states: dict[str, torch.Tensor] = {}
    routes: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in modules}
    seen: set[str] = set()
    batch = slice(0, 0)

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given, chosen = handed_to_experts(args, kwargs)
            if name not in states:
                states[name] = store.empty((batches[-1].stop * length, given.shape[1]), given.dtype)
            states[name][batch.start * length:batch.stop * length] = given.to("cpu")
            routes[name].append((chosen.cpu(), shares_of(args, kwargs).cpu()))
            seen.add(name)
            if len(seen) == len(modules):
                raise _ReachedError  # what the experts make of it is not needed

        return hook

    with hooked(module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in modules.items()):
        for batch in batches:
            seen.clear()
            with contextlib.suppress(_ReachedError):
                forward(batch)
    return {name: RoutedTokens(states[name], *(torch.cat(parts) for parts in zip(*routes[name], strict=True)))
            for name in modules}


@contextlib.contextmanager
def unobserved(block: nn.Module) -> Iterator[None]:
    """Let no hook inside a block act while the context is open, but for those that round inputs: whoever watches the
    block is to see every batch once."""
    kept: list[tuple[dict[int, Any], dict[int, Any]]] = []
    try:
        for module in block.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                before = dict(hooks)
                kept.append((hooks, before))
                for key, hook in before.items():
                    if not isinstance(hook, RoundedInputs):
                        del hooks[key]
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)


class _ReachedError(Exception):
    """All experts of the block have been handed their tokens."""
