"""Where a block shows the residual stream between its two sub-blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sinkquant.models import Step
from sinkquant.models.hooks import hooked


@dataclass(frozen=True)
class Middle:
    """Where a block shows the residual stream between its two sub-blocks: as the input of `module`, or, in a block
    whose sub-blocks run in parallel, as the block's input plus the output of its attention `module`."""

    module: nn.Module
    parallel_to: nn.Module | None = None


def find_middle(step: Step) -> Middle | None:
    """Where the residual stream between a block's two sub-blocks can be seen, or None.

    Found by what the children of the block compute rather than by name: an input r != h such that r = h + c * (output
    of an earlier child) for a scalar c (1, or Granite's residual multiplier); or, in parallel blocks, two outputs with
    block output = h + a + b, of which the attention's counts as written first.
    """
    seen: list[tuple[nn.Module, torch.Tensor | None, torch.Tensor | None]] = []
    probe = step.walk.hidden[:1].to(step.walk.device)

    def as_probe(given: Any) -> torch.Tensor | None:
        # Some blocks flatten rows and positions between their sub-blocks (OPT).
        fits = isinstance(given, torch.Tensor) and given.numel() == probe.numel()
        return given.reshape(probe.shape) if fits else None

    def hook(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = inputs[0] if inputs else kwargs.get("hidden_states")
        seen.append((module, as_probe(given), as_probe(output[0] if isinstance(output, tuple) else output)))

    handles = [child.register_forward_hook(hook, with_kwargs=True) for child in step.block.children()]
    with hooked(handles):
        result = step.probe(probe)
    for i, (module, given, _) in enumerate(seen):
        if given is None or torch.equal(given, probe):
            continue
        change = given - probe
        for _, _, output in seen[:i]:
            if output is not None and _is_multiple(change, output, probe):
                return Middle(module)
    total = (result[0] if isinstance(result, tuple) else result) - probe
    written = [(module, output) for module, _, output in seen if output is not None]
    for module, first in written:
        if "attention" in type(module).__name__.lower():
            for other, second in written:
                if other is not module and _close(total, first + second, probe):
                    return Middle(module, parallel_to=step.block)
    return None


def _is_multiple(change: torch.Tensor, output: torch.Tensor, probe: torch.Tensor) -> bool:
    """Whether change = c * output for one scalar c."""
    energy = float(output.double().square().sum())
    if energy == 0:
        return False
    return _close(change, float((change.double() * output.double()).sum()) / energy * output, probe)


def _close(a: torch.Tensor, b: torch.Tensor, probe: torch.Tensor) -> bool:
    """Equal up to the rounding of sums with `probe`."""
    precision = max(1e-6, 2 * torch.finfo(probe.dtype).eps)
    return torch.allclose(a, b, rtol=10 * precision, atol=precision * float(probe.abs().max() + a.abs().max()))


@contextlib.contextmanager
def watched(middle: Middle | None, add: Callable[[torch.Tensor], None], shape: torch.Size) -> Iterator[None]:
    """Hand the residual stream at `middle` to `add` for every batch that runs in the context; nothing for None.

    Args:
        add: takes [rows, length, hidden_size].
        shape: [length, hidden_size]; some blocks flatten rows and positions between their sub-blocks (OPT).
    """
    if middle is None:
        yield
        return
    parallel, entered = middle.parallel_to, []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        if parallel is None:
            add(state.reshape(-1, *shape))
        else:
            entered.append(state)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        state = entered.pop() + (output[0] if isinstance(output, tuple) else output)
        add(state.reshape(-1, *shape))

    handles = [(parallel or middle.module).register_forward_pre_hook(before, with_kwargs=True)]
    if parallel is not None:
        handles.append(middle.module.register_forward_hook(after))
    with hooked(handles):
        yield
