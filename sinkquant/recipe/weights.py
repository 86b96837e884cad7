"""The sections about weights and the inputs of linears: formats, methods, pruning, protection."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sinkquant.artifacts.blocks import BlockScore
from sinkquant.artifacts.pruning import pattern_group
from sinkquant.methods import MethodName
from sinkquant.recipe.section import Bits, GroupSize, Section, Statistics
from sinkquant.schemes.inputs import NO_ROUNDING, input_format, known_inputs
from sinkquant.schemes.registry import known_ends, known_format


def _is_a_pattern(pattern: str) -> str:
    pattern_group(pattern)
    return pattern


def _not_base_sixty(pattern: Any) -> Any:
    """YAML 1.1 reads 2:4 without quotes as the number 2 * 60 + 4."""
    return f"{pattern // 60}:{pattern % 60}" if type(pattern) is int else pattern


class ModuleOverride(Section):
    """A format of its own for the modules that match `pattern` (a glob, or a regular expression after "re:")."""

    pattern: str
    bits: Bits = Field(ge=2, le=16)
    group_size: GroupSize | None = None
    method: MethodName | None = None


class Weights(Section):
    """How weights are quantized where nothing is protected. `group_size` -1 is one scale per output channel.

    `method` "gptaq" is GPTQ that also makes up for what earlier blocks lost. `scale_search`: scales with the least
    loss instead of the whole range; `descent`: rounds of coordinate descent after GPTQ (codes, scales) and SparseGPT;
    `tune`: iterations of sign-gradient tuning of every block's codes and scales at the end; slow, not always better.
    `distill`: after all blocks, iterations of tuning the scales of the whole model, which is in memory then, towards
    what the unquantized one predicts; with `distill_codes` its codes as well.
    Before all that, changes after which the model computes the same: `rotate` by a Hadamard matrix, "values" of every
    head or "full", the residual stream as well; `smooth` channels, by "smoothquant" with `smooth_strength`, "searched"
    with the strength that leaves the least error at every place, or "awq".
    `format` other than "int" and `double_quantization` (scales quantized once more) are for backends that hold them:
    bitsandbytes nf4 and fp4, quanto float8, GGUF iq4_nl; and "nvfp4", "mxfp4" and "mxfp8" for compressed-tensors.
    `symmetric` false: codes have a zero point per group, in GPTQ's files and as Q4_1 and Q5_1 in a GGUF file;
    transformers loads none in compressed-tensors' files.
    `ends`: what the token embedding and the output head are held in; "16-bit" leaves them as they are, a GGUF file
    also takes "f16", "bf16" and "q8_0".
    `lm_head`, `embeddings`: bits of the output head and of the token embedding in compressed-tensors' files, 16 to
    leave them; 8 bits have one scale per token, fewer those of `group_size`. A head that is tied to the embedding
    shares its codes where both have 8 bits, and gets a weight of its own where they differ.
    """

    method: MethodName = "gptq"
    format: Annotated[str, AfterValidator(known_format)] = "int"
    double_quantization: bool = False
    ends: Annotated[str, AfterValidator(known_ends)] = "16-bit"
    lm_head: Bits = Field(default=16, ge=2, le=16)
    embeddings: Bits = Field(default=16, ge=2, le=16)
    bits: int = Field(default=4, ge=2, le=8)
    group_size: GroupSize = 64
    symmetric: bool = True
    rotate: Literal["none", "values", "full"] = "none"
    smooth: Literal["none", "smoothquant", "searched", "awq"] = "none"
    smooth_strength: float = Field(default=0.5, ge=0, le=1)
    damping: float = Field(default=0.01, gt=0, lt=1)
    act_order: bool = True
    scale_search: bool = True
    descent: int = Field(default=3, ge=0)
    tune: int = Field(default=0, ge=0)
    distill: int = Field(default=0, ge=0)
    distill_codes: bool = False
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
    `blocks`: how many whole blocks are dropped, or their share below 1; null for none. `block_score` "divergence" drops
    those whose absence is measured to cost least, one after the other; "influence" those that turn the residual stream
    least, a proxy that takes one pass. What makes massive activations (the block in which they emerge, the one in which
    they end, heads and experts that do) is only taken out with `massive`, and a block only where that is measured.
    """

    method: Literal["none", "magnitude", "wanda", "sparsegpt"] = "none"
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    pattern: Annotated[str, BeforeValidator(_not_base_sixty), AfterValidator(_is_a_pattern)] = "unstructured"
    ignore: list[str] = Field(default_factory=list)
    heads: Literal["none", "no-op"] = "none"
    head_loss: float = Field(default=0.01, gt=0)
    blocks: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    block_score: BlockScore = "divergence"
    massive: bool = False

    @model_validator(mode="after")
    def _a_method_for_weights(self) -> Self:
        for key, usual in (("sparsity", None), ("pattern", "unstructured"), ("ignore", [])):
            if self.method == "none" and getattr(self, key) != usual:
                raise ValueError(f"prune.{key} is for weights that prune.method takes out, and that is 'none'; set it "
                                 f"to 'wanda', say, or leave {key} out (prune={{}} leaves out all of prune)")
        return self

    @property
    def asked(self) -> bool:
        """Whether anything is to be taken out at all."""
        return self.zeros or self.blocks is not None

    @property
    def zeros(self) -> bool:
        """Whether weights of blocks that stay are to become zero."""
        return self.method != "none" or self.heads != "none"


class Activations(Section):
    """What the inputs of quantized linears are rounded to while a model runs; "16-bit": not at all.

    "int8" and "fp8" are written into the checkpoint, so that engines do it; "fp8" takes 8-bit weights with one scale
    per channel, which become floating-point numbers too; "nvfp4", "mxfp4" and "mxfp8" take weights of that format.
    "int6" and "int4" are simulated when sinkquant evaluates.
    `scale` "token": every token's inputs get a scale as they come; "tensor": one scale for all, from calibration;
    "group": every group of inputs gets one as they come, as "nvfp4" and "mxfp4" have it ("nvfp4" under a stored one).
    `sinks` says what becomes of linears whose static range the sinks set (their largest input is over `range_ratio`
    times that of all other tokens): "dynamic": one scale per token in these; "16-bit": their inputs are left alone;
    "all": nothing, sinks count as any other token; "exclude": the tokens of the exact prefix do not count, since they
    never come through the linears; it needs a `kv_cache.prefix`. "dynamic" and "16-bit" do the same to linears
    whose largest input is over `typical_ratio` times the root mean square of a typical token's: one stored scale would
    drown that token. At 44, int8 leaves it 1 % of rounding noise, which is what 4-bit weights in groups have.
    `bits`: average bits of inputs, every weight's counted once (so that it is the average over multiplications):
    linears get `format` or a more precise one that their weights are multiplied with, or 16 bits, where rounding was
    measured to lose most (`sensitivity`). Null: `format` everywhere.
    """

    format: Annotated[str, AfterValidator(known_inputs)] = "16-bit"
    scale: Literal["token", "tensor", "group"] = "token"
    sinks: Literal["dynamic", "16-bit", "all", "exclude"] = "dynamic"
    range_ratio: float = Field(default=2.0, gt=1)
    typical_ratio: float = Field(default=44.0, gt=1)
    bits: float | None = Field(default=None, gt=0, le=16)

    @model_validator(mode="after")
    def _something_to_choose(self) -> Self:
        if self.bits is not None and self.format == NO_ROUNDING:
            raise ValueError("activations.bits is for inputs that are rounded; name activations.format")
        if self.bits is not None and self.sinks == "16-bit":
            raise ValueError("activations.bits says where inputs stay in 16 bits, and activations.sinks '16-bit' says "
                             "it too; set sinks to 'dynamic' or 'all'")
        return self

    @property
    def ranged(self) -> bool:
        """Whether a scale of the inputs is stored, which calibration finds."""
        return input_format(self.format).stored(self.scale)


class Protect(Section):
    """What is kept exact for the sinks.

    `tokens`: sink tokens count in the statistics of calibration as `statistics` says, which costs no bytes. "boost":
    as often as they are read, up to `sink_weight` (1: as any other); "cap": no more than the mean token; "attention":
    every token by the attention that it receives; "exclude": not at all; "all": as any other; null: what measured
    best: without GPTQ "attention" where Wanda prunes and "all" behind AWQ's scales, and "boost" elsewhere.
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
