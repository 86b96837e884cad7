"""What end-to-end tuning starts from, when a block comes in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sinkquant.formats.scratch import Scratch
from sinkquant.quantize import PackedWeight, QuantizedBlock
from sinkquant.schemes import WeightFormat


def test_a_later_part_of_a_block_leaves_what_was_kept_of_it(tmp_path: Path) -> None:
    scratch, codes = Scratch(tmp_path), torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
    packed = PackedWeight(codes, torch.ones(2, 1), 4)
    scratch.keep(QuantizedBlock(0, "a", {"a.x": packed}, {}, offsets={"a.x": torch.zeros(2, 8)}, ended=False))
    scratch.keep(QuantizedBlock(0, "a", {}, {}))
    scratch.keep(QuantizedBlock(1, "b", {}, {}))
    formats = {"a.x": WeightFormat(4, -1)}
    assert list(scratch.starts(2, formats)) == ["a.x"]
    assert torch.equal(scratch.starts(2, formats)["a.x"].packed.codes, codes)
    with pytest.raises(FileNotFoundError):
        scratch.starts(3, formats)
