"""Sink fidelity: did a quantized model keep the sinks of its original?

Both models run over the same rows. Every figure stands beside its null: the same distance between the original and
itself on other text (random halves of the rows). A figure is out of bounds where it is farther from its ideal than
both the null and a tolerance: some sinks are the same on every text, and without a tolerance any rounding would count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import SinkFidelity, SinkToken
from sinkquant.artifacts.fidelity import FidelityCheck, SpreadCurve
from sinkquant.diagnose.fidelity_checks import (
    SINK,
    ProbedModel,
    attention_checks,
    bernoulli_divergence,
    kl_checks,
    massive_checks,
    of_blocks,
    value_checks,
)
from sinkquant.diagnose.rows import mark_sinks
from sinkquant.diagnose.sample import attention_of, attention_sample
from sinkquant.diagnose.spread import changes
from sinkquant.diagnose.survey import WalkSettings, survey
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, pick_device, read_text, starts_with_bos, token_rows
from sinkquant.models.blocks import same_heads
from sinkquant.models.head import OutputHead, headless, runs_of_positions
from sinkquant.models.walk import stubbed
from sinkquant.recipe import Recipe

ROWS, LENGTH = 32, 128
FEW_ROWS = 16
DESTROYED = 0.5
"""The sinks are destroyed where the heads that sink keep less than this share of the mass they gave them."""
ROTATED = 0.3
"""Relative difference of the token embeddings, which quantization leaves alone, from which on they are rotated."""
ROWS_AT_ONCE = 4096
"""Rows of a token embedding that are compared at a time."""


@dataclass(frozen=True)
class Looked:
    """What one model shows: computed once, and compared with any number of others.

    Attributes:
        side: figures of all rows. bare: change of every position without `<bos>`, None where rows begin with none.
        attention: of a short text, [layers, heads, length, length]. states: what the output head is given,
            [rows, length, hidden_size].
    """

    side: ProbedModel
    bare: list[float] | None
    attention: torch.Tensor
    states: torch.Tensor


class SinkComparison:
    """Compares quantized models with one original, which is looked at once.

    Args:
        sinks: the sink tokens of the original, as `detect` finds them.
        text: a file of text; None for the recipe's evaluation text, or the packaged one.
        rows, length: of so many tokens; fewer are faster, and their nulls wider.

    Raises:
        RequestError: the text is too short.
    """

    def __init__(self, original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sinks: Sequence[SinkToken],
                 recipe: Recipe | None = None, text: str | list[str] | None = None, rows: int = ROWS,
                 length: int = LENGTH) -> None:
        self.recipe, self.tokenizer, self.sinks = recipe or Recipe(), tokenizer, sinks
        settings = self.recipe.compute
        self.compute = WalkSettings(pick_device(settings.device), getattr(torch, settings.dtype), self.recipe.seed)
        self.original, decoder = original, Decoder.of(original)
        self.with_bos = starts_with_bos(tokenizer, self.recipe.calibration.bos)
        content = read_text(text or self.recipe.evaluate.text, "evaluation", tokenizer)
        self.rows = token_rows(tokenizer, content, rows, min(length, decoder.max_length), self.recipe.calibration.bos,
                               decoder.vocabulary, "evaluation text", key="")
        self.marked = mark_sinks(self.rows, sinks)
        self._known: Looked | None = None

    def compare(self, quantized: PreTrainedModel, kept: Sequence[int] | None = None) -> SinkFidelity:
        """Did it keep the sinks?

        Args:
            kept: the blocks of the original that it has, where some were dropped: those are compared.

        Raises:
            RequestError: it is not the same architecture.
        """
        first, second = Decoder.of(self.original), Decoder.of(quantized)
        require_quantized(first, second, kept)
        self._known = self._known or self._look(first)
        before, after = self._known, self._look(second)
        if kept is not None:
            attending = first.attending
            before = replace(before, side=of_blocks(before.side, kept), attention=before.attention[
                [place for place, block in enumerate(attending) if block in kept]])
        a, b, seed = before.side, after.side, self.compute.seed
        kl = position_divergence(self.original, before.states, quantized, after.states)
        curves = [SpreadCurve(with_bos=self.with_bos, position=a.position, before=a.curve, after=b.curve)]
        if before.bare is not None and after.bare is not None:
            curves.append(SpreadCurve(with_bos=False, position=a.position - 1, before=before.bare, after=after.bare))
        checks = [*attention_checks(a, b, seed),
                  *massive_checks(a, b, self.recipe.detect.massive_ratio, seed, _rotated(self.original, quantized)),
                  *value_checks(a, b, seed), *kl_checks(kl, self.marked, seed)]
        verdict, sentence = _judge(checks, a.mass.mean(-1), b.mass.mean(-1), bool(self.sinks))
        return SinkFidelity(
            verdict=verdict, sentence=sentence, checks=checks, rows=len(self.rows), length=self.rows.shape[1],
            heads=[bernoulli_divergence(one.mean(-1), two.mean(-1)).tolist()
                   for one, two in zip(a.layers, b.layers, strict=True)],
            mass=[layer.mean(-1).tolist() for layer in b.layers],
            mass_before=[layer.mean(-1).tolist() for layer in a.layers], spread=curves,
            sample=attention_sample(before.attention, after.attention, self.rows[0], self.tokenizer))

    def _look(self, decoder: Decoder) -> Looked:
        found = survey(decoder, self.rows, self.marked, self.compute, ranks=False)
        position = self.rows.shape[1] // 4
        moved = changes(decoder, self.rows, position, self.compute)[-1]
        layers = found.head_mass()
        side = ProbedModel(found, layers, torch.cat(layers), position, moved[:, position + 1:].mean(1),
                    moved.mean(0).tolist())
        bare = (changes(decoder, self.rows[:FEW_ROWS, 1:], position - 1, self.compute)[-1].mean(0).tolist()
                if self.with_bos else None)
        states = _head_inputs(decoder, self.rows, found.ended)
        found.ended = torch.empty(0)
        return Looked(side, bare, attention_of(decoder, self.rows[0], self.compute), states)


def sink_fidelity(original: PreTrainedModel, quantized: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                  sinks: Sequence[SinkToken], recipe: Recipe | None = None, text: str | list[str] | None = None,
                  kept: Sequence[int] | None = None) -> SinkFidelity:
    """Compare a quantized model with its original; see `SinkComparison` for the arguments.

    Raises:
        RequestError: the two are not the same architecture, or the text is too short.
    """
    return SinkComparison(original, tokenizer, sinks, recipe, text).compare(quantized, kept)


def require_quantized(original: Decoder, quantized: Decoder, kept: Sequence[int] | None = None) -> None:
    """Refuse a model that is not the other one quantized. kept: the blocks of the original that it has, where some were
    dropped."""
    alike = same_heads(original.model.config, quantized.model.config, kept)
    if not alike or (original.hidden_size, original.vocabulary) != (quantized.hidden_size, quantized.vocabulary):
        raise RequestError("the two models differ in width, depth, heads or vocabulary: one is not the other "
                           "quantized.")


def position_divergence(original: PreTrainedModel, before: torch.Tensor, quantized: PreTrainedModel,
                        after: torch.Tensor) -> torch.Tensor:
    """KL(original || quantized) of the next token at every position, float64 [rows, length], in nats, from what the
    heads are given, [rows, length, hidden_size]."""
    first, second = OutputHead(original), OutputHead(quantized)
    one, two = before.flatten(0, 1), after.flatten(0, 1)
    found = torch.empty(len(one), dtype=torch.float64)
    for run in runs_of_positions(first.vocabulary, len(one)):
        p = torch.log_softmax(first.logits(one[run]), dim=-1)
        q = torch.log_softmax(second.logits(two[run]).to(p.device), dim=-1)
        found[run] = (p.exp() * (p - q)).sum(-1).double().clamp(min=0).cpu()
    return found.view(before.shape[:2])


def _head_inputs(decoder: Decoder, rows: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
    """What the head is given after a walk, [rows, length, hidden_size]. ended: what the last block gave."""
    model = decoder.model
    with torch.no_grad(), headless(model) as seen:
        for row, hidden in zip(rows.split(1), ended.split(1), strict=True):
            with stubbed(decoder, hidden.to(model.device, model.dtype)):
                model(row.to(model.device), use_cache=False)
    return torch.cat(seen)


def _rotated(original: PreTrainedModel, quantized: PreTrainedModel) -> bool:
    """Whether the residual stream of the second has other axes: its token embeddings are quite different."""
    first, second = (model.get_input_embeddings().weight.detach() for model in (original, quantized))
    moved = whole = 0.0
    for a, b in zip(first.split(ROWS_AT_ONCE), second.split(ROWS_AT_ONCE), strict=True):
        moved += float((a.double().cpu() - b.double().cpu()).square().sum())
        whole += float(a.double().square().sum())
    return moved > ROTATED**2 * whole


def _judge(checks: list[FidelityCheck], before: torch.Tensor, after: torch.Tensor,
           has_sinks: bool) -> tuple[Literal["kept", "changed", "destroyed", "no sinks"], str]:
    if not has_sinks:
        return "no sinks", "The original has no sinks that could be kept."
    heads = before >= SINK
    left = float(after[heads].sum() / before[heads].sum()) if heads.any() else 1.0
    if left < DESTROYED:
        return "destroyed", (f"The sinks are destroyed: the {int(heads.sum())} heads that sink give them {left:.0%} of "
                             "the attention that they gave before.")
    broken = [check.name for check in checks if check.kept is False]
    if broken:
        return "changed", f"The sinks are there but changed: out of bounds are {', '.join(broken)}."
    return "kept", "The sinks are kept: every check is within its bound."
