"""Buffers of hidden states in mapped files take their room before anything is written to them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkquant.errors import SinkquantError
from sinkquant.models import ActivationStore


def test_a_mapped_file_takes_its_room_at_once_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = os.posix_fallocate
    blocks = []

    def allocate(handle: int, start: int, size: int) -> None:
        taken(handle, start, size)
        blocks.append(512 * os.fstat(handle).st_blocks)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    buffer = ActivationStore(tmp_path, 0).empty((4, 1 << 16), torch.float32)
    assert blocks[0] >= buffer.nbytes

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SinkquantError, match="bytes of hidden states have to go there"):
        ActivationStore(tmp_path, 0).empty((4, 1 << 16), torch.float32)
    assert list(tmp_path.iterdir()) == []
