"""Recipe: what the user asks for. Strict, typed, YAML <-> Python without loss."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sinkquant.artifacts.pruning import pattern_group
from sinkquant.errors import RequestError
from sinkquant.resources import recipe_folder

DEFAULT_RECIPE = "w4-kv2-sink"
"""What `run` and `plan` do where no recipe is named."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def _stored_bits(bits: int) -> int:
    if bits > 8 and bits != 16:
        raise ValueError("weights take 2 to 8 bits, or 16 to be left alone")
    return bits


def _fits_a_group(size: int) -> int:
    if size == 0:
        raise ValueError("a group holds at least one column; -1 makes one group of the whole row")
    return size


def _is_a_pattern(pattern: str) -> str:
    pattern_group(pattern)
    return pattern


def _not_base_sixty(pattern: Any) -> Any:
    """YAML 1.1 reads 2:4 without quotes as the number 2 * 60 + 4."""
    return f"{pattern // 60}:{pattern % 60}" if type(pattern) is int else pattern


Bits = Annotated[int, AfterValidator(_stored_bits)]
Statistics = Literal["all", "boost", "attention", "cap", "exclude"]
GroupSize = Annotated[int, Field(ge=-1), AfterValidator(_fits_a_group)]


class Compute(Section):
    """Where and in which precision statistics, Hessians and evaluation are computed.

    `memory_limit`: gigabytes (10^9 bytes) of memory that a run may take; null: what is free on the machine.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    memory_limit: float | None = Field(default=None, gt=0)


class CalibrationText(Section):
    """The rows that the quantizer sees: `rows` x `length` tokens of `text` (null: the packaged prose).

    `bos` "auto" puts `<bos>` in front exactly once where the tokenizer adds it at all. An expert that fewer than
    `min_expert_tokens` tokens go to is named, and quantized as if all tokens of its layer went to it.
    """

    text: str | None = None
    rows: int = Field(default=64, ge=1)
    length: int = Field(default=512, ge=2)
    bos: Literal["auto", "always", "never"] = "auto"
    batch_size: int = Field(default=8, ge=1)
    min_expert_tokens: int = Field(default=256, ge=0)


class Detection(Section):
    """Thresholds of detection, each set against models and texts that hold no sink.

    `rows` x `length` tokens for the published sink rate, `long_rows` x `long_length` for sinks further back.
    """

    rows: int = Field(default=100, ge=1)
    length: int = Field(default=64, ge=32)
    long_rows: int = Field(default=8, ge=0)
    long_length: int = Field(default=512, ge=64)
    batch_size: int = Field(default=20, ge=1)
    threshold: float = Field(default=0.3, gt=0, lt=1)
    occurrence_share: float = Field(default=0.5, gt=0, le=1)
    min_occurrences: int = Field(default=4, ge=1)
    min_head_share: float = Field(default=0.05, ge=0, le=1)
    massive_ratio: float = Field(default=50.0, gt=1)
    massive_token_share: float = Field(default=0.1, gt=0, le=1)
    outlier_ratio: float = Field(default=64.0, gt=1)
    column_ratio: float = Field(default=2.0, gt=1)
    no_op_sink_score: float = Field(default=0.8, gt=0, le=1)
    no_op_output_norm: float = Field(default=0.5, gt=0)
    super_weights: bool = True
    super_weight_loss: float = Field(default=0.02, gt=0)


class ModuleOverride(Section):
    """A format of its own for the modules that match `pattern` (a glob, or a regular expression after "re:")."""

    pattern: str
    bits: Bits = Field(ge=2, le=16)
    group_size: GroupSize | None = None
    method: Literal["rtn", "gptq", "gptaq"] | None = None


class Weights(Section):
    """How weights are quantized where nothing is protected. `group_size` -1 is one scale per output channel.

    `method` "gptaq" is GPTQ that also makes up for what earlier blocks lost. `scale_search`: scales with the least
    loss instead of the whole range; `descent`: rounds of coordinate descent after GPTQ (codes, scales) and SparseGPT;
    `tune`: iterations of sign-gradient tuning of every block's codes and scales at the end; slow, not always better.
    `distill`: after all blocks, iterations of tuning the codes and scales of the whole model, which is in memory then,
    towards what the unquantized one predicts.
    Before all that, changes after which the model computes the same: `rotate` by a Hadamard matrix, "values" of every
    head or "full", the residual stream as well; `smooth` channels, by "smoothquant" with `smooth_strength` or "awq".
    `format` other than "int" and `double_quantization` (scales quantized once more) are for backends that hold them:
    bitsandbytes nf4 and fp4, quanto float8.
    """

    method: Literal["rtn", "gptq", "gptaq"] = "gptq"
    format: Literal["int", "nf4", "fp4", "float8"] = "int"
    double_quantization: bool = False
    bits: int = Field(default=4, ge=2, le=8)
    group_size: GroupSize = 64
    symmetric: Literal[True] = True
    rotate: Literal["none", "values", "full"] = "none"
    smooth: Literal["none", "smoothquant", "awq"] = "none"
    smooth_strength: float = Field(default=0.5, ge=0, le=1)
    damping: float = Field(default=0.01, gt=0, lt=1)
    act_order: bool = True
    scale_search: bool = True
    descent: int = Field(default=3, ge=0)
    tune: int = Field(default=0, ge=0)
    distill: int = Field(default=0, ge=0)
    ignore: list[str] = Field(default_factory=list)
    overrides: list[ModuleOverride] = Field(default_factory=list)


class Prune(Section):
    """Weights that become zero before the rest is quantized, with statistics that know the sinks
    (`protect.statistics`).

    `method`: "magnitude" needs no text; "wanda" weighs by the inputs; "sparsegpt" also lets the other weights make up
    for it. `pattern` "unstructured", or "n:m": n of every m consecutive weights of a row stay. `sparsity` is the share
    that goes; null: a half, or what the pattern says. `ignore`: patterns of modules that are not pruned.
    `heads` "no-op" takes out heads that do nothing on any text given, as long as the loss of a token changes by no more
    than `head_loss` nats on average, each head alone and all together.
    """

    method: Literal["none", "magnitude", "wanda", "sparsegpt"] = "none"
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    pattern: Annotated[str, BeforeValidator(_not_base_sixty), AfterValidator(_is_a_pattern)] = "unstructured"
    ignore: list[str] = Field(default_factory=list)
    heads: Literal["none", "no-op"] = "none"
    head_loss: float = Field(default=0.01, gt=0)

    @property
    def asked(self) -> bool:
        """Whether anything is to be taken out at all."""
        return self.method != "none" or self.heads != "none"


class Activations(Section):
    """What the inputs of quantized linears are rounded to while a model runs; "16-bit": not at all.

    "int8" and "fp8" are written into the checkpoint, so that engines do it; "fp8" takes 8-bit weights with one scale
    per channel, which become floating-point numbers too. "int6" and "int4" are simulated when sinkquant evaluates.
    `scale` "token": every token's inputs get a scale as they come; "tensor": one scale for all, from calibration.
    `sinks` says what becomes of linears whose static range the sinks set (their largest input is over `range_ratio`
    times that of all other tokens): "dynamic": one scale per token in these; "16-bit": their inputs are left alone;
    "all": nothing, sinks count as any other token; "exclude": the tokens of the exact prefix do not count, since they
    never come through the linears; it needs a `kv_cache.prefix`.
    """

    format: Literal["16-bit", "int8", "fp8", "int6", "int4"] = "16-bit"
    scale: Literal["token", "tensor"] = "token"
    sinks: Literal["dynamic", "16-bit", "all", "exclude"] = "dynamic"
    range_ratio: float = Field(default=2.0, gt=1)


class Protect(Section):
    """What is kept exact for the sinks.

    `tokens`: sink tokens count in the statistics of calibration as `statistics` says, which costs no bytes. "boost":
    as often as they are read, up to `sink_weight` (1: as any other); "cap": no more than the mean token; "attention":
    every token by the attention that it receives; "exclude": not at all; "all": as any other; null: what measured
    best, which is "attention" where Wanda prunes and no GPTQ follows, and "boost" elsewhere.
    `channels` "module": linears whose input ranges the sinks set get `bits`, at most `max_share` of all weights;
    "scale": their sink columns are scaled up, and the norm or the linear before them down, at no cost in bytes;
    "split": of such linears the columns that the sinks set and the super weights stay in 16 bits beside the codes, at
    most `max_share` of all weights; such a checkpoint loads in sinkquant only.
    `modules`: patterns protected in any case. The defaults are what measured best beside controls of the same size.
    """

    tokens: bool = True
    statistics: Statistics | None = None
    sink_weight: float = Field(default=16.0, ge=1)
    channels: Literal["none", "module", "scale", "split"] = "none"
    bits: Bits = Field(default=8, ge=3, le=16)
    max_share: float = Field(default=0.1, ge=0, le=1)
    modules: list[str] = Field(default_factory=list)


class KVOverride(Section):
    """Bits of their own for the KV heads `heads` (null: all) of the layers `layers`; 16 leaves them as they are."""

    layers: list[int] = Field(min_length=1)
    heads: list[int] | None = None
    key_bits: Literal[2, 3, 4, 8, 16] | None = None
    value_bits: Literal[2, 3, 4, 8, 16] | None = None


class KVCache(Section):
    """How the KV cache is packed, and which tokens of a prompt stay exact in it.

    Groups of `group_size`: tokens for keys, channels of a head for values; null: the smallest of 32, 64 and 128 that
    fits. The last `window` tokens are never packed.
    `exact`: the sinks that detection found; "first-n": the first `first_n` tokens; "massive": those that carry a
    massive activation in the prompt at hand; "none". At most `max_exact` per row. `prefix` "bos": keys and values
    of `<bos>` come from the unquantized model; "found": those of the outlier tokens that detection found and `<bos>`,
    which are put in front of every row. `evict`: at most so many packed tokens are kept, older ones are dropped;
    the exact ones and the window stay, so that an endless stream runs in fixed memory. `sliding_sinks`: layers with a
    sliding window see the exact tokens beyond it too, which changes what the model computes. `length` is what bytes are
    planned for.
    """

    key_bits: Literal[2, 3, 4, 8, 16] = 2
    value_bits: Literal[2, 3, 4, 8, 16] = 2
    group_size: Literal[32, 64, 128] | None = None
    window: int = Field(default=128, ge=0)
    evict: int | None = Field(default=None, ge=0)
    sliding_sinks: bool = False
    symmetric: bool = False
    rotate: bool = False
    exact: Literal["none", "first-n", "detected", "massive"] = "detected"
    first_n: int = Field(default=4, ge=1)
    max_exact: int = Field(default=16, ge=0)
    prefix: Literal["none", "bos", "found"] = "none"
    length: int = Field(default=4096, ge=1)
    overrides: list[KVOverride] = Field(default_factory=list)


class Budget(Section):
    """What a plan may cost; at most one of `bits`, `bytes` and `loss`; all null: no budget.

    `bits`: average bits per weight of the blocks' linears, scales counted. `bytes`: of the whole checkpoint, and with
    `context` also of the KV cache of `batch` rows of so many tokens. `loss`: a ceiling of the predicted KL divergence
    from the unquantized model, nats per token, met in the fewest bytes. `engine`: only formats that it loads.
    `solver` "even" raises `weights.bits` evenly until the bytes are spent, the linears that sinks dominate first;
    "sensitivity" solves for the least predicted loss (see `sensitivity`). Null: "even" for `bits` or `bytes` alone,
    "sensitivity" for `loss`, or where `context` or an `engine` is named.
    """

    bits: float | None = Field(default=None, gt=2, le=16)
    bytes: int | None = Field(default=None, ge=1)
    loss: float | None = Field(default=None, gt=0)
    context: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)
    engine: Literal["any", "vllm", "transformers", "sinkquant"] = "any"
    solver: Literal["even", "sensitivity"] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if sum(limit is not None for limit in (self.bits, self.bytes, self.loss)) > 1:
            raise ValueError("name one of bits, bytes and loss")
        if self.context is not None and self.bytes is None:
            raise ValueError("context is for a budget of bytes; name budget.bytes")
        if self.solver == "even" and (self.loss is not None or self.context is not None or self.engine != "any"):
            raise ValueError("the solver 'even' knows bits and bytes of weights only; use 'sensitivity'")
        if self.solver == "sensitivity" and not self.limited:
            raise ValueError("the solver 'sensitivity' needs one of bits, bytes and loss")
        return self

    @property
    def limited(self) -> bool:
        """Whether there is a budget at all."""
        return any(limit is not None for limit in (self.bits, self.bytes, self.loss))

    @property
    def solved(self) -> bool:
        """Whether the plan is solved for from sensitivities."""
        asked = self.loss is not None or self.context is not None or self.engine != "any"
        return self.limited and (self.solver == "sensitivity" or (self.solver is None and asked))


class SensitivitySettings(Section):
    """How it is found out what a format costs in a linear: for every number of `bits` and every one of `group_sizes`
    (empty: `weights.group_size`), on `rows` x `length` tokens of the calibration text, by one walk back.

    `measure_rows`: measure every candidate too, by forward passes over so many rows of `measure_length` tokens; 0:
    trust the walk. `score` "diagonal" lets the solver see what tools see that sum over all tokens and channels at once.
    `kv_bits`: numbers of bits that the keys and the values of every KV head are tried in, on `kv_rows` x `kv_length`
    tokens; empty: the KV cache stays as the section `kv_cache` says. A budget of bytes with a `context` then chooses.
    """

    rows: int = Field(default=64, ge=1)
    length: int = Field(default=128, ge=2)
    batch_size: int = Field(default=8, ge=1)
    bits: list[Annotated[int, Field(ge=2, le=8)]] = Field(default=[2, 3, 4, 5, 6, 7, 8], min_length=1)
    group_sizes: list[GroupSize] = Field(default_factory=list)
    measure_rows: int = Field(default=0, ge=0)
    measure_length: int = Field(default=64, ge=2)
    score: Literal["second-order", "diagonal"] = "second-order"
    kv_bits: list[Literal[2, 3, 4, 8]] = Field(default_factory=list)
    kv_rows: int = Field(default=8, ge=1)
    kv_length: int = Field(default=512, ge=16)


class Evaluation(Section):
    """How the result is measured. `tasks` are names of packaged lm-eval tasks or of any task lm-eval can reach;
    `fidelity` compares the sinks of every quantized row with the unquantized model's. With `skip` a run ends with its
    checkpoint, for models that do not fit into memory as a whole."""

    skip: bool = False
    text: str | None = None
    tasks: list[str] = Field(default_factory=lambda: ["sink_perplexity", "sink_cloze", "sink_recall"])
    limit: int | None = Field(default=None, ge=1)
    control: bool = True
    fidelity: bool = True
    divergence_rows: int = Field(default=64, ge=2)
    divergence_length: int = Field(default=512, ge=16)
    bootstrap: int = Field(default=2000, ge=100)
    batch_size: int = Field(default=8, ge=1)


class Gate(Section):
    """Bounds on the sink-aware row; breaking one ends the run with exit code 3. Null: not checked.

    `sinks`: the worst verdict of sink fidelity that passes; "changed" refuses only sinks that were destroyed.
    """

    max_divergence: float | None = Field(default=None, gt=0)
    min_recovery: float | None = Field(default=None, gt=0)
    max_sink_rate_change: float | None = Field(default=None, gt=0)
    max_head_divergence: float | None = Field(default=None, gt=0)
    min_massive_overlap: float | None = Field(default=None, gt=0, le=1)
    sinks: Literal["kept", "changed"] | None = None


class Recipe(Section):
    """The whole request. `Recipe()` is the default recipe; `Recipe.load` reads a file or a packaged name.

    `backend`: whose files the checkpoint is made of. What a backend cannot hold is refused before anything is computed.
    """

    name: str = "custom"
    description: str = ""
    seed: int = Field(default=0, ge=0)
    backend: Literal["compressed-tensors", "bitsandbytes", "quanto", "gptq"] = "compressed-tensors"
    compute: Compute = Field(default_factory=Compute)
    calibration: CalibrationText = Field(default_factory=CalibrationText)
    detect: Detection = Field(default_factory=Detection)
    prune: Prune = Field(default_factory=Prune)
    weights: Weights = Field(default_factory=Weights)
    activations: Activations = Field(default_factory=Activations)
    protect: Protect = Field(default_factory=Protect)
    budget: Budget = Field(default_factory=Budget)
    sensitivity: SensitivitySettings = Field(default_factory=SensitivitySettings)
    kv_cache: KVCache | None = None
    evaluate: Evaluation = Field(default_factory=Evaluation)
    gate: Gate = Field(default_factory=Gate)

    @property
    def statistics(self) -> Statistics:
        """What tokens weigh: `protect.statistics`, or the policy that measured best; "all" where no token is protected.

        Wanda looks at single columns, in which RSQ's weighting (arXiv 2503.01820) of every token leaves less than a
        boosted sink (docs/pruning.md). Methods that move an error between columns do better with the sink alone, and
        GPTQ after Wanda moves the errors of the zeros too.
        """
        if not self.protect.tokens:
            return "all"
        methods = {self.weights.method, *(override.method or "rtn" for override in self.weights.overrides)}
        alone = methods == {"rtn"} or "*" in self.weights.ignore
        return self.protect.statistics or ("attention" if self.prune.method == "wanda" and alone else "boost")

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Self:
        """Read a YAML file, or the packaged recipe of that name (with or without ".yaml").

        Raises:
            RequestError: no such recipe, not YAML, an unknown key or a value out of range.
        """
        path = Path(source)
        if not path.is_file():
            packaged = recipe_folder() / f"{Path(source).name.removesuffix('.yaml')}.yaml"
            if not packaged.is_file() or path.parent != Path("."):
                names = recipe_names()
                raise RequestError(f"there is no recipe {str(source)!r}{near_miss(path.stem, names)}; "
                                   f"the packaged ones are {', '.join(names)}.")
            path = packaged
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"cannot read {path}: {error.strerror or error}.") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RequestError(f"{path} is not YAML: {' '.join(str(error).split()).rstrip('.')}.") from error
        return cls.parse({} if data is None else data, str(path))

    @classmethod
    def parse(cls, data: Any, where: str = "the recipe") -> Self:
        """Validate a decoded recipe; errors name the key, and the near miss of an unknown one."""
        if not isinstance(data, dict):
            raise RequestError(f"{where} must be a mapping of keys to values.")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RequestError(f"{where}: {_explain(cls, error)}.") from error

    def to_yaml(self) -> str:
        """The whole recipe as YAML, defaults written out; `Recipe.parse(yaml.safe_load(text))` gives it back."""
        # Not allow_unicode: PyYAML then writes a next-line character as one that it reads back as a space.
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def replace(self, assignments: Iterable[str]) -> Self:
        """A copy with `key.path=value` assignments applied; values are read as YAML.

        Raises:
            RequestError: an assignment without "=", an unknown key, a value out of range.
        """
        data = self.model_dump(mode="json")
        for assignment in assignments:
            key, equals, value = assignment.partition("=")
            if not equals:
                raise RequestError(f"--set {assignment!r} has no '='; write --set weights.bits=3.")
            try:
                parsed = yaml.safe_load(value)
            except (yaml.YAMLError, ValueError, RecursionError) as error:
                raise RequestError(f"--set {key}: the value {value!r} is not YAML.") from error
            *sections, leaf = key.strip().split(".")
            target = data
            for depth, part in enumerate(sections):
                inner = target.get(part)
                if part == "kv_cache" and inner is None:
                    inner = target[part] = {}
                if not isinstance(inner, dict):
                    raise RequestError(f"--set: {'.'.join(sections[: depth + 1])!r} is not a section of the recipe"
                                       f"{near_miss(part, [k for k, v in target.items() if isinstance(v, dict)])}.")
                target = inner
            target[leaf] = parsed
        return type(self).parse(data, "--set")


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def near_miss(name: str, known: Iterable[str]) -> str:
    """", did you mean 'x'" where a known name is close, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}" if close else ""


def _explain(recipe: type[BaseModel], error: ValidationError) -> str:
    """The first problem of a validation error as one sentence; an unknown key explains a missing one."""
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    place = list(first["loc"])
    name = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        section: Any = recipe
        for part in place[:-1]:
            if isinstance(part, str):
                section = _section(section.model_fields[part].annotation)
        return f"unknown key {name!r}{near_miss(str(place[-1]), section.model_fields)}"
    return f"{name}: {first['msg'].removeprefix('Value error, ')} (got {first['input']!r})"


def _section(annotation: Any) -> Any:
    """The section inside an annotation: `Section`, `Section | None` or `list[Section]`."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next(found for part in get_args(annotation) if (found := _section(part)) is not None) if get_args(
        annotation) else None
