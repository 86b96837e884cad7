"""safetensors files with several facts beside the tensors, the same bytes every time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from safetensors.torch import save_file


def save_ordered(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], facts: Mapping[str, str]) -> None:
    """Write what `safetensors.torch.save_file` writes, with the facts in the order of their names: safetensors keeps
    them in a hash table whose order changes from one call to the next."""
    save_file(dict(tensors), path, dict(facts))
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "another order is no longer"
        file.seek(8)
        file.write(text.ljust(length))
