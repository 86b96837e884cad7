"""What stands in for all keys and values of a layer on their way to the attention function, so that a layer is read
packed where attention is ours, and dense wherever a model does something else with them first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map

SHAPE = frozenset({"__hash__", "__len__", "device", "dim", "dtype", "element_size", "get_device", "is_cpu", "is_cuda",
                   "is_floating_point", "is_leaf", "is_meta", "itemsize", "layout", "names", "ndim", "numel",
                   "requires_grad", "shape", "size", "stride"})
"""Methods and attributes that tell no number of a tensor."""


class Read(Protocol):
    """How a layer is read."""

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and all values."""
        ...


class StandIn(torch.Tensor):
    """A tensor without memory of its own. The attention function finds in `packed_read` what it is to read; to any
    other operation it is what it stands for: DiffLlama, say, repeats the values before it attends.

    Attributes:
        packed_read: the layer. place: 0 for keys, 1 for values.
    """

    packed_read: Read
    place: int

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        """The operation on dense copies, unless it asks for no number."""
        kwargs = kwargs or {}
        attribute = func.__name__ == "__get__"
        if (func.__self__.__name__ if attribute else func.__name__) in SHAPE:  # type: ignore[attr-defined]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)

        def dense(one: Any) -> Any:
            return one.packed_read.dense()[one.place] if isinstance(one, StandIn) else one

        return func(*tree_map(dense, args), **tree_map(dense, kwargs))


def stand_ins(read: Read, keys: torch.Tensor, values: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For all keys and for all values of a layer.

    Args:
        keys, values: the new ones, [batch, kv_heads, new, head_dim]. length: columns of the stand-ins.
    """
    found = []
    for place, new in enumerate((keys, values)):
        batch, heads, _, width = new.shape
        one = new.new_full((1, 1, 1, 1), float("nan")).expand(batch, heads, length, width).as_subclass(StandIn)
        one.packed_read, one.place = read, place
        found.append(one)
    return found[0], found[1]


def read_of(key: torch.Tensor, value: torch.Tensor) -> Any:
    """What both stand for; None where they are no stand-ins any more."""
    read = getattr(key, "packed_read", None)
    return read if read is getattr(value, "packed_read", None) else None
