"""safetensors files with several facts beside the tensors, the same bytes every time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sinkquant.errors import RequestError


def save_ordered(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], facts: Mapping[str, str]) -> None:
    """Write what `safetensors.torch.save_file` writes, with the facts in the order of their names: safetensors keeps
    them in a hash table whose order changes from one call to the next. The folder is made where there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    aside = Path(path).with_name(f".{Path(path).name}.partial")  # a half-written one is never taken for the file
    try:
        save_file(dict(tensors), aside, dict(facts))
        with aside.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            assert len(text) <= length, "another order is no longer"
            file.seek(8)
            file.write(text.ljust(length))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def load_ordered(path: str | os.PathLike[str], schema: str, what: str, remedy: str, missing: str = "there is no",
                 device: str = "cpu") -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The facts and tensors of a file that `save_ordered` wrote.

    Args:
        schema: that the facts have to name. what: the file holds, in words. remedy: what to do about a broken one.
        missing: how the sentence of a file that is not there begins.

    Raises:
        RequestError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise RequestError(f"{missing} {what} {str(path)!r}.")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise RequestError(f"{path} is not a safetensors file; {remedy}.") from error
    if facts.get("schema") != schema:
        raise RequestError(f"{path} holds no {what} of this version ({schema}).")
    return facts, tensors
