"""Explanation: where the loss of a quantized model comes from, each cause with the counterfactual that was measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sinkquant.artifacts.base import Artifact, Strict
from sinkquant.artifacts.comparison import PositionLoss

CauseKind = Literal[
    "tokenization", "configuration", "not finite", "inputs", "kv cache", "order", "rope", "scales", "super weight",
    "sink columns", "columns", "outlier scale", "learned sinks", "embedding", "head", "module", "role", "sinks"]


class Verified(Strict):
    """A recipe change that was carried out on the baseline: KL of what came of it, nats per token, and its share of the
    checkpoint's that is gone."""

    kl: float
    removes: float


class Cause(Strict):
    """One thing that is wrong.

    `removes`: the share of the loss that is gone in the counterfactual, where nothing but this is put right; negative
    where that makes it worse; null where it could not be measured. `recipe`: assignments for `--set` that mend it,
    empty where the files are broken and no recipe is to blame; `advice` says what to do in words.
    """

    kind: CauseKind
    where: str
    sentence: str
    removes: float | None
    kl_after: float | None
    recipe: list[str] = Field(default_factory=list)
    advice: str = ""
    verified: Verified | None = None


class PartLoss(Strict):
    """A module, or all modules of a layer or a role ("mlp.down_proj").

    `first_order`: its part of the KL in nats per token, by the gradient along the way from the baseline's weights to
    the checkpoint's, so that all parts add up to the whole. `removes`: the share of the loss that is gone when its
    unquantized weights are really put back; null where that was not tried. `error`: relative, of the weights.
    """

    name: str
    first_order: float
    removes: float | None = None
    error: float = 0.0


class TokenLoss(Strict):
    """A token before which the two models differ most: what stands there, and the KL of the prediction behind it."""

    row: int
    position: int
    text: str
    before: str
    kl: float


class HeadChange(Strict):
    """Mean attention on the sinks of one head, before and after."""

    layer: int
    head: int
    before: float
    after: float


class MassiveChange(Strict):
    """The largest |h| of a massive channel after every block, before and after."""

    channel: int
    before: list[float]
    after: list[float]


class SettingChange(Strict):
    """A value of config.json, or of the tokenizer, that is another one in the checkpoint."""

    name: str
    before: str
    after: str


class Explanation(Artifact):
    """What is wrong with a checkpoint. `kl`: of the checkpoint as it is served, from the baseline, nats per token.
    `causes` are ranked by what putting each right removes."""

    schema_: Literal["sinkquant/explanation@1"] = Field(default="sinkquant/explanation@1", alias="schema")
    checkpoint: str
    model: str
    kl: float | None
    sentence: str
    causes: list[Cause] = Field(default_factory=list)
    modules: list[PartLoss] = Field(default_factory=list)
    layers: list[PartLoss] = Field(default_factory=list)
    roles: list[PartLoss] = Field(default_factory=list)
    positions: list[PositionLoss] = Field(default_factory=list)
    tokens: list[TokenLoss] = Field(default_factory=list)
    sinks: str | None = None
    sinks_sentence: str | None = None
    heads: list[HeadChange] = Field(default_factory=list)
    massive: list[MassiveChange] = Field(default_factory=list)
    settings: list[SettingChange] = Field(default_factory=list)
    facts: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
