"""Facts beside tensors are written in one order."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from sinkquant.cache.ordered import save_ordered

FACTS = {name: f'"{name}" \u00e9\n' for name in "hgfedcba"}


def test_two_files_are_the_same_and_read_back(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.arange(3, dtype=torch.int8)}
    for index in range(8):
        save_ordered(tensors, tmp_path / str(index), FACTS)
    assert len({(tmp_path / str(index)).read_bytes() for index in range(8)}) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == FACTS
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
