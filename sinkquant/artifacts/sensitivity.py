"""Sensitivity: what quantizing each linear would cost, through the sink tokens and through all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from sinkquant.artifacts.base import Artifact, Strict
from sinkquant.methods import MethodName
from sinkquant.schemes import WeightFormat, scheme_of
from sinkquant.schemes.weight_format import PLAIN


class Terms(Strict):
    """KL divergence from the unquantized model, nats per token, with the quantized weights applied everywhere
    (`total`), at the sink tokens only (`sinks`) and at all others only (`others`).

    `sinks` is what a format loses through the sinks: their own hidden states, their keys and values, and what others
    read of them. The two do not add up to `total` where errors at both make each other worse, or cancel; a share that
    does (Shapley) would be a small difference of large numbers, whose rank follows their noise.
    """

    sinks: float
    others: float
    total: float


class FormatLoss(Strict):
    """One candidate format of a unit and what it costs: `predicted` to second order, `measured` by forward passes, null
    where that was not done. `diagonal` is the score that sums over all tokens and channels at once, half of
    sum g^2 e^2, as ModelOpt's auto_quantize has it: kept for comparison. `shared`: how much more the other tokens of a
    row lose together than one by one, over all linears by this method; a factor of `predicted.others`. `columns` input
    columns and `scalars` single weights of every linear stand beside the codes."""

    bits: int
    group_size: int
    method: MethodName
    columns: int = 0
    scalars: int = 0
    storage: str = PLAIN
    predicted: Terms
    measured: Terms | None = None
    diagonal: float
    shared: float = 1.0

    @property
    def form(self) -> WeightFormat:
        """How the weights would be stored."""
        return WeightFormat(self.bits, self.group_size, storage=self.storage, columns=self.columns,
                            scalars=self.scalars)

    @property
    def terms(self) -> Terms:
        """What was measured, or else predicted."""
        return self.measured or self.predicted


class UnitSensitivity(Strict):
    """The linears that share a format, because engines fuse them or because they are the experts of one layer, or one
    linear. `placed` is false where the model routes tokens to linears of their own: then sinks cannot be told from
    others and the whole loss is the others'."""

    modules: list[str]
    placed: bool = True
    losses: list[FormatLoss]

    def tried(self, form: WeightFormat) -> list[FormatLoss]:
        """The candidates whose weights are stored as those of a format; where there are none, plain integers tell what
        other integers lose."""
        scheme = scheme_of(form)
        own = [loss for loss in self.losses if loss.storage == scheme.tried_as]
        return own if own or not scheme.integers else [loss for loss in self.losses if loss.storage == PLAIN]

    def loss(self, form: WeightFormat, method: str | None = None) -> FormatLoss | None:
        """What a format costs by a method, or by the best of those that were tried where it is not among them; None
        where the format was no candidate. What inputs are rounded to makes no difference."""
        weights = (form.bits, form.group_size, form.columns, form.scalars)
        alike = [loss for loss in self.tried(form)
                 if (loss.bits, loss.group_size, loss.columns, loss.scalars) == weights]
        mine = [loss for loss in alike if loss.method == method]
        return min(mine or alike, key=lambda loss: loss.terms.total, default=None)


class KVLoss(Strict):
    """What it costs to pack the keys, or the values, of one KV head of one layer in so many bits, nats per token of
    rows of `kv_length` tokens; the exact tokens and the window of the cache stay as they are. `repeated`: the same,
    predicted on rows whose second half repeats the first; null where nobody asked. `no_op` and `sink_score`: of the
    query heads that read it, whether all are no-ops, and the largest share of attention on sinks."""

    layer: int
    head: int
    kind: Literal["key", "value"]
    bits: int
    predicted: float
    measured: float | None = None
    repeated: float | None = None
    no_op: bool = False
    sink_score: float = 0.0

    @property
    def loss(self) -> float:
        """What was measured, or else predicted."""
        return self.predicted if self.measured is None else self.measured

    @property
    def weighed(self) -> float:
        """What bits are chosen by: the loss on text, or the mean of it and that on repeated text."""
        return self.loss if self.repeated is None else (self.loss + self.repeated) / 2


class InputLoss(Strict):
    """What rounding one input to a format would lose, nats per token, predicted to second order with all else left
    alone: in all, and through the sink tokens. `scale` as in `ModuleDecision.activation_scale`."""

    activations: str
    scale: Literal["token", "tensor", "group"]
    sinks: float
    total: float


class InputSensitivity(Strict):
    """The linears that read one input, and what rounding it would lose, format by format, the coarsest first."""

    modules: list[str]
    losses: list[InputLoss]


class EndLoss(Strict):
    """KL divergence from the unquantized model in nats per token where the token embedding, or the output head, alone
    is rounded to so many bits: the head's from its logits, the embedding's to second order. A head that is tied to the
    embedding stands here for what reads it, the embedding for what it looks up."""

    kind: Literal["embedding", "head"]
    bits: int
    loss: float


class Ranking(Strict):
    """Spearman's rank correlation of predicted and measured losses over all units and formats, per term; `between`: the
    mean over formats of that among the units in one format. Null where one of the two is constant. `ratio`: all
    predicted losses over all measured ones."""

    total: float | None
    sinks: float | None
    others: float | None
    between: float | None
    ratio: float | None
    pairs: int


class Sensitivity(Artifact):
    """What each linear costs in each candidate format.

    `key` is a hash of the model, the rows, the sinks and the candidates: another one of these makes other numbers.
    `inputs` is empty where the recipe has no `activations.bits`, `ends` where it names no `end_bits`, `kv` where it
    names no `kv_bits`; `kv_ranking`: Spearman's rank correlation of its predicted and measured losses.
    """

    schema_: Literal["sinkquant/sensitivity@1"] = Field(default="sinkquant/sensitivity@1", alias="schema")
    key: str
    model: str
    rows: int
    length: int
    sinks: list[str]
    sink_positions: float
    units: list[UnitSensitivity]
    ranking: Ranking | None = None
    inputs: list[InputSensitivity] = Field(default_factory=list)
    ends: list[EndLoss] = Field(default_factory=list)
    kv: list[KVLoss] = Field(default_factory=list)
    kv_length: int = 0
    kv_ranking: float | None = None
    notes: list[str] = Field(default_factory=list)

    def end_loss(self, bits: Mapping[str, int]) -> float | None:
        """What both ends lose together, by kind; 16 bits lose nothing. None where one was not tried in its bits."""
        known: dict[tuple[str, int], float] = {(end.kind, end.bits): end.loss for end in self.ends}
        losses = [known.get(one) for one in bits.items() if one[1] < 16]
        found = [loss for loss in losses if loss is not None]
        return sum(found) if len(found) == len(losses) else None
