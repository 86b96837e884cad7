"""A checkpoint and its baseline -> Explanation."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import SinkMap
from sinkquant.artifacts.explanation import Cause, Explanation, HeadChange, TokenLoss
from sinkquant.compare.checkpoint import Checkpoint, open_checkpoints
from sinkquant.detect import detect
from sinkquant.diagnose.fidelity import SinkComparison
from sinkquant.diagnose.rows import mark_sinks
from sinkquant.errors import RequestError
from sinkquant.evaluate.positions import by_position
from sinkquant.explain.diagnose import Measuring, percent
from sinkquant.explain.parts import different_parts
from sinkquant.explain.probe import Probe
from sinkquant.explain.remedies import remedy
from sinkquant.explain.settings import (
    changes,
    configuration_causes,
    finite_cause,
    front_of,
    text_changes,
    tokenization_cause,
)
from sinkquant.explain.stream import Stream, from_block, loss_with_sinks_exact, massive_changes, recorded
from sinkquant.explain.verify import verified
from sinkquant.explain.weights import ALONE, WeightLosses, weight_losses
from sinkquant.formats import bases_of, open_checkpoint, prefix_of, rounds_inputs, versions
from sinkquant.models import documents, load_model, load_tokenizer, pick_device, read_text, token_rows
from sinkquant.models.blocks import same_heads
from sinkquant.models.corpus import in_words
from sinkquant.models.decoder import max_length
from sinkquant.models.folder import require_baseline
from sinkquant.models.gguf import source_notes
from sinkquant.models.inputs import inputs_left_alone, switch_of
from sinkquant.models.loading import has_tokenizer, read_config
from sinkquant.models.numerics import own_numerics
from sinkquant.models.steps import Progress, Steps
from sinkquant.recipe import Recipe
from sinkquant.schemes.codecs.reading import dense_of

ROWS, LENGTH = 8, 128
STEPS = 40
"""About so many: how many there are is not known before the weights were looked at."""
TOKENS, HEADS = 12, 8
SINK_ROWS, SINK_LENGTH = 8, 128
"""Rows that the sinks of both are compared on, and their tokens where those that are measured have no fewer."""
NOTHING = 1e-7
"""KL in nats below which nothing is to be explained: the noise of float32."""
HEAD_MOVED = 0.02
"""Change of a head's mean attention on the sinks that is worth naming."""


@own_numerics()
def explain(checkpoint: str | os.PathLike[str], baseline: str | os.PathLike[str], *,
            text: str | os.PathLike[str] | list[str] | None = None, rows: int = ROWS, length: int = LENGTH,
            recipe: Recipe | None = None, sink_map: SinkMap | None = None, sinks: bool = True, verify: bool = False,
            trust_remote_code: bool = False, progress: Progress | None = None) -> Explanation:
    """Where the loss of a checkpoint comes from.

    The two models are in memory side by side in the compute dtype, and the changed weights once more.

    Args:
        checkpoint: a run's folder, a checkpoint of any format that `sinkquant.load` reads, or a GGUF file.
        baseline: the model it was made of.
        rows, length: how much text every counterfactual is measured on, in tokens; what a tokenizer puts in front is
            not counted.
        recipe: how to measure (`evaluate.text`, `compute`), and what `verify` changes where the checkpoint has none.
        sink_map: of the baseline; None: the one that the checkpoint carries, or detected now. sinks: whether sinks are
            looked at.
        verify: quantize the baseline anew with each recipe change that is named, and measure again.

    Raises:
        RequestError: the checkpoint is not that model quantized, or is not read here.
    """
    began = time.monotonic()
    checkpoint, baseline = os.fspath(checkpoint), os.fspath(baseline)
    recipe = (recipe or Recipe()).changed(
        evaluate={} if text is None else {"text": text if isinstance(text, list) else os.fspath(text)})
    (opened,), (base,) = open_checkpoints([checkpoint]), open_checkpoints([baseline])
    require_baseline(base.folder)
    notes = source_notes(base.folder)
    asked = _recipe_of(opened, recipe, verify, notes)
    tokenizer = load_tokenizer(base.folder, trust_remote_code)
    mine = tokenizer
    if has_tokenizer(opened.folder):
        mine = load_tokenizer(opened.folder, trust_remote_code)
    else:
        notes.append("the checkpoint has no tokenizer; the baseline's was used")
    content = read_text(recipe.evaluate.text, "evaluation", tokenizer)
    device, dtype = pick_device(recipe.compute.device), getattr(torch, recipe.compute.dtype)
    steps = Steps(STEPS, progress, "explaining:", "explained")
    step = steps.next
    step("loading")
    original = load_model(base.folder, dtype, device, trust_remote_code)
    model = _load(opened, dtype, device, trust_remote_code, notes)
    parts = different_parts(original, model)
    front, served = front_of(tokenizer), front_of(mine)
    room = min(max_length(original), max_length(model)) - max(len(front), len(served), len(opened.kv.front)
                                                              if opened.kv else 0)
    read = token_rows(tokenizer, content, rows, min(length, room), "never",
                      int(original.get_input_embeddings().weight.shape[0]), "evaluation text", "length")
    probe = Probe.of(original, read, front, served, opened.kv)
    settings = [*changes(original.config, model.config), *text_changes(tokenizer, mine, documents(content))]
    made: dict[str, Any] = {"checkpoint": checkpoint, "model": baseline, "settings": settings, "notes": notes,
                            "versions": versions()}
    stored = getattr(read_config(opened.folder, trust_remote_code).get_text_config(decoder=True), "dtype", None)
    step("the loss as it is served")
    with recorded(model) as stream:
        tokens = probe.kl(model)
    broken = finite_cause(model, probe, tokens, stored)
    if broken is not None and broken.removes is None:
        return Explanation(kl=None, sentence=broken.sentence, causes=[broken], **made)
    loss = float(tokens.mean())
    made |= {"kl": loss, "positions": by_position(tokens), "tokens": _worst(tokens, probe, tokenizer)}
    if loss < NOTHING and broken is None:
        return Explanation(sentence="Nothing is lost: the checkpoint predicts what the baseline predicts on this text "
                                    f"(KL {loss:.1g}).", **made)
    def measure(first: int) -> float:
        with contextlib.nullcontext() if opened.kv else from_block(model, stream, first):
            return probe.loss(model)

    measuring = Measuring(max(loss, NOTHING), measure, asked)
    causes = [broken] if broken else []
    causes += _of_serving(probe, model, measuring, opened, original)
    parts = parts if _comparable(opened, notes) else []
    if sinks and not same_heads(original.config, model.config):
        sinks = False
        notes.append("the checkpoint has other numbers of heads, so that sinks were not compared")
    known = sink_map or opened.sinks
    if known is None and (sinks or verify):
        step("detecting sinks")
        fast = recipe.changed(detect={"super_weights": False}, prune={"heads": "none"})
        known = detect(original, tokenizer, recipe=fast, name=base.named)
    found = WeightLosses([], [], [], [], 0.0)
    if parts and loss >= NOTHING:
        found = weight_losses(probe, model, parts, measuring, known, step)
        causes += found.causes
        made |= {"modules": found.modules, "layers": found.layers, "roles": found.roles}
    if sinks and known is not None:
        step("the sinks")
        causes += _of_sinks(probe, model, stream, known, measuring, causes, recipe, tokenizer, made, notes)
    causes.sort(key=lambda one: -(1.0 if one.removes is None else one.removes))
    if verify and known is not None:
        if opened.recipe is None:
            notes.append("the checkpoint carries no recipe; changes were verified on the one that was given, or the "
                         "defaults")
        for place, cause in enumerate(causes):
            step(f"verifying the change for {cause.where}")
            causes[place] = verified(cause, asked, lambda: load_model(base.folder, "auto", device, trust_remote_code),
                                     tokenizer, known, probe, measuring.loss)
    steps.end()
    facts: dict[str, str | int | float | bool | None] = {
        "text": in_words(recipe.evaluate.text) or "packaged evaluation text", "rows": len(read),
        "length": read.shape[1], "dtype": recipe.compute.dtype, "parameters that differ": len(parts),
        "first-order sum": sum(
            one.first_order for one in found.modules), "removed by the largest together": found.together,
        "seconds": round(time.monotonic() - began, 1)}
    return Explanation(causes=causes, sentence=_sentence(loss, causes), facts=facts, **made)


def _load(opened: Checkpoint, dtype: torch.dtype, device: str, trust_remote_code: bool,
          notes: list[str]) -> PreTrainedModel:
    if rounds_inputs(opened.folder):
        notes.append("the library rounds inputs too, in modules of its own; what is explained is its weights alone")
        return dense_of(open_checkpoint(opened.folder, trust_remote_code, dtype)).to(device).eval()
    return opened.load(dtype, device, trust_remote_code)


def _comparable(opened: Checkpoint, notes: list[str]) -> bool:
    """Whether a weight of the checkpoint stands where the baseline's does."""
    if not opened.transformed:
        return True
    notes.append("the recipe rotates or rescales weights before it rounds them, so that no module of the checkpoint "
                 "can be put back by itself; modules were not told apart")
    return False


def _recipe_of(opened: Checkpoint, given: Recipe, verify: bool, notes: list[str]) -> Recipe:
    """The recipe that a checkpoint was made with; where it has none, or one that cannot be read and nothing is made
    anew from it, the given one."""
    if not opened.recipe:
        return given
    try:
        return Recipe.parse(opened.recipe, "the checkpoint's recipe")
    except RequestError as error:
        if verify:
            raise
        notes.append(f"changes are those of the recipe that was given, or the defaults: {error}")
        return given


def _of_serving(probe: Probe, model: PreTrainedModel, measuring: Measuring, opened: Checkpoint,
                original: PreTrainedModel) -> list[Cause]:
    """Causes outside the weights: what is read, what config.json says, rounded inputs, the cache."""
    found = [tokenization_cause(probe, model, measuring)]
    found += configuration_causes(original, model, measuring, probe, prefix_of(opened.folder),
                                  bases_of(opened.folder))
    if switch_of(model) is not None:
        with inputs_left_alone(model):
            after, removes = measuring.removes()
        found.append(Cause(kind="inputs", where="inputs of linears", kl_after=after, removes=removes,
                           sentence=f"The inputs of linears are rounded: leaving them alone removes {percent(removes)} "
                                    "of the loss.", **remedy("inputs", "", measuring.recipe)))
    if opened.kv is not None:
        after = probe.loss(model, plain_cache=True)
        removes = 1 - after / measuring.loss
        found.append(Cause(kind="kv cache", where="KV cache", kl_after=after, removes=removes,
                           sentence=f"The KV cache is packed in {opened.kv.bits_per_value:.2g} bits: an unquantized "
                                    f"one removes {percent(removes)} of the loss.",
                           **remedy("kv cache", "", measuring.recipe)))
    return [one for one in found if one is not None]


def _of_sinks(probe: Probe, model: PreTrainedModel, stream: Stream, known: SinkMap, measuring: Measuring,
              causes: list[Cause], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, made: dict[str, Any],
              notes: list[str]) -> list[Cause]:
    """Fills in what became of the sinks. A cause of its own only where no other explains most of the loss."""
    fidelity = SinkComparison(probe.original, tokenizer, known.tokens, recipe, rows=SINK_ROWS,
                              length=min(SINK_LENGTH, probe.content.shape[1])).compare(model)
    moved = [HeadChange(layer=layer, head=head, before=before, after=after)
             for layer, (ones, others) in enumerate(zip(fidelity.mass_before, fidelity.mass, strict=True))
             for head, (before, after) in enumerate(zip(ones, others, strict=True))
             if abs(after - before) >= HEAD_MOVED]
    moved.sort(key=lambda one: -abs(one.after - one.before))
    made |= {"sinks": fidelity.verdict, "sinks_sentence": fidelity.sentence, "heads": moved[:HEADS]}
    if probe.kv is not None:  # the blocks were run in pieces
        return []
    made["massive"] = massive_changes(probe.stream, stream, recipe.detect.massive_ratio)
    if probe.served != probe.front:
        return []
    marked = mark_sinks(probe.rows, known.tokens)
    after = loss_with_sinks_exact(probe.stream, model, probe.rows, marked, lambda: measuring.measure(0))
    removes = 1 - after / measuring.loss
    notes.append(f"with the sink tokens carrying what they carry in the baseline, after every block, "
                 f"{percent(removes)} of the loss is gone")
    if removes < ALONE or any((cause.removes or 0) >= ALONE for cause in causes):
        return []
    return [Cause(kind="sinks", where="sink tokens", kl_after=after, removes=removes,
                  sentence="The loss comes through the sink tokens: letting them carry what they carry in the baseline "
                           f"removes {percent(removes)} of it.", **remedy("sinks", "", measuring.recipe))]


def _worst(tokens: torch.Tensor, probe: Probe, tokenizer: PreTrainedTokenizerBase) -> list[TokenLoss]:
    """The predictions with the largest KL."""
    read = probe.rows if probe.served == probe.front else probe.content
    found = []
    for place in tokens.flatten().topk(min(TOKENS, tokens.numel())).indices.tolist():
        row, position = divmod(place, tokens.shape[1])
        found.append(TokenLoss(row=row, position=position, text=str(tokenizer.decode([int(read[row, position])])),
                               before=str(tokenizer.decode(read[row, max(0, position - 6):position].tolist())),
                               kl=float(tokens[row, position])))
    return found


def _sentence(loss: float, causes: list[Cause]) -> str:
    if not causes:
        return f"KL {loss:.2g} nats per token from the baseline; no cause was found."
    return f"KL {loss:.2g} nats per token from the baseline. {causes[0].sentence}"
