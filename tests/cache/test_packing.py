"""Codes survive packing, and no bit is wasted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkquant.cache.packing import pack, unpack


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@given(eighths=st.integers(1, 16), width=st.integers(1, 17), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_codes_survive_and_take_their_bits(bits: int, eighths: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (2, 3, 8 * eighths, width), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)
