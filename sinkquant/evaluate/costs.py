"""What an evaluation takes, in memory and time; its work is counted in tokens before it begins."""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from sinkquant.costs import KEPT_BY_ALLOCATOR, Pace, Sizes
from sinkquant.diagnose.fidelity import LENGTH, ROWS
from sinkquant.evaluate.divergence import BATCH_ROWS
from sinkquant.evaluate.likelihood import TOKENS_AT_ONCE
from sinkquant.evaluate.looks import looks
from sinkquant.evaluate.shelf import SHARE
from sinkquant.evaluate.tasks import ready_tasks
from sinkquant.models import encode, read_text
from sinkquant.models.head import PIECE_VALUES
from sinkquant.recipe import Recipe

SAMPLE = 50_000
"""Characters of text that are encoded to see how many make a token."""
CACHED = 1.3
"""Plain passes through the blocks that one with a packed cache takes: it packs, and reads in chunks."""
FIDELITY_PASSES = 5.0
"""Plain passes through the blocks that sink fidelity takes for its rows and a model: four, some of which are watched,
as swapped tokens are read as well."""
OPENING, PER_TASK = 6.0, 0.5
"""Processor seconds: importing lm-eval; opening a task and putting its results together."""

EVALUATED_AT_ONCE = 1024
"""Tokens of the longest request of sinkquant's own tasks, where the model has positions for them."""
EVALUATION_LOADS = 0.25e9
"""lm-eval, datasets, pyarrow and matplotlib, which only evaluation needs."""


def evaluate_bytes(sizes: Sizes) -> float:
    """Bytes at the worst moment."""
    settings = sizes.recipe.evaluate
    longest = min(sizes.decoder.max_length, EVALUATED_AT_ONCE)
    rows = max(1, min(settings.batch_size, TOKENS_AT_ONCE // longest))
    length = min(sizes.decoder.max_length, settings.divergence_length)
    read = max(sizes.activations(rows * longest, longest), sizes.activations(BATCH_ROWS * length, length))
    # Both distributions of some positions, and what the divergence makes of them.
    logits = 6 * 4.0 * max(PIECE_VALUES, sizes.vocabulary)
    # The unquantized model beside another, or all where there is room; they share embeddings and head.
    whole = sizes.total * sizes.item
    models = min(2 + settings.control, max(2, int(SHARE * sizes.memory / whole)))
    others = (models - 1) * (whole - sizes.vocabulary * sizes.hidden * sizes.item)
    return EVALUATION_LOADS + whole + others + KEPT_BY_ALLOCATOR * (read + logits)


def evaluate_seconds(sizes: Sizes, pace: Pace, plans: int, tokenizer: PreTrainedTokenizerBase) -> float:
    """Seconds, of tokens that go through all blocks, of positions that go through the head, and beside them; plans:
    quantized models beside the unquantized one."""
    recipe, settings, cached = sizes.recipe, sizes.recipe.evaluate, sizes.recipe.kv_cache is not None
    weights = recipe.weights.bits < 16
    slower = CACHED if cached else 1.0
    tasks = task_tokens(recipe, tokenizer)
    read = sum(task[0] for task in tasks) * (1 + plans * slower)
    predicted = sum(task[1] for task in tasks) * (1 + plans)
    # Rows of the table, each read once, the cache's and the weights' own among them; the second look ends most.
    rows = [look.rows for look in looks(settings.divergence_rows, settings.precision)]
    tokens = rows[min(1, len(rows) - 1)] * min(settings.divergence_length, sizes.decoder.max_length)
    plain, through = (1 + plans, plans * 2) if cached and weights else (1 + plans * (not cached), plans * cached)
    read += tokens * (plain + through * CACHED)
    predicted += tokens * (plain + through)
    if settings.fidelity:
        read += FIDELITY_PASSES * ROWS * LENGTH * (1 + plans)
        predicted += ROWS * LENGTH * 2 * plans
    beside = OPENING + PER_TASK * len(tasks) * (1 + plans)
    return read * len(sizes.linears) * pace.plain + predicted * pace.head(sizes) + beside


def task_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[tuple[float, float]]:
    """Tokens that a model reads for each of sinkquant's own tasks, and those of them that are scored; tasks of a folder
    and lm-eval's are not counted."""
    settings = recipe.evaluate
    content = read_text(settings.text, "evaluation", tokenizer)
    part = content[:SAMPLE]
    per_character = len(encode(tokenizer, part)) / max(1, len(part))
    found = []
    with ready_tasks(settings.text, content, settings.tasks, recipe.seed) as folder:
        for path in sorted(folder.glob("*.jsonl")):
            if path.stem in settings.tasks:
                lines = path.read_text(encoding="utf-8").split("\n")  # JSON holds other ends of lines as they stand
                items = [json.loads(line) for line in lines if line]
                count = min(len(items), settings.limit or settings.sample or len(items))
                lengths = [_characters(path.stem, item, tokenizer) for item in items]
                read, scored = (per_character * count * sum(one) / len(items) for one in zip(*lengths, strict=True))
                found.append((read, scored))
    return found


def _characters(task: str, item: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Characters that a model is given for one item, over all of its answers, and that are scored."""
    if task == "sink_perplexity":
        return len(str(item["text"])), len(str(item["text"]))
    if task == "sink_cloze":
        answers = item["choices"]
        assert isinstance(answers, list)
        scored = sum(map(len, answers))
        # Answers of one token are read off the same row.
        rows = max(1, sum(len(encode(tokenizer, answer)) > 1 for answer in answers))
        return rows * len(str(item["context"])) + scored, scored
    openings = item["openings"]
    assert isinstance(openings, list)
    scored = len(openings) * len(str(item["end"]))
    return sum(len(opening) + len(str(item["middle"])) for opening in openings) + scored, scored
