"""The walk: rows of tokens run through a decoder block by block.

Detection, calibration and quantization share it. A block's inputs are replayed for all rows, its outputs become the
next block's inputs. Only the block at hand is computed with, in the compute dtype and on the compute device; whatever
it was before is restored when the walk leaves it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sinkquant.errors import RequestError, SinkquantError
from sinkquant.models.attention import AttentionObserver, observed_attention
from sinkquant.models.decoder import Decoder


@dataclass
class Step:
    """One block of the walk. `run` replays all rows through it; hooks that the caller placed see every batch.

    Attributes:
        index: index of the block.
        block: the block, in the compute dtype.
        batch: the rows that are being replayed right now, for hooks that need to know.
    """

    index: int
    name: str
    block: nn.Module
    walk: Walk
    batch: slice = field(default_factory=lambda: slice(0, 0))
    outputs: torch.Tensor | None = None

    def run(self) -> torch.Tensor:
        """Replay all rows. Returns the block's outputs, [rows, length, hidden_size] in the compute dtype."""
        inputs = self.walk.hidden
        outputs = torch.empty_like(inputs)
        for start in range(0, len(inputs), self.walk.batch_size):
            self.batch = slice(start, min(start + self.walk.batch_size, len(inputs)))
            result = self.block(inputs[self.batch].to(self.walk.device), **self.walk.arguments[self.index])
            outputs[self.batch] = (result[0] if isinstance(result, tuple) else result).to(outputs.device)
        if not torch.isfinite(outputs).all():
            raise SinkquantError(f"the outputs of {self.name} are not finite in {self.walk.dtype}; "
                                 "run with compute.dtype=float32 or check the model's weights.")
        self.outputs = outputs
        return outputs


class Walk:
    """Rows on their way through a decoder.

    Args:
        rows: int64 [rows, length], all of one length, without padding.
        observers: see the attention of every layer while the walk goes on.
    """

    def __init__(self, decoder: Decoder, rows: torch.Tensor, batch_size: int, device: str = "cpu",
                 dtype: torch.dtype = torch.float32, observers: Sequence[AttentionObserver] = ()) -> None:
        self.decoder = decoder
        self.rows = rows
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype
        self.observers = list(observers)
        self.hidden = torch.empty(0)
        self.arguments: list[dict[str, Any]] = []

    def steps(self) -> Iterator[Step]:
        """Every block in order. A step that the caller does not `run` is run when the walk goes on.

        Raises:
            RequestError: the model hands its blocks something that depends on the text beside hidden states.
        """
        was_training = self.decoder.model.training
        self.decoder.model.eval()
        try:
            with torch.no_grad(), observed_attention(self.decoder.model, self.observers):
                with compute_in(self._outside_modules(), self.device, self.dtype):
                    self._enter()
                for index, (name, block) in enumerate(zip(self.decoder.block_names, self.decoder.blocks, strict=True)):
                    with compute_in([block], self.device, self.dtype):
                        step = Step(index, name, block, self)
                        yield step
                        self.hidden = step.outputs if step.outputs is not None else step.run()
        finally:
            self.decoder.model.train(was_training)

    def losses(self) -> torch.Tensor:
        """Cross-entropy of the next token after a finished walk, float32 [rows, length - 1], in nats."""
        model, hidden = self.decoder.model, self.hidden
        losses = []
        with torch.no_grad(), compute_in(self._outside_modules(heads=True), self.device, self.dtype):
            for start in range(0, len(hidden), self.batch_size):
                batch = slice(start, start + self.batch_size)
                rows = self.rows[batch].to(self.device)
                with _stubbed(self.decoder, hidden[batch].to(self.device)):
                    logits = model(rows, use_cache=False).logits.float()
                losses.append(nn.functional.cross_entropy(
                    logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none").cpu())
        return torch.cat(losses)

    def _enter(self) -> None:
        """Embed all rows, and record the other arguments that the model hands to each of its blocks."""
        hidden = []
        recorded: list[list[dict[str, Any]]] = []
        probes = [self.rows[:1], self.rows[-1:]]
        for probe in probes:
            with _recorded(self.decoder) as (_, arguments):
                self.decoder.model.base_model(probe.to(self.device), use_cache=False)
            recorded.append(list(arguments))
        if len(recorded[0]) != len(self.decoder.blocks):
            raise RequestError(f"{type(self.decoder.model).__name__} is not supported: its forward pass does not call "
                               "each of its blocks once.")
        for first, second in zip(*recorded, strict=True):
            for key, value in first.items():
                if not _same(value, second.get(key)):
                    raise RequestError(f"{type(self.decoder.model).__name__} is not supported: it hands its blocks "
                                       f"{key!r}, which depends on the text.")
        self.arguments = recorded[0]
        for start in range(0, len(self.rows), self.batch_size):
            with _recorded(self.decoder) as (inputs, _):
                self.decoder.model.base_model(
                    self.rows[start:start + self.batch_size].to(self.device), use_cache=False)
            hidden.append(inputs[0].to("cpu", self.dtype))
        self.hidden = torch.cat(hidden)

    def _outside_modules(self, heads: bool = False) -> list[nn.Module]:
        """Everything that is not inside a block; the output head only where it is asked for."""
        inside = {id(module) for block in self.decoder.blocks for module in block.modules()}
        head = self.decoder.model.get_output_embeddings()
        return [module for module in self.decoder.model.modules()
                if id(module) not in inside and (heads or module is not head)
                and not any(id(child) in inside for child in module.modules())
                and not any(True for _ in module.children())]


@contextlib.contextmanager
def compute_in(modules: Sequence[nn.Module], device: str, dtype: torch.dtype) -> Iterator[None]:
    """Cast the floating-point parameters and buffers of modules, and give every one its own dtype back afterwards."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    before = [(t, t.dtype, t.device) for t in tensors.values()]
    try:
        for tensor, _, _ in before:
            tensor.data = tensor.data.to(device, dtype) if tensor.is_floating_point() else tensor.data.to(device)
        yield
    finally:
        for tensor, old_dtype, old_device in before:
            tensor.data = tensor.data.to(old_device, old_dtype)


@contextlib.contextmanager
def _recorded(decoder: Decoder) -> Iterator[tuple[list[torch.Tensor], list[dict[str, Any]]]]:
    """Replace every block's forward by one that records its arguments and hands its input on."""
    inputs: list[torch.Tensor] = []
    arguments: list[dict[str, Any]] = []

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and any(argument is not None for argument in args):
            raise RequestError(f"{type(decoder.model).__name__} is not supported: it hands its blocks positional "
                               "arguments beside the hidden states.")
        inputs.append(hidden)
        arguments.append({key: value for key, value in kwargs.items()
                          if key not in ("past_key_values", "use_cache", "output_attentions")})
        return hidden

    with _replaced_forward(decoder, forward):
        yield inputs, arguments


@contextlib.contextmanager
def _stubbed(decoder: Decoder, hidden: torch.Tensor) -> Iterator[None]:
    """Make every block return the given hidden states, so that only what follows the blocks is computed."""
    with _replaced_forward(decoder, lambda *_, **__: hidden):
        yield


@contextlib.contextmanager
def _replaced_forward(decoder: Decoder, forward: Any) -> Iterator[None]:
    try:
        for block in decoder.blocks:
            block.forward = forward
        yield
    finally:
        for block in decoder.blocks:
            block.__dict__.pop("forward", None)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return isinstance(b, tuple | list) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return True
