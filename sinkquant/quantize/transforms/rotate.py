"""Offline rotation (QuaRot, Ashkboos et al. 2404.00456, sections 3 and 4, without anything that stays online)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from sinkquant.errors import RequestError
from sinkquant.models import Decoder, Walk, together
from sinkquant.models.edits import Edit
from sinkquant.models.structure import Matrix, Norm, Pair, Structure, refusals
from sinkquant.quantize.transforms.hadamard import Rotation
from sinkquant.quantize.transforms.parameters import edit, read, read_matrix, untie_head

LENGTH = 16
TOLERANCE = 1e-3
"""Largest difference over the largest value, in float32; where something is not equivalent it is of the order of 1."""
Step = Callable[[torch.Tensor], torch.Tensor]
SMALLEST_GAIN = 1e-3
"""A norm's bias is divided by its gain where the linear after it has no bias to take it: by no less than this part of
the largest gain."""


@dataclass(frozen=True)
class Rotate:
    """Rotate values and output of every head, and with `scope` "full" the residual stream as well.

    The gains of norms go into the linears that read them, and are one afterwards. In a model whose norms take the mean
    off, the rotation leaves the vector of ones where it is. Nothing is left to be done online.
    """

    scope: Literal["values", "full"]
    seed: int = 0

    def apply(self, decoder: Decoder) -> None:
        """Rotate a model: at once where it holds its weights, and whenever they are read where they lie on disk.

        Raises:
            RequestError: as `edits`.
        """
        if self.scope == "full" and decoder.shape("").untied:
            untie_head(decoder)
        edit(decoder, self.edits(decoder))

    def edits(self, decoder: Decoder) -> dict[str, Edit]:
        """What becomes of every parameter, by its name. Reads norms, and the linears behind a norm with a bias.

        Raises:
            RequestError: the model would not compute the same.
        """
        structure = decoder.structure
        refused = refusals(structure).get(self.scope)
        if refused is not None:
            raise RequestError(f"weights.rotate={self.scope} is not possible: {refused}; set weights.rotate=none.")
        made = _Edits(decoder)
        if self.scope == "full":
            made.stream(structure, self.stream(decoder, structure))
        for index, block in enumerate(structure.blocks):
            assert block.values is not None
            made.values(block.values, Rotation(block.values.head_dim, self.seed + 1 + index))
        return {name: Edit(tuple(steps), name not in made.columnwise) for name, steps in made.steps.items()}

    def stream(self, decoder: Decoder, structure: Structure) -> Rotation:
        """The rotation of the residual stream."""
        return Rotation(decoder.hidden_size, self.seed, any(norm.centred for norm in structure.norms))


class _Edits:
    """Collects the steps of every parameter."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.steps: dict[str, list[Step]] = {}
        self.columnwise: set[str] = set()

    def stream(self, structure: Structure, rotation: Rotation) -> None:
        for name in structure.embeddings:
            self._add(name, rotation.apply)
        for block in structure.blocks:
            for norm, matrices in block.reads:
                self._read(norm, matrices, rotation)
            for matrix in block.writes:
                self._add(matrix.weight, rotation.apply if matrix.transposed else rotation.rows, matrix.transposed)
                if matrix.bias is not None:
                    self._add(matrix.bias, rotation.apply)
        assert structure.final is not None
        assert structure.head is not None
        model = self.decoder.model
        if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
            self._read(structure.final, (structure.head,), rotation)
        elif structure.final.bias is not None:  # tied, so that the gain is one
            self._bias(structure.final, _gain(self.decoder, structure.final), (replace(structure.head, bias=None),),
                       rotation)

    def values(self, pair: Pair, rotation: Rotation) -> None:
        rows, width = pair.rows, rotation.width

        def first(weight: torch.Tensor) -> torch.Tensor:  # [out, in]
            heads = weight[rows].reshape(-1, width, weight.shape[1])
            return weight.index_copy(0, rows, rotation.rows(heads).reshape(-1, weight.shape[1]))

        def bias(values: torch.Tensor) -> torch.Tensor:
            return values.index_copy(0, rows, rotation.apply(values[rows].reshape(-1, width)).flatten())

        def second(weight: torch.Tensor) -> torch.Tensor:  # [out, in]
            return rotation.apply(weight.reshape(len(weight), -1, width)).reshape(weight.shape)

        self._add(pair.first.weight, _turned(first, pair.first), by_rows=pair.first.transposed)
        if pair.first.bias is not None:
            self._add(pair.first.bias, bias, by_rows=False)
        self._add(pair.second.weight, _turned(second, pair.second), not pair.second.transposed)

    def _read(self, norm: Norm | None, matrices: tuple[Matrix, ...], rotation: Rotation) -> None:
        hidden = self.decoder.hidden_size
        gain = torch.ones(hidden, dtype=torch.float64) if norm is None else _gain(self.decoder, norm)
        if norm is not None and norm.gain is not None:
            self._add(norm.gain, _constant(1.0 - norm.offset))
        if norm is not None and norm.bias is not None:
            self._bias(norm, gain, matrices, rotation)

        def columns(weight: torch.Tensor) -> torch.Tensor:  # [..., in]
            return rotation.apply(weight * gain)

        def rows(weight: torch.Tensor) -> torch.Tensor:  # [..., in, out]
            return rotation.rows(weight * gain[:, None])

        for matrix in matrices:
            self._add(matrix.weight, rows if matrix.transposed else columns, by_rows=not matrix.transposed)

    def _bias(self, norm: Norm, gain: torch.Tensor, matrices: tuple[Matrix, ...], rotation: Rotation) -> None:
        """A norm's bias goes into the biases of all that read it; without them it is rotated where it stands."""
        assert norm.bias is not None
        bias = read(self.decoder, norm.bias).double()
        if bool((bias == 0).all()):
            return
        if all(matrix.bias is not None for matrix in matrices):
            for matrix in matrices:
                assert matrix.bias is not None
                more = read_matrix(self.decoder, matrix).double() @ bias
                self._add(matrix.bias, _plus(more), by_rows=False)
            self._add(norm.bias, _constant(0.0))
        elif float(gain.abs().min()) < SMALLEST_GAIN * float(gain.abs().max()):
            raise RequestError(f"weights.rotate=full is not possible: {norm.name} has a gain next to zero and a bias, "
                               f"which {matrices[0].module} has none to take; set weights.rotate=values.")
        else:
            self._add(norm.bias, lambda kept: rotation.apply(kept / gain))

    def _add(self, name: str, step: Step, by_rows: bool = True) -> None:
        self.steps.setdefault(name, []).append(step)
        if not by_rows:
            self.columnwise.add(name)


def _gain(decoder: Decoder, norm: Norm) -> torch.Tensor:
    """float64 [hidden_size]."""
    if norm.gain is None:
        return torch.ones(decoder.hidden_size, dtype=torch.float64)
    return norm.offset + read(decoder, norm.gain).double()


def _turned(step: Step, matrix: Matrix) -> Step:
    """A step on [out, in] for a weight that is stored as [in, out]."""
    return (lambda weight: step(weight.T).T) if matrix.transposed else step


def _constant(value: float) -> Step:
    return lambda tensor: torch.full_like(tensor, value)


def _plus(more: torch.Tensor) -> Step:
    return lambda tensor: tensor + more


def rehearse(decoder: Decoder, rotate: Rotate) -> None:
    """Compare blocks before and after a rotation on random inputs: the first of every kind, a kind being the names of
    its parameters. The model is as it was afterwards.

    Raises:
        RequestError: a block does not compute the same.
    """
    edits = rotate.edits(decoder)
    stream = rotate.stream(decoder, decoder.structure) if rotate.scope == "full" else None
    kinds = [frozenset(name for name, _ in block.named_parameters()) for block in decoder.blocks]
    firsts = {kinds.index(kind) for kind in kinds}
    generator = torch.Generator().manual_seed(rotate.seed)
    rows = torch.randint(decoder.vocabulary, (1, min(LENGTH, decoder.max_length)), generator=generator)
    inputs = torch.randn(1, rows.shape[1], decoder.hidden_size, generator=generator)
    with contextlib.closing(together([Walk(decoder, rows, 1, whole=True)])) as walking:
        for (step,) in walking:
            step.outputs = step.walk.hidden  # it is not run: what goes in here is random
            if step.index in firsts:
                expected = step.forward(inputs)
                kept = {name: parameter.data for name, parameter in step.block.named_parameters()}
                for name, parameter in step.block.named_parameters():
                    edit = edits.get(f"{step.name}.{name}")
                    parameter.data = parameter.data if edit is None else edit(parameter.data)
                found = step.forward(inputs if stream is None else stream.apply(inputs.double()).float())
                for name, parameter in step.block.named_parameters():
                    parameter.data = kept[name]
                wanted = expected if stream is None else stream.apply(expected.double()).float()
                if float((found - wanted).abs().max()) > TOLERANCE * float(wanted.abs().max()):
                    raise RequestError(f"weights.rotate={rotate.scope} is not possible: {step.name} does not compute "
                                       "the same after it; set weights.rotate=none.")
            if step.index == max(firsts):
                return
