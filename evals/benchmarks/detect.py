"""What detection costs: processor seconds by stage, beside one forward pass over the rows that it reads.

    python evals/benchmarks/detect.py demo MODEL_FOLDER ...

The forward pass is of as many rows as detection reads: those that sinks are looked for in, those of its negative
control, and where they start with `<bos>` the short ones without it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

import sinkquant as sq
from sinkquant.detect.detect import REPEATED_ROWS
from sinkquant.models import read_text, starts_with_bos, token_rows
from sinkquant.recipe import Recipe

BATCH_TOKENS = 512


class Stages:
    """Adds processor time up by the label that detection shows."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.begun = time.process_time()

    def __call__(self, done: int, total: int, label: str) -> None:
        """What went by since the last call belongs to this label."""
        self.close(label)

    def close(self, label: str) -> None:
        """Count what went by since the last call."""
        now = time.process_time()
        self.seconds[label] = self.seconds.get(label, 0.0) + now - self.begun
        self.begun = now


def forward_seconds(model: PreTrainedModel, sets: list[torch.Tensor]) -> float:
    """One plain forward pass of the blocks over all rows."""
    begun = time.process_time()
    with torch.no_grad():
        for rows in sets:
            for batch in rows.split(max(1, BATCH_TOKENS // rows.shape[1])):
                model.base_model(batch, use_cache=False)
    return time.process_time() - begun


def measure(name: str) -> None:
    """Print one model's rows of the table."""
    recipe = Recipe()
    settings = recipe.detect
    model, tokenizer = sq.load(name)
    text = read_text(recipe.calibration.text, "calibration", tokenizer)
    sets = []
    for count, length in ((settings.rows, settings.length), (settings.long_rows, settings.long_length)):
        if count and length <= model.config.max_position_embeddings:
            sets.append(token_rows(tokenizer, text, count, length, recipe.calibration.bos, model.config.vocab_size))
    bare = starts_with_bos(tokenizer, recipe.calibration.bos)
    plain = forward_seconds(model.float(), [*sets, sets[0][:REPEATED_ROWS], *sets[:bare]])
    stages = Stages()
    found = sq.detect(model, tokenizer, recipe=recipe, progress=stages)
    stages.close("deciding")
    whole = sum(stages.seconds.values())
    print(f"| {Path(name).name} | {plain:.1f} | {whole:.1f} | {whole / plain:.2f} | "
          f"{'; '.join(f'{label} {seconds:.1f}' for label, seconds in stages.seconds.items())} | "
          f"{len(found.tokens)} | {len(found.channels)} | {len(found.super_weights)} |", flush=True)


if __name__ == "__main__":
    print("| model | forward pass, s | detect, s | ratio | by stage, s | sinks | channels | super weights |")
    print("|---|---:|---:|---:|---|---:|---:|---:|")
    for model_name in sys.argv[1:]:
        measure(model_name)
