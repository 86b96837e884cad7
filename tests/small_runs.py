"""A whole run in a second or two: model folders of several families, and a recipe cut down to their size."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from families import tiny_model
from tiny_tokenizer import tiny_tokenizer

from sinkquant import Recipe

SMALL = ["weights.group_size=32", "calibration.rows=4", "calibration.length=64", "detect.rows=8", "detect.long_rows=1",
         "evaluate.tasks=[sink_perplexity]", "evaluate.limit=2", "evaluate.divergence_rows=4",
         "evaluate.divergence_length=64", "evaluate.bootstrap=100"]


def model_folder(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32,
                 add_bos: Literal["none", "once", "twice"] = "once", has_bos: bool = True, shard: str = "5GB",
                 **config: Any) -> Path:
    """A tiny random model with its tokenizer."""
    tiny_model(family, dtype=dtype, **config).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer(add_bos, has_bos).save_pretrained(folder)
    return folder


def beginning(text: Path) -> Path:
    """The first thousand words of a text, in a file beside it: what takes all rows that it gets takes few."""
    short = text.with_name(f"beginning of {text.name}")
    if not short.exists():
        short.write_text(" ".join(text.read_text(encoding="utf-8").split()[:1000]), encoding="utf-8")
    return short


def small_recipe(text: Path, *assignments: str) -> Recipe:
    """The default recipe on a text that the tiny tokenizer knows, with few rows of everything."""
    return Recipe().replace([f"calibration.text={text}", f"evaluate.text={beginning(text)}", *SMALL, *assignments])


def fingerprint(folder: Path) -> dict[str, str]:
    """Path -> hash of every file below a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}
