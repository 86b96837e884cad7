"""Plan: what to do with every module, why, and what it will weigh."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr

from sinkquant.artifacts.base import Artifact, Strict
from sinkquant.artifacts.blocks import BlockPlan
from sinkquant.artifacts.ends import EndDecision
from sinkquant.artifacts.heads import SilencedHead
from sinkquant.artifacts.kv import KVCachePlan
from sinkquant.artifacts.kv_scheme import KVScheme
from sinkquant.artifacts.pruning import Pruning
from sinkquant.artifacts.sinkmap import SinkMap
from sinkquant.methods import AnyMethod, need_hessian, need_unquantized_inputs
from sinkquant.schemes import PLAIN, WeightFormat, backend_of, input_format, stored_form
from sinkquant.schemes.inputs import known_inputs
from sinkquant.schemes.registry import known_storage
from sinkquant.schemes.weight_format import Kind

Statistics = Literal["all", "boost", "attention", "cap", "exclude"]


class ModuleDecision(Strict):
    """What happens to one linear.

    `bits` is 2..8, or 16 for a module that is left alone (`method` "none"). `group_size` is in input columns, -1 for
    one scale per output channel. `keep` says how its sink-related channels are kept: "module" for the whole linear
    at higher precision, "scale" for columns that are scaled up and their input down, "split" for `columns` and
    `scalars` in 16 bits beside the codes, null where nothing is kept. `columns` are those channels, `scalars` single
    weights as (output row, input column). `kind` "float": the codes are floating-point numbers. `activations` is the
    number format that inputs are rounded to ("int6" and "int4" only where sinkquant evaluates, not by the checkpoint),
    `activation_scale` whether every token has a scale of its own, or every group of its inputs, or all share a stored
    one; null with 16 bits. `prune`
    says which of its weights become zero, null for none: its bytes stay the same, since zeros are stored like any other
    weight. `storage` says which tensors it becomes (`sinkquant.schemes`).
    """

    bits: Literal[2, 3, 4, 5, 6, 7, 8, 16]
    group_size: int | None
    method: AnyMethod
    keep: Literal["module", "scale", "split"] | None = None
    columns: list[int] = Field(default_factory=list)
    scalars: list[tuple[int, int]] = Field(default_factory=list)
    kind: Kind = "int"
    activations: Annotated[str, AfterValidator(known_inputs)] = "16-bit"
    activation_scale: Literal["token", "tensor", "group"] | None = None
    storage: Annotated[str, AfterValidator(known_storage)] = PLAIN
    bytes: int
    reason: str
    prune: Pruning | None = None

    @property
    def form(self) -> WeightFormat:
        """How the weights are stored."""
        return stored_form(self.bits, self.group_size, self.kind, self.activations, self.activation_scale, self.storage,
                           len(self.columns) if self.keep == "split" else 0, len(self.scalars))

    def shares_format(self, other: ModuleDecision) -> bool:
        """Whether an engine can fuse the two: the same codes and inputs, and the same columns beside the codes."""
        same = (self.form, self.inputs) == (other.form, other.inputs)
        return same and (self.keep != "split" or self.columns == other.columns)

    @property
    def inputs(self) -> tuple[str, str | None]:
        """How its inputs are rounded: the format, and what a scale is of."""
        return self.activations, self.activation_scale

    @property
    def rounded(self) -> bool:
        """Whether its inputs are rounded at all: not where the weights stay in 16 bits."""
        return self.bits < 16 and self.activations != "16-bit"

    @property
    def ranged(self) -> bool:
        """Whether a scale of its inputs is stored, which calibration finds."""
        return self.rounded and input_format(self.activations).stored(self.activation_scale)

    @property
    def simulated(self) -> bool:
        """Whether its inputs are rounded by sinkquant alone, since no checkpoint can ask for it."""
        return self.rounded and not input_format(self.activations).deployed

    def inputs_in_words(self) -> str:
        """As a table has it: "int8 per token", say."""
        if self.activation_scale is None:
            return self.activations
        return f"{self.activations} per {self.activation_scale}{', simulated' if self.simulated else ''}"


class Transform(Strict):
    """A change of the weights before they are quantized after which the model computes the same.

    "rotate": by a Hadamard matrix, `scope` "values" (values and output of every head) or "full" (the residual stream
    as well). "smoothquant" (`strength`: how much of the inputs' ranges goes into the weights), "searched" (the same,
    the strength found for every place), "awq" and "scale" (sink columns only) divide channels by a factor and multiply
    the weights that read them by it; `values`: also those between attention's values and its output.
    """

    name: Literal["rotate", "smoothquant", "searched", "awq", "scale"]
    scope: Literal["values", "full"] | None = None
    strength: float | None = None
    values: bool = True


class WeighedSink(Strict):
    """Which positions of a row hold a sink: a fixed position, a token id, or a token id at that position only; and
    what such a token weighs in the statistics (1: as any other)."""

    token_id: int | None
    position: int | None
    weight: float = 1.0


class Calibration(Strict):
    """The rows that the quantizer runs on, and what sink tokens weigh in its statistics.

    `text` is null for the packaged text. `statistics` is the policy that says what a token weighs; without `sinks`
    every token weighs the same, but under "attention". `scale_search`: scales are searched, not taken from the range;
    `descent`: rounds of coordinate descent after GPTQ or SparseGPT; `tune`: iterations of block-wise tuning after all;
    `distill`: iterations of tuning the scales of the whole model after that, with `distill_codes` its codes as well
    (which plans that do not say so did).
    `ranges`: which tokens static ranges of activations are taken from: all, or all but those of the exact prefix.
    `min_expert_tokens`: an expert that fewer tokens went to has the Hessians of all tokens of its layer.
    """

    text: str | list[str] | None
    rows: int = Field(ge=1)
    length: int = Field(ge=2)
    bos: Literal["auto", "always", "never"]
    batch_size: int = Field(ge=1)
    sinks: list[WeighedSink]
    damping: float = Field(gt=0, lt=1)
    act_order: bool
    statistics: Statistics = "boost"
    ranges: Literal["all", "exclude"] = "all"
    scale_search: bool = True
    descent: int = Field(default=3, ge=0)
    tune: int = Field(default=0, ge=0)
    distill: int = Field(default=0, ge=0)
    distill_codes: bool = True
    min_expert_tokens: int = Field(default=256, ge=0)


class PredictedLoss(Strict):
    """What modules that share a format are predicted to lose together, nats per token, and through the sinks alone."""

    modules: list[str]
    total: float
    sinks: float


class Plan(Artifact):
    """Bits per module with reasons, exact bytes, and what loads the result.

    `bits_per_weight` averages over the linears of the blocks, scales and modules left in 16 bits counted.
    `weight_bytes` is the size of the files with the checkpoint's weights to the byte, their headers included.
    `transforms` are carried out in their order, before anything is quantized.
    `silenced_heads` are query heads that nothing reads any more; their weights stay where they are. `blocks` says which
    blocks of the whole model were dropped before, null for none; names of modules are those of the shorter model.
    `ends`: how the token embedding and the output head are stored, by module name; those that are missing stay as they
    are. `kv_scheme`: what other engines hold the KV cache in, null for 16 bits. `losses` are the parts of the predicted
    loss, empty where nothing was known of it.
    """

    schema_: Literal["sinkquant/plan@1"] = Field(default="sinkquant/plan@1", alias="schema")
    name: str
    bits_per_weight: float
    bits_per_parameter: float
    weight_bytes: int
    unquantized_bytes: int
    modules: dict[str, ModuleDecision]
    transforms: list[Transform] = Field(default_factory=list)
    silenced_heads: list[SilencedHead] = Field(default_factory=list)
    blocks: BlockPlan | None = None
    ends: dict[str, EndDecision] = Field(default_factory=dict)
    kv_cache: KVCachePlan | None = None
    kv_scheme: KVScheme | None = None
    calibration: Calibration
    seed: int
    predicted: dict[str, float]
    losses: list[PredictedLoss] = Field(default_factory=list)
    loads_in: list[str]
    notes: list[str] = Field(default_factory=list)
    recipe: dict[str, Any] = Field(default_factory=dict)
    _sink_map: SinkMap | None = PrivateAttr(default=None)

    @property
    def formats(self) -> dict[str, WeightFormat]:
        """Module name -> format of every linear that is packed."""
        return {name: form for name, decision in self.modules.items() if (form := decision.form).packed}

    @property
    def stored(self) -> dict[str, WeightFormat]:
        """The same with the token embedding and the output head."""
        return self.formats | {name: end.form for name, end in self.ends.items()}

    def inputs_in_words(self) -> str:
        """What the inputs of its quantized linears are rounded to, the most common format first."""
        counts = Counter(d.inputs_in_words() for d in self.modules.values() if d.form.packed)
        return ", ".join(f"{words} ({count})" if len(counts) > 1 else words
                         for words, count in counts.most_common()) or "16-bit"

    @property
    def backend(self) -> str:
        """The backend whose checkpoint it makes."""
        return backend_of(self.formats.values())

    @property
    def rotation(self) -> Transform | None:
        """The rotation among the transforms."""
        return next((transform for transform in self.transforms if transform.name == "rotate"), None)

    @property
    def changed(self) -> list[str]:
        """Linears that stay in 16 bits with other values than they had."""
        silenced = {head.module for head in self.silenced_heads}
        return [name for name, decision in self.modules.items()
                if decision.bits == 16 and (decision.prune is not None or name in silenced)]

    @property
    def needs_rows(self) -> bool:
        """Whether carrying it out takes calibration rows."""
        decisions = self.modules.values()
        methods = {decision.method for decision in decisions if decision.bits < 16}
        if any(d.ranged for d in decisions) or any(
                d.prune is not None and d.prune.needs_rows for d in decisions):
            return True
        tuned = self.calibration.tune > 0 or self.calibration.distill > 0
        return self.rescales or need_hessian(methods) or (tuned and bool(methods))

    @property
    def rescales(self) -> bool:
        """Whether it changes the scales of channels block by block, beside a rotation of the whole model."""
        return any(transform.name != "rotate" for transform in self.transforms)

    @property
    def follows_unquantized(self) -> bool:
        """Whether carrying it out takes what every block gives in the unquantized model."""
        return self.calibration.tune > 0 or need_unquantized_inputs(one.method for one in self.modules.values())

    @property
    def sink_map(self) -> SinkMap | None:
        """The sink map that this plan was made from, where it was made in this process; it is not written."""
        return self._sink_map

    def made_from(self, sink_map: SinkMap | None) -> Plan:
        """Remember the sink map, so that a checkpoint can carry it. Returns the plan itself."""
        self._sink_map = sink_map
        return self
