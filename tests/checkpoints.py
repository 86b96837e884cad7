"""Quantized checkpoints of tiny models, for the tests of this folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from families import tiny_model
from forked import script, start
from safetensors.torch import load_file, save_file
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan, SinkMap
from sinkquant.models import Decoder
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

PLAIN = Path(__file__).parent / "formats" / "plain_transformers.py"


def plain_logits(rows: torch.Tensor, folders: Sequence[Path], work: Path) -> list[torch.Tensor]:
    """Logits [batch, tokens, vocabulary] of rows through every checkpoint, in a process that knows no sinkquant."""
    save_file({"rows": rows}, work / "rows.safetensors")
    program = start(work / "said", script, str(PLAIN), argv=(
        str(PLAIN), str(work / "rows.safetensors"), str(work / "logits.safetensors"), *map(str, folders)))
    code, _, err = program.communicate()
    assert code == 0, err
    found = load_file(work / "logits.safetensors")
    return [found[str(index)] for index in range(len(folders))]


def quantized(text: Path, family: str = "llama", method: str = "rtn", bits: int = 4, group: int = 32,
              dtype: torch.dtype = torch.float32, more: tuple[str, ...] = (),
              **overrides: Any) -> tuple[PreTrainedModel, Plan, SinkMap]:
    """A tiny model after `quantize`; its last down projection stays in 16 bits where there is one."""
    model = tiny_model(family, dtype=dtype, **overrides)
    decoder = Decoder.of(model)
    sink_map = sink_map_of(decoder, name=family)
    recipe = Recipe().replace([
        f"weights.method={method}", f"weights.bits={bits}", f"weights.group_size={group}", "calibration.rows=4",
        "calibration.length=16", "weights.descent=0", f"calibration.text={text}", "seed=7", *more])
    plan = make_plan(decoder.shape(family), sink_map, recipe)
    return quantize(model, plan, tiny_tokenizer()), plan, sink_map


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def logits(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """float32 [rows, length, vocabulary]. rows: int64 [rows, length]."""
    with torch.no_grad():
        return model(rows).logits.float()


def distance(model: PreTrainedModel, other: PreTrainedModel, rows: torch.Tensor) -> float:
    """Of the logits, relative, of the median token: a last bit can send a token to another expert."""
    expected = logits(other, rows)
    return float(((logits(model, rows) - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
