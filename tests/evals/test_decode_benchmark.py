"""The decode benchmark counts what is in memory, and puts rows beside bf16."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from checkpoints import quantized
from tiny_tokenizer import tiny_tokenizer

import sinkquant as sq
from sinkquant.formats import load, save

SPEC = importlib.util.spec_from_file_location(
    "decode", Path(__file__).parents[2] / "evals" / "benchmarks" / "decode.py")
assert SPEC is not None
assert SPEC.loader is not None
decode = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(decode)


def test_rows_have_their_bytes_and_stand_beside_bf16(text_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = save(quantized(text_file, dtype=torch.bfloat16)[0], tiny_tokenizer(), tmp_path / "out")
    rows = [decode.measure(row, tiny_folder, out, 4, 2) for row in ("bf16", "sinkquant")]
    found = sq.packing(load(out, packed=True)[0])
    assert [row["weight_bytes"] for row in rows] == [found.bfloat16_bytes, found.bytes]
    assert rows[1]["linear_bytes"] == found.linear_bytes
    assert all(row["tokens_per_second"] > 0 for row in rows)
    line = decode.table(rows).splitlines()[-1]
    assert line.startswith("| sinkquant |")
    assert f"{found.bytes / found.bfloat16_bytes:.3f}" in line
