"""A run that drops whole blocks first: all its stages then work on the shorter model, beside the whole one as the
baseline."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import ModelShape, Plan, SinkMap
from sinkquant.artifacts.base import write_atomically
from sinkquant.artifacts.blocks import BlockPlan
from sinkquant.blocks import choose_blocks, cut_blocks, require_droppable
from sinkquant.detect import detect
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, open_model
from sinkquant.models.processes import this_process
from sinkquant.models.shorter import shorter_model
from sinkquant.recipe import Recipe
from sinkquant.run.stages import Progress

SHORTER, WHOLE_MAP, BLOCKS = "model-shorter", "sinkmap-whole.json", "dropped.json"
"""In a run's folder: the unquantized model without its blocks, the sink map of the whole one, and which blocks went."""


def shape_after(decoder: Decoder, recipe: Recipe, edited: Plan | None, name: str) -> ModelShape | None:
    """What the shorter model holds that a run will work on: its names and sizes; None where no block is dropped. Which
    blocks go is not known before they are measured: the shapes are those without the last ones.

    Raises:
        RequestError: the blocks cannot be dropped, or several processes were started.
    """
    if edited is not None:
        kept = None if edited.blocks is None else edited.blocks.kept
    else:
        count = require_droppable(decoder, recipe)
        kept = list(range(len(decoder.blocks) - count)) if count else None
    if kept is None:
        return None
    if this_process()[1] > 1:
        raise RequestError("prune.blocks drops blocks in one process; start without torchrun, or drop them in a run of "
                           "its own with weights.ignore=['*'] first.")
    if not kept or not 0 <= min(kept) <= max(kept) < len(decoder.blocks):
        raise RequestError("the plan keeps blocks that this model does not have; make a plan for it.")
    return Decoder.of(shorter_model(decoder.model, kept)).shape(name)


def find_blocks(source: Path, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, name: str, known: SinkMap | None,
                edited: Plan | None, work: Path, trust_remote_code: bool, progress: Progress | None) -> None:
    """The sink map of the whole model, and the blocks that go: those of a plan that was given, or chosen now."""
    model = open_model(source, trust_remote_code)
    if known is None:
        fast = recipe.changed(detect={"super_weights": False}, prune={"heads": "none"})
        known = detect(model, tokenizer, recipe=fast, name=name, progress=progress)
    known.save(work / WHOLE_MAP)
    chosen = (edited.blocks if edited is not None and edited.blocks is not None else
              choose_blocks(model, tokenizer, known, recipe, progress))
    write_atomically(work / BLOCKS, chosen.model_dump_json(indent=2) + "\n")


def write_shorter(source: Path, tokenizer: PreTrainedTokenizerBase, work: Path, trust_remote_code: bool) -> None:
    """The unquantized checkpoint without its blocks."""
    cut_blocks(open_model(source, trust_remote_code), tokenizer, dropped(work).kept, work / SHORTER)


def dropped(work: Path) -> BlockPlan:
    """The blocks that a run has dropped."""
    return BlockPlan.model_validate_json((work / BLOCKS).read_text(encoding="utf-8"))


def with_blocks(plan: Plan, work: Path, recipe: Recipe) -> Plan:
    """A plan of the shorter model, with what was dropped before, and the recipe that asked for it."""
    chosen = dropped(work)
    return plan.model_copy(update={"blocks": chosen, "recipe": recipe.model_dump(mode="json"),
                                   "notes": list(dict.fromkeys([chosen.in_words(), *plan.notes]))})
