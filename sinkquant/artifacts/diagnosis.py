"""Diagnosis: how a model mixes, what its sinks do for it, and what breaks without them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sinkquant.artifacts.base import Artifact, Strict
from sinkquant.artifacts.fidelity import SinkFidelity
from sinkquant.artifacts.sinkmap import ModelFacts, SinkToken, TokenizationFacts


class Measured(Strict):
    """A figure beside its null: 95 % of the same figures of the same model on random halves of the text lie between
    `low` and `high`."""

    value: float
    low: float
    high: float


class SinkRates(Strict):
    """Sink rate of the first position (Gu et al. 2410.10781, section 3) by threshold, and by layer at 0.3.

    `input`: "natural" text, "random" ids, or one id "repeated" without `<bos>`, the published negative control."""

    input: Literal["natural", "random", "repeated"]
    length: int
    rows: int
    rates: dict[str, Measured]
    layers: list[float]


class LayerMixing(Strict):
    """Rank collapse and smoothness after one block (Barbero et al. 2504.02732; Dong et al. 2103.03404).

    `mu`: ||V - (1/n) 1 1^T V||_F of the hidden states V [n, hidden_size]; `mu_ratio`: over ||V||_F. `effective_rank`:
    exp of the entropy of the normalised singular values (Roy & Vetterli 2007). A sink with a massive activation hides
    the others in both, so they are given without the sinks too. `row_entropy`: mean entropy of the rows of attention
    over the entropy of even attention, 1 is fully smooth; None where the block has no attention matrix.
    """

    layer: int
    mu: Measured
    mu_ratio: Measured
    mu_ratio_without_sinks: Measured
    effective_rank: Measured
    effective_rank_without_sinks: Measured
    row_entropy: Measured | None


class Collapse(Strict):
    """Representational collapse (Barbero et al. 2406.04267): ||v_n - v_(n+1)|| after the last block, the
    last token repeated once more; `relative` to ||v_n||."""

    length: int
    distance: Measured
    relative: Measured


class OverSquashing(Strict):
    """Where the last token's information comes from (Barbero et al. 2504.02732).

    `product`: row of the last token in the product over layers of abar = sum over heads of attention + identity /
    heads, each normalised to rows that sum to 1, one value per origin. `sink_share` and `far_share`: of it on the
    sinks, and on the other tokens of the first half. `jacobian`: spectral norm of d v_last / d v_origin from the first
    block's input to the last block's output, exact, for the first tokens of the rows; null on too large a model.
    """

    length: int
    rows: int
    product: list[float]
    sink_share: Measured
    far_share: Measured
    jacobian: list[float] | None = None


class Spread(Strict):
    """What one swapped token changes (Barbero et al. 2504.02732): ||delta h|| / ||h|| by layer and position.

    `changes` [layer][bin]: means over the positions from `starts`[bin] to the next one. `strength`: mean over all later
    positions after the last block; `reach`: share of them that change by more than `threshold` of their norm.
    """

    with_bos: bool
    position: int
    length: int
    starts: list[int]
    changes: list[list[float]]
    strength: Measured
    reach: Measured
    threshold: float


class BosVariant(Strict):
    """The same text with `<bos>` in front once, nowhere, in the middle, or twice.

    `loss`: nats per token over the same tokens of every variant; `loss_increase`: over "once". `sink_rate`: of the
    first position at 0.3; `bos_attention`: mean mass on the (first) `<bos>`, null without one.
    """

    name: Literal["once", "none", "moved", "twice"]
    loss: Measured
    loss_increase: Measured
    sink_rate: Measured
    bos_attention: float | None


class TokenValue(Strict):
    """Mean norm of a token's values over the median of their layer and head, over all layers and heads.
    `token_id`: null for a sink that is a position, whatever stands there."""

    token_id: int | None
    text: str
    count: int
    norm: float
    sink: bool


class Switch(Strict):
    """Queries that switch a dormant head on: tokens that are `text`, or that follow it.

    `on_rate`: share of the `count` queries that give the sinks less than half of their attention. `attends_to`: the
    token that gets the most instead, with the norm of its value.
    """

    relation: Literal["is", "after"]
    token_id: int
    text: str
    count: int
    on_rate: float
    attends_to: str
    value_norm: float


class DormantHead(Strict):
    """A head that rests on the sinks for most queries (approximate no-op, Barbero et al. 2504.02732).

    `on_rate`: over all queries; `output_norm`: over the mean of the layer; `value_drain`: `sink_value_norm` over the
    median value norm.
    """

    layer: int
    head: int
    sink_score: float
    on_rate: float
    output_norm: float
    sink_value_norm: float
    value_drain: float
    switches: list[Switch]


class SettledTokens(Strict):
    """Tokens of one kind. `depth`: the number of blocks after which a token has settled, by the divergence of its
    prediction; `same_top`: after which the token that is predicted first is the whole model's. `settled` [block]: the
    share of tokens that have settled after it."""

    kind: Literal["sinks", "delimiters", "others"]
    tokens: int
    depth: Measured
    same_top: Measured
    settled: list[float]


class SettlingDepth(Strict):
    """After how many of `blocks` a token's prediction stays within `bound` nats of the whole model's, the final norm
    and the output head being applied to what every block gives (LayerSkip, arXiv 2404.16710)."""

    bound: float
    blocks: int
    kinds: list[SettledTokens]


class Check(Strict):
    """One input that a sink may not survive. `loss` in nats per token over the same tokens as `reference_loss`, the
    same input untouched; null where an output is not finite. `sink_rate`: first position at
    0.3, null where attention was not seen (through a KV cache)."""

    name: str
    what: str
    defence: str | None = None
    loss: float | None
    reference_loss: float
    sink_rate: float | None
    reference_sink_rate: float | None
    finite: bool


class Diagnosis(Artifact):
    """Every diagnostic of one model beside its null.

    `against`: the same of a quantized version of it on the same rows, and `fidelity` what quantization did to its
    sinks; null where nothing was compared. `massive_peak` and `massive_ratio`: the largest massive activation.
    """

    schema_: Literal["sinkquant/diagnosis@1"] = Field(default="sinkquant/diagnosis@1", alias="schema")
    model: ModelFacts
    tokenization: TokenizationFacts
    text: str
    seed: int
    sinks: list[SinkToken]
    massive_peak: float
    massive_ratio: float
    sink_rates: list[SinkRates]
    first_position: list[list[float]]
    mixing: list[LayerMixing]
    collapse: list[Collapse]
    over_squashing: OverSquashing
    spread: list[Spread]
    bos: list[BosVariant]
    values: list[TokenValue]
    dormant_heads: list[DormantHead]
    depth: SettlingDepth | None = None
    robustness: list[Check] = Field(default_factory=list)
    special_tokens: dict[str, str] = Field(default_factory=dict)
    fidelity: SinkFidelity | None = None
    against: Diagnosis | None = None
    notes: list[str] = Field(default_factory=list)
