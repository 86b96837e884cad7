"""The walk: rows of tokens run through a decoder block by block.

Detection, calibration and quantization share it. A block's inputs are replayed for all rows, its outputs become the
next block's inputs. Only the block at hand is in memory and computed with, in the compute dtype and on the compute
device; a model from `open_model` has no other, and gets its weights from disk. Several sets of rows walk together and
share one reading of the weights.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sinkquant.errors import RequestError, SinkquantError, first_line
from sinkquant.models.activations import ActivationStore
from sinkquant.models.attention import AttentionObserver, observed_attention
from sinkquant.models.decoder import Decoder
from sinkquant.models.ends import next_token_losses, outside_modules, token_table
from sinkquant.models.handed import RoutedTokens, recorded, unobserved
from sinkquant.models.hooks import compute_in, computing, evaluating
from sinkquant.models.inputs import switch_of
from sinkquant.models.memory import give_back, map_large
from sinkquant.models.on_disk import ExpertsOnDisk, find_on_disk

FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)
"""What a model raises in its own forward pass."""
PACKAGE = Path(__file__).parents[1]


@dataclass
class Step:
    """One block of the walk. `run` replays all rows through it; hooks that the caller placed see every batch.

    Attributes:
        index: index of the block.
        block: the block, in the compute dtype.
        batch: the rows that are being replayed right now, for hooks that need to know.
        outputs: the block's outputs once it was run; a caller may set them instead of running it.
        on_disk: module name -> the block's experts, where they are not in memory with it.
        answers: module name -> what these make of the walk's inputs, [tokens, hidden_size], where `answer` was called.
    """

    index: int
    name: str
    block: nn.Module
    walk: Walk
    batch: slice = field(default_factory=lambda: slice(0, 0))
    outputs: torch.Tensor | None = None
    on_disk: dict[str, ExpertsOnDisk] = field(default_factory=dict)
    answers: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self) -> torch.Tensor:
        """Replay all rows. Returns the block's outputs, [rows, length, hidden_size] in the compute dtype."""
        self.outputs = self.replay(self.walk.hidden)
        return self.outputs

    def advance(self) -> None:
        """Let the walk hold the outputs of a step that was run, so that its inputs can go. It cannot run again."""
        assert self.outputs is not None
        self.walk.hidden = self.outputs

    def replay(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the block makes of other inputs than the walk's, without any effect on the walk. Same shapes as `run`.

        Raises:
            SinkquantError: it is not finite.
        """
        outputs = self.walk.store.empty(tuple(inputs.shape), inputs.dtype)
        with self.answering(inputs), self.walk.watched():
            for batch in self.batches(inputs):
                self.batch = batch
                outputs[self.batch] = self.forward(inputs[self.batch]).to(outputs.device)
        give_back()
        return outputs

    def handed(self, modules: Mapping[str, nn.Module], inputs: torch.Tensor) -> dict[str, RoutedTokens]:
        """What experts of the block are handed for such inputs. modules: name -> experts."""
        def forward(batch: slice) -> torch.Tensor:
            self.batch = batch
            return self.forward(inputs[batch])

        try:
            return recorded(modules, self.batches(inputs), inputs.shape[1], self.walk.store, forward)
        finally:
            self.batch = slice(0, 0)

    def probe(self, inputs: torch.Tensor) -> Any:
        """What the block itself gives for some inputs, [rows, length, hidden_size] on the compute device, while experts
        on disk make nothing. Hooks see it as no batch of the walk."""
        self.batch = slice(0, 0)
        try:
            for one in self.on_disk.values():
                one.silent = True
            return self._given(inputs)
        finally:
            for one in self.on_disk.values():
                one.silent = False

    @contextlib.contextmanager
    def answering(self, inputs: torch.Tensor) -> Iterator[None]:
        """Get ready to replay these inputs once, batch by batch: experts on disk are read once each, whatever the
        number of batches, or not at all if they have answered before."""
        answers: dict[str, torch.Tensor] = {}
        if inputs is self.walk.hidden:
            answers, self.answers = self.answers, answers
        if self.on_disk and not answers and len(inputs) > self.walk.batch_size:
            (answers,) = _answers([(self, inputs)])
        try:
            for owner, made in answers.items():
                self.on_disk[owner].answers, self.on_disk[owner].answered = made, 0
            yield
        finally:
            for one in self.on_disk.values():
                one.answers = None

    def batches(self, inputs: torch.Tensor) -> list[slice]:
        """The rows that are replayed together, in order."""
        size = self.walk.batch_size
        return [slice(start, min(start + size, len(inputs))) for start in range(0, len(inputs), size)]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the block makes of the inputs of one batch, [rows, length, hidden_size] on the compute device.

        Raises:
            SinkquantError: it is not finite.
        """
        switch = switch_of(self.walk.decoder.model)
        if switch is not None:
            # Rows beyond the walk's are the same ones over again, with other hidden states.
            exact, rows = self.walk.exact, torch.arange(self.batch.start, self.batch.stop)
            switch.exact = None if exact is None else exact[rows % len(exact)]
        result = self._given(inputs.to(self.walk.device))
        given: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return given

    def _given(self, inputs: torch.Tensor) -> Any:
        """What the block gives, as it gives it.

        Raises:
            SinkquantError: it fails, or gives what is not finite.
        """
        try:
            result = self.block(inputs, **self.walk.arguments[self.index])
        except FAILURES as error:
            if not _of_the_model(error):
                raise
            raise SinkquantError(f"{self.name} fails in its own forward pass ({first_line(error)}); a number in "
                                 "config.json does not fit this model.") from error
        first = result[0] if isinstance(result, tuple) else result
        # One sum is not finite where any of its values is not; float32 holds that of a batch.
        if not torch.isfinite(first.sum(dtype=torch.float32)):
            raise SinkquantError(f"the outputs of {self.name} are not finite in {self.walk.dtype}; run with "
                                 "compute.dtype=float32, or check the model's weights and config.json.")
        return result


class Walk:
    """Rows on their way through a decoder.

    Args:
        rows: int64 [rows, length], all of one length, without padding.
        observers: see the attention of every layer while the walk goes on.
        store: where the hidden states of all rows live; RAM by default.
        whole: whether a block's experts are all in memory with it, however large they are: somebody changes them as a
            whole, or goes back through them.

    A model whose inputs are rounded lets the tokens of its exact prefix through as they are.
    """

    def __init__(self, decoder: Decoder, rows: torch.Tensor, batch_size: int, device: str = "cpu",
                 dtype: torch.dtype = torch.float32, observers: Sequence[AttentionObserver] = (),
                 store: ActivationStore | None = None, whole: bool = False) -> None:
        self.decoder = decoder
        self.rows = rows
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype
        self.observers = list(observers)
        self.store = store or ActivationStore()
        self.whole = whole
        self.hidden = torch.empty(0)
        self.arguments: list[dict[str, Any]] = []
        self.exact: torch.Tensor | None = None
        self._watching: list[AttentionObserver] = []

    def steps(self) -> Iterator[Step]:
        """Every block in order. A step that the caller does not `run` is run when the walk goes on.

        Raises:
            RequestError: the model hands its blocks something that depends on the text beside hidden states.
        """
        with contextlib.closing(together([self])) as walking:
            for (step,) in walking:
                yield step

    def losses(self, outputs: torch.Tensor | None = None, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Cross-entropy of the next token after a finished walk, float32 [rows, length - 1], in nats.

        Args:
            outputs: the last block's outputs, [rows, length, hidden_size], where they are others than the walk's.
            rows: int64 [rows, length], the tokens that they are of, where they are others than the walk's.
        """
        ended = self.hidden if outputs is None else outputs
        told = self.rows if rows is None else rows
        losses = []
        for start in range(0, len(ended), self.batch_size):
            batch = slice(start, start + self.batch_size)

            def logits(rows: torch.Tensor, hidden: torch.Tensor = ended[batch]) -> torch.Tensor:
                with stubbed(self.decoder, hidden.to(self.device)):
                    return torch.as_tensor(self.decoder.model(rows, use_cache=False).logits)

            losses.append(next_token_losses(self.decoder, told[batch], logits, self.device, self.dtype))
        return torch.cat(losses)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Let this walk's observers see attention while the context is open."""
        self._watching[:] = self.observers
        try:
            yield
        finally:
            self._watching.clear()

    def _enter(self, watching: list[AttentionObserver]) -> None:
        """Embed all rows, and record the other arguments that the model hands to each of its blocks."""
        self._watching = watching
        switch = switch_of(self.decoder.model)
        self.exact = None if switch is None else switch.begun_with_prefix(self.rows)
        recorded: list[list[dict[str, Any]]] = []
        for probe in (self.rows[:1], self.rows[-1:]):
            with _recorded(self.decoder) as (_, arguments):
                try:
                    self.decoder.model.base_model(probe.to(self.device), use_cache=False)
                except FAILURES as error:
                    if not _of_the_model(error):
                        raise
                    raise RequestError(f"{type(self.decoder.model).__name__} is not supported: its blocks hand on more "
                                       f"than hidden states ({first_line(error)}).") from error
            recorded.append(list(arguments))
        if len(recorded[0]) != len(self.decoder.blocks):
            raise RequestError(f"{type(self.decoder.model).__name__} is not supported: its forward pass does not call "
                               "each of its blocks once.")
        for first, second in zip(*recorded, strict=True):
            for key, value in first.items():
                if _holds_nan(value):
                    raise RequestError(f"{type(self.decoder.model).__name__} hands its blocks {key!r} that hold NaN; a "
                                       "number in its config.json makes no sense, of rope_parameters most likely.")
                if not _same(value, second.get(key)):
                    raise RequestError(f"{type(self.decoder.model).__name__} is not supported: it hands its blocks "
                                       f"{key!r}, which depends on the text.")
        self.arguments = recorded[0]
        self.hidden = self.store.empty((*self.rows.shape, self.decoder.hidden_size), self.dtype)
        for start in range(0, len(self.rows), self.batch_size):
            batch = slice(start, start + self.batch_size)
            with _recorded(self.decoder) as (inputs, _):
                self.decoder.model.base_model(self.rows[batch].to(self.device), use_cache=False)
            self.hidden[batch] = inputs[0].to("cpu", self.dtype)


def together(walks: Sequence[Walk]) -> Generator[tuple[Step, ...], None, None]:
    """Let several walks over one decoder go on side by side: one step of each, block by block, in one reading.

    Steps that the caller does not `run` are run, in order, when the walks go on.

    Raises:
        RequestError: the model hands its blocks something that depends on the text beside hidden states.
    """
    decoder, device, dtype = walks[0].decoder, walks[0].device, walks[0].dtype
    watching: list[AttentionObserver] = []
    map_large()
    with evaluating(decoder.model), torch.no_grad(), observed_attention(decoder.model, watching):
        rows = torch.cat([walk.rows.flatten() for walk in walks])
        outside = outside_modules(decoder)
        with (token_table(decoder, rows, device, dtype), decoder.present(outside),
              compute_in(outside, device, dtype)):
            for walk in walks:
                walk._enter(watching)
        for index, (name, block) in enumerate(zip(decoder.block_names, decoder.blocks, strict=True)):
            apart = [] if any(walk.whole for walk in walks) else find_on_disk(decoder, name, device, dtype,
                                                                             walks[0].store)
            on_disk = {one.owner: one for one in apart}
            with (decoder.present([block], [one.module for one in apart]), compute_in([block], device, dtype),
                  computing((one.module, one.forward) for one in apart)):
                steps = tuple(Step(index, name, block, walk, on_disk=on_disk) for walk in walks)
                yield steps
                for walk, step in zip(walks, steps, strict=True):
                    walk.hidden = step.outputs if step.outputs is not None else step.run()
                del step, steps, apart, on_disk  # or the last walk's outputs would outlive the next block


def answer(steps: Sequence[Step]) -> None:
    """Let experts on disk answer all of these steps, of walks that go on side by side, in one reading. What they say is
    taken up when a step is run."""
    if steps[0].on_disk:
        for step, answers in zip(steps, _answers([(step, step.walk.hidden) for step in steps]), strict=True):
            step.answers = answers


def _answers(asked: Sequence[tuple[Step, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Module name -> what experts on disk make of a step's inputs, [tokens, hidden_size]; one after the other."""
    on_disk = asked[0][0].on_disk
    handed = []
    with unobserved(asked[0][0].block):
        for step, inputs in asked:
            handed.append(step.handed({owner: one.module for owner, one in on_disk.items()}, inputs))
    found: list[dict[str, torch.Tensor]] = [{} for _ in asked]
    for owner, one in on_disk.items():
        given = [tokens.pop(owner) for tokens in handed]
        empty = [step.walk.store.empty(tuple(tokens.states.shape), tokens.states.dtype).zero_()
                 for (step, _), tokens in zip(asked, given, strict=True)]
        for answers, made in zip(found, one.run(given, empty), strict=True):
            answers[owner] = made
    return found


class Handed(torch.Tensor):
    """What stands in for a block's outputs: hidden states, and the first of what it gives where the model takes that
    (blocks that give a tuple, as Falcon-H1's). All that is computed of it is a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, indices: Any) -> torch.Tensor:
        plain = self.as_subclass(torch.Tensor)
        return plain if isinstance(indices, int) and indices == 0 else plain[indices]


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
        return hidden.as_subclass(Handed)

    with computing((block, forward) for block in decoder.blocks):
        yield inputs, arguments


@contextlib.contextmanager
def stubbed(decoder: Decoder, hidden: torch.Tensor, count: int | None = None) -> Iterator[None]:
    """Make every block, or the first `count` of them, return the given hidden states, so that only what follows is
    computed."""
    with computing((block, lambda *_, **__: hidden.as_subclass(Handed)) for block in decoder.blocks[:count]):
        yield


def _of_the_model(error: BaseException) -> bool:
    """Whether an error arose in transformers or below, and not in code of this package, nor for want of memory."""
    frames = traceback.extract_tb(error.__traceback__)
    return not isinstance(error, torch.OutOfMemoryError) and not Path(frames[-1].filename).is_relative_to(PACKAGE)


def _holds_nan(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and bool(value.isnan().any())
    return isinstance(value, tuple | list) and any(map(_holds_nan, value))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return isinstance(b, tuple | list) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return True
