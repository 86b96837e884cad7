"""The descent that block-wise and end-to-end tuning share: its steps against automatic differentiation, and what it
keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from sinkquant.quantize import PackedWeight, to_integers
from sinkquant.quantize.refine import Offsets, Scales, compressed, decompressed, refine, rounding_offsets
from sinkquant.quantize.refine.offsets import HELD, NEAR, REACH, SCALE_RATE
from sinkquant.quantize.refine.scales import MEAN_DECAY, SQUARE_DECAY
from sinkquant.schemes.codecs.block_scales import E2M1, BlockGrid
from sinkquant.schemes.codecs.integer_scales import storable


def moved(bits: int = 3) -> tuple[PackedWeight, torch.Tensor, torch.Tensor]:
    """A packed weight whose codes are not all the nearest ones, some on the end of the grid and some pruned; the
    weight; and what is kept of it."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(8, 64, generator=generator)
    packed = to_integers(bits, 32, torch.bfloat16, True).quantize(original)
    codes = packed.codes + torch.randint(-1, 2, packed.codes.shape, generator=generator)
    kept = torch.rand(8, 64, generator=generator) < 0.8
    return PackedWeight(codes.clamp(-4, 3).to(torch.int8) * kept, packed.scale, bits), original, kept


def test_steps_are_those_of_automatic_differentiation() -> None:
    """The reference rounds with a straight-through gradient, clamps as torch does, and follows the sign."""
    packed, original, kept = moved()
    generator = torch.Generator().manual_seed(1)
    spread = packed.scale.float().repeat_interleave(32, dim=1)
    nearest = (original / spread - packed.codes.float()).clamp(-NEAR, NEAR)
    shift, stretch = (nearest * kept).requires_grad_(), torch.zeros(8, 2, requires_grad=True)
    mine = Offsets.of(packed, rounding_offsets(packed, original, kept))
    for rate in (0.3, 0.2, 0.1):
        gradient = torch.randn(8, 64, generator=generator)
        real = packed.codes + shift
        codes = (real + (real.round() - real).detach()).clamp(-4, 3)
        scale = packed.scale.float() * (1 + stretch)
        scale = scale + (storable(scale, 3, torch.bfloat16).float() - scale).detach()
        dense = codes * scale.repeat_interleave(32, dim=1)
        assert torch.equal(dense.detach(), mine.now().dequantized())
        dense.backward(gradient)
        assert shift.grad is not None
        assert stretch.grad is not None
        with torch.no_grad():
            shift -= rate * shift.grad.sign() * kept
            shift.clamp_(-REACH, REACH)
            stretch -= SCALE_RATE * rate * stretch.grad.sign()
        shift.grad = stretch.grad = None
        mine.step(gradient, rate)
        assert torch.equal(mine.stretch, stretch.detach())
        assert torch.equal(mine.shift.nan_to_num(0.0), shift.detach())
    assert (mine.now().codes[~kept] == 0).all()
    assert (mine.now().codes != packed.codes).any()


def test_steps_of_scales_are_those_of_adam() -> None:
    """The reference passes gradients straight through the rounding of scales to bfloat16."""
    packed, *_ = moved()
    generator = torch.Generator().manual_seed(1)
    stretch = torch.zeros(8, 2, requires_grad=True)
    adam = torch.optim.Adam([stretch], betas=(MEAN_DECAY, SQUARE_DECAY), eps=1e-30)
    mine = Scales.of(packed, "cpu")
    for rate in (0.3, 0.2, 0.1):
        gradient = torch.randn(8, 64, generator=generator)
        scale = packed.scale.float() * (1 + stretch)
        scale = scale + (storable(scale, 3, torch.bfloat16).float() - scale).detach()
        dense = packed.codes * scale.repeat_interleave(32, dim=1)
        assert torch.allclose(dense.detach(), mine.now().dequantized(), rtol=0.01)
        dense.backward(gradient)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        adam.zero_grad()
        mine.step(gradient, rate)
        assert torch.allclose(mine.stretch, stretch.detach(), atol=1e-6)
    assert torch.equal(mine.now().codes, packed.codes)


def test_offsets_survive_one_byte_each() -> None:
    packed, original, kept = moved()
    offsets = rounding_offsets(packed, original, kept)
    steps = compressed(offsets)
    assert steps.dtype == torch.int8
    assert torch.equal(steps == HELD, ~kept)
    again = decompressed(steps, "cpu")
    assert torch.equal(again.isnan(), ~kept)
    assert (again - offsets)[kept].abs().max() <= NEAR / 127 / 2 + 1e-7


@dataclass
class Distance:
    """The squared distance of dense weights from others; every row of the text says the same."""

    wanted: dict[str, torch.Tensor]
    uphill: bool = False
    rows: int = 6
    held: dict[str, torch.Tensor] = field(default_factory=dict)
    asked: list[list[int]] = field(default_factory=list)

    def put(self, name: str, packed: PackedWeight) -> None:
        self.held[name] = packed.dequantized()

    def gradients(self, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        self.asked.append(chosen.tolist())
        return {name: (self.held[name] - wanted) * (-1 if self.uphill else 1) for name, wanted in self.wanted.items()}

    def loss(self) -> float:
        return sum(float((self.held[name] - wanted).square().sum()) for name, wanted in self.wanted.items())


@pytest.mark.parametrize("uphill", [False, True])
def test_what_comes_back_is_held_and_no_worse(uphill: bool) -> None:
    packed, original, _ = moved()
    objective = Distance({"a": original}, uphill)
    refined = refine({"a": Offsets.of(packed, rounding_offsets(packed, original))}, objective, 20, 0)
    assert refined.better is not uphill
    assert objective.loss() == pytest.approx(min(refined.before, refined.after))
    assert torch.equal(objective.held["a"], refined.weights["a"].dequantized())
    assert torch.equal(refined.weights["a"].codes, packed.codes) is uphill
    if not uphill:
        assert refined.after < 0.7 * refined.before


@pytest.mark.parametrize("whole", [None, torch.tensor([500.0])], ids=["E8M0", "E4M3"])
def test_four_bit_floats_move_from_number_to_number(whole: torch.Tensor | None) -> None:
    grid, numbers = BlockGrid(4, 16, whole), torch.tensor([*(-x for x in reversed(E2M1)), *E2M1[1:]]).float()
    places = torch.arange(-7.0, 8.0)
    assert torch.equal(grid.places(numbers), places)
    assert torch.equal(grid.at_(places.clone()), numbers)
    assert torch.equal(grid.at_(torch.tensor([-9.0, 9.0, 4.4, -6.6])), torch.tensor([-12.0, 12.0, 4.0, -12.0]))
    between = (numbers[1:] * 3 + numbers[:-1]) / 4
    assert torch.allclose(grid.places(between), places[1:] - 0.25)
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(8, 64, generator=generator)
    scale = torch.cat([grid.scales(part, None, True) for part in original.split(16, 1)], 1)
    nearest = grid.nearest_(original.unflatten(1, (-1, 16)) / grid.spread(scale)[..., None]).flatten(1)
    codes = grid.at_(grid.places(nearest) + torch.randint(-1, 2, nearest.shape, generator=generator))
    start = grid.weight(codes.to(torch.int8), scale)
    objective = Distance({"a": original})
    refined = refine({"a": Offsets.of(start, rounding_offsets(start, original))}, objective, 40, 0)
    assert refined.after < 0.7 * refined.before
    found = refined.weights["a"]
    assert set(found.codes.abs().unique().tolist()) <= set(E2M1)
    assert found.scale.dtype == torch.uint8
    assert not torch.equal(found.codes, start.codes)


def test_every_iteration_takes_rows_by_the_seed() -> None:
    packed, original, _ = moved()
    asked = []
    for seed in (0, 0, 1):
        objective = Distance({"a": original})
        refine({"a": Offsets.of(packed, rounding_offsets(packed, original))}, objective, 5, seed)
        assert [len(set(rows)) for rows in objective.asked] == [4] * 5
        asked.append(objective.asked)
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]
