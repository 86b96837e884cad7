"""SinkMap: what detection found in a model, and on which text."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sinkquant.artifacts.base import Artifact, Strict
from sinkquant.artifacts.heads import HeadAblations, HeadRole
from sinkquant.artifacts.kept_shape import KeptShape

SinkKind = Literal["bos", "first_position", "delimiter", "token", "learned"]
SinkCriterion = Literal["attention", "shared_mass", "remaining_mass", "massive", "learned"]


class ModelFacts(Strict):
    """What was looked at."""

    name: str
    architecture: str
    layers: int
    heads: int
    kv_heads: int
    hidden_size: int
    parameters: int
    dtype: str


class TokenizationFacts(Strict):
    """Whether `<bos>` stands where the model expects it: in the tokenizer, and in the rows of this run."""

    bos_token_id: int | None
    bos_token: str | None = None
    adds_bos: Literal["none", "once", "twice"]
    rows_start_with_bos: bool
    rows: int
    length: int


class SinkToken(Strict):
    """A token that attention sinks into.

    `attention` is the mean mass that it receives over heads, layers and the queries that see it; `heads` is the
    share of heads whose score is over the threshold; `share`: the share of all positions that hold it. `position` is
    null where the sink is not bound to one. `layers` are those in which a head sinks into it.

    `criteria`, what made it one: "attention", enough heads give it more than the threshold; "shared_mass", they do to
    all massive tokens together, and to it more than to any token that is not massive; "remaining_mass", of what other
    sinks leave; "learned", a learned column. "massive" stands beside one of these, never alone.
    """

    token_id: int | None
    text: str | None
    position: int | None
    kind: SinkKind
    attention: float
    heads: float
    share: float
    massive: bool
    criteria: list[SinkCriterion] = Field(default_factory=list)
    layers: list[int] = Field(default_factory=list)


class Head(Strict):
    """One query head. `sink_score`: mean attention mass on the sinks; `value_drain`: norm of the sink's value over
    the median norm; `output_norm`: mean norm of the head's output over the mean of its layer."""

    sink_score: float
    value_drain: float | None
    output_norm: float
    no_op: bool


class Channel(Strict):
    """A massive-activation channel of the residual stream.

    `peak` is the largest |h|, `ratio` the largest peak / median |h| of one layer, `born` and `ended` the sub-blocks
    ("embedding", "layers.3.attention", "layers.3.mlp", "layers.3") with the largest rise and fall of the channel's
    maximum; `tokens` the labels of the tokens that carry it, `profile` its maximum after every sub-block.
    """

    channel: int
    peak: float
    ratio: float
    born: str
    ended: str | None
    tokens: list[str]
    profile: list[float] = Field(default_factory=list)


class OutlierChannel(Strict):
    """A channel that passes the ratio of massive activations without being one: many tokens carry it, or tokens that
    are no larger than others, or only blocks after the last attention.

    `peak` and `ratio` as of a massive channel; `share` of tokens that carry it where most do; `first` and `last` are
    the sub-blocks between which any does.
    """

    channel: int
    peak: float
    ratio: float
    share: float
    first: str
    last: str


class ResidualSink(Strict):
    """A channel of the residual stream in which most tokens are large (arXiv 2601.22966).

    `ratio`: |h| of the median token over the median |h| of the place, at the median place of the stream;
    `largest_ratio`: at the place where it is largest. `null`: `ratio` of the largest channel that is no residual sink.
    """

    channel: int
    ratio: float
    largest_ratio: float
    null: float


class Emergence(Strict):
    """Where massive activations emerge (arXiv 2605.08504): the sub-block in which the norm of the massive tokens rises
    most. `rise` and `norm` after it are in norms of the median token; `null` is the largest rise of any other token."""

    place: str
    block: int
    rise: float
    norm: float
    null: float


class SinkVerdict(Strict):
    """Whether the model has sinks, in a sentence, and why."""

    sinks: bool
    sentence: str
    reason: str


class SuperWeight(Strict):
    """One scalar of a down projection whose removal costs `loss_increase` nats per token."""

    module: str
    row: int
    column: int
    value: float
    loss_increase: float


class ModuleStatistics(Strict):
    """The input of one linear. `sink_energy` is the share of trace(H) that sink tokens contribute; `input_typical` the
    root mean square of the median token that is no sink, null in maps that were made before it was recorded."""

    input_max: float
    input_max_without_sinks: float
    sink_energy: float
    sink_columns: list[int]
    input_typical: float | None = None


class ExpertStatistics(Strict):
    """The experts of one layer; every list has a number for each of them.

    `tokens`: how many went to it, `sink_tokens`: of these the sinks. `input_max`: the largest input of its gate and up
    projections, and without sink tokens; `down_input_max`: of its down projection; `output_max`: the largest that this
    one gives. The last two are empty where they cannot be computed from outside.
    """

    tokens: list[int]
    sink_tokens: list[int]
    input_max: list[float]
    input_max_without_sinks: list[float]
    down_input_max: list[float]
    down_input_max_without_sinks: list[float]
    output_max: list[float] = Field(default_factory=list)


class SuperExpert(Strict):
    """An expert that makes massive activations (arXiv 2507.23279). `experts`: module name of its layer's experts.
    `output`: the largest output of its down projection; `null`: that of the experts that are no super experts."""

    experts: str
    expert: int
    output: float
    null: float


class OutlierPrefix(Strict):
    """The tokens that take the outliers of down projections upon themselves when they stand in front of every row
    (PrefixQuant 2410.05265): the most frequent outlier tokens, then `<bos>` where rows start with it.

    `count`: outlier tokens per row, position 0 included, of the layer with the most; 0 goes with an empty prefix.
    `largest_ratio`: the largest |input| of a token over the median token's; `layers`: how many were looked at.
    """

    token_ids: list[int]
    texts: list[str]
    count: int
    largest_ratio: float
    layers: int


class SinkMap(Artifact):
    """What is there: tokens, heads, channels, super weights, and what they do to the input of every linear. `experts`:
    module name of a layer's experts -> what they were handed in the rows that `modules` is of.

    `secondary` are tokens that draw attention in enough heads, but less than half of the strongest sink's, and are not
    massive wherever they stand; nothing is decided by them.

    `nulls`: field -> what the same measure gives where there is nothing to find, in words. `extensions`: what detectors
    of other packages found, by name.

    `head_roles` [layer][head]: what every head does with its attention; empty in a sink map of an older version.
    `head_ablations` is null where nobody asked what the heads are worth. `shape` is null where the map is of a model
    in memory, or of one whose shape its files alone do not tell.
    """

    schema_: Literal["sinkquant/sinkmap@1"] = Field(default="sinkquant/sinkmap@1", alias="schema")
    model: ModelFacts
    tokenization: TokenizationFacts
    sink_rate: dict[str, float]
    sink_rate_repeated_token: dict[str, float]
    sink_rate_without_bos: dict[str, float] | None = None
    thresholds: dict[str, float]
    tokens: list[SinkToken]
    secondary: list[SinkToken] = Field(default_factory=list)
    heads: list[list[Head]]
    channels: list[Channel]
    outlier_channels: list[OutlierChannel] = Field(default_factory=list)
    residual_sinks: list[ResidualSink] = Field(default_factory=list)
    emergence: Emergence | None = None
    depth: list[str] = Field(default_factory=list)
    super_weights: list[SuperWeight]
    modules: dict[str, ModuleStatistics]
    experts: dict[str, ExpertStatistics] = Field(default_factory=dict)
    super_experts: list[SuperExpert] = Field(default_factory=list)
    outlier_prefix: OutlierPrefix | None = None
    head_roles: list[list[HeadRole]] = Field(default_factory=list)
    head_ablations: HeadAblations | None = None
    verdict: SinkVerdict | None = None
    nulls: dict[str, str] = Field(default_factory=dict)
    extensions: dict[str, dict[str, Any]] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    shape: KeptShape | None = None

    @property
    def placed(self) -> list[SinkToken]:
        """The sinks that stand in a text: all but those that a model has learned beside it."""
        return [token for token in self.tokens if token.kind != "learned"]
