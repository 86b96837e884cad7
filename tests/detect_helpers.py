"""Small recipes and texts, and what a sink map says in short."""

from __future__ import annotations

import random
from pathlib import Path

from tiny_tokenizer import WORDS

from sinkquant.artifacts import SinkMap
from sinkquant.recipe import Recipe


def small_recipe(*assignments: str) -> Recipe:
    """Fewer and shorter rows than the default, for speed."""
    return Recipe().replace(["detect.rows=12", "detect.long_rows=4", "detect.long_length=192", *assignments])


def write_text(folder: Path, words: int = 2500, stops: float = 0.12, commas: float = 0,
               late: str | None = None) -> str:
    """A file of words drawn evenly, a full stop after a share `stops` of them, a comma after `commas` and a semicolon
    after half as many; the word `late` only after every 170th, so that few short rows hold it."""
    generator, pieces = random.Random(0), []
    usual = [word for word in WORDS if word != late]
    for i in range(words):
        pieces.append(generator.choice(usual))
        if generator.random() < stops:
            pieces.append(".")
        if commas:
            pieces += [mark for mark, share in ((",", commas), (";", commas / 2)) if generator.random() < share]
        if late and i % 170 == 120:
            pieces.append(late)
    path = folder / "words.txt"
    path.write_text(" ".join(pieces), encoding="utf-8")
    return str(path)


def tokens(sink_map: SinkMap) -> set[tuple[int | None, int | None, str, bool]]:
    """(token id, position, kind, massive) of every sink token."""
    return {(t.token_id, t.position, t.kind, t.massive) for t in sink_map.tokens}


def sinking_heads(sink_map: SinkMap) -> set[tuple[int, int]]:
    """(layer, head) of every head with a sink score over the threshold."""
    return {(layer, head) for layer, row in enumerate(sink_map.heads)
            for head, found in enumerate(row) if found.sink_score > 0.3}
