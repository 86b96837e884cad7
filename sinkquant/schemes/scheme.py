"""The contract of a number format, as far as it is known before any weight is read. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sinkquant.schemes.inputs import NO_ROUNDING, input_format
from sinkquant.schemes.loads import Loads
from sinkquant.schemes.tensors import (
    Tensor,
    checkpoint_files,
    expert_scale_dtype,
    file_header,
    scale_dtype,
    total_bytes,
)
from sinkquant.schemes.weight_format import Kind, WeightFormat


@dataclass(frozen=True)
class Scheme:
    """One number format: what a recipe may ask of it, the tensors that a linear becomes, and who loads them.

    `storage` and `kind` are its name in a plan; `backend` says whose files hold it, `format` and
    `double_quantization` what in a recipe's `weights` asks for it there; no recipe asks for one without a `format`.

    Attributes:
        words: what its weights are called in a sentence. symmetric: codes have no zero point.
        bits: what a weight may take. mixed: whether linears of one checkpoint may differ in bits and groups.
        group_size: its own, or null where a recipe chooses. one_group_size: all linears have the same then.
        methods: of choosing the codes, null for any. rounds_itself: the library does, and none of our methods.
        integers: codes are integers times one scale per group, so that they can be tuned and their loss predicted.
        grid: codes are a fixed set of numbers times one scale per group, so that methods which let columns make up for
            one another's errors can choose them. Integers are, too.
        steps: codes of such a set lie in one order for all groups, so that they can be tuned as integers are.
        fused_scale: beside the groups' scales there is one of the whole tensor, which linears that engines fuse share.
        own_module: the library's module does more than a dense weight can show: it rounds inputs.
        beside: columns and single weights may stand beside the codes.
        zero_from: fewest bits that have a code for zero, which pruning needs.
        inputs: what the inputs of its linears may be rounded to. input_scales: what those may have scales of, null for
            any that they have.
        ends: what its files hold the token embedding and the output head in; "16-bit": as they are.
        dtypes: of the models whose checkpoints plain transformers runs with it, null for any.
        layouts: compressed-tensors' names of its tensors, where its files hold them.
        packages: distribution -> module, beyond those that every checkpoint needs.
        loads: its rows of the engine table. notes: what a plan has to say of it.
    """

    storage: str
    backend: str
    words: str
    kind: Kind = "int"
    format: str = "int"
    double_quantization: bool = False
    symmetric: bool = True
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    mixed: bool = False
    group_size: int | None = None
    one_group_size: bool = False
    methods: tuple[str, ...] | None = None
    rounds_itself: bool = False
    integers: bool = False
    grid: bool = False
    steps: bool = False
    fused_scale: bool = False
    own_module: bool = False
    beside: bool = False
    zero_from: int = 0
    inputs: tuple[str, ...] = (NO_ROUNDING,)
    input_scales: tuple[str, ...] | None = None
    ends: str = NO_ROUNDING
    dtypes: tuple[str, ...] | None = None
    layouts: tuple[str, ...] = ()
    packages: tuple[tuple[str, str], ...] = ()
    loads: tuple[Loads, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def foreign(self) -> bool:
        """Whether another library's files hold it, and not those of compressed-tensors."""
        return self.backend != DEFAULT_BACKEND

    @property
    def any_group(self) -> bool:
        """Whether every linear may have groups of a size of its own."""
        return self.group_size is None and not self.one_group_size

    @property
    def tunable(self) -> bool:
        """Whether gradients can tune its codes and scales."""
        return self.integers or self.steps

    @property
    def solvable(self) -> bool:
        """Whether a budget can be solved for: our methods choose its codes, and linears of one checkpoint differ."""
        return self.mixed and len(self.bits) > 1 and (self.integers or self.grid)

    @property
    def tried_as(self) -> str:
        """The storage that says of its weights what their formats lose: its own, unless another has the same."""
        return self.storage

    def tensors(self, rows: int, columns: int, form: WeightFormat, dtype: str, expert: bool) -> dict[str, Tensor]:
        """The tensors that a linear becomes: what follows the module's name -> (dtype, shape).

        Args:
            dtype: of the model. expert: the linear is a projection of one expert.
        """
        raise NotImplementedError

    def scales_of_inputs(self, inputs: str) -> tuple[str, ...]:
        """What inputs of a format may have scales of beside its weights, the usual one first."""
        held = input_format(inputs).scales
        return held if self.input_scales is None else tuple(one for one in held if one in self.input_scales)

    def layout(self, form: WeightFormat) -> str:
        """The one of `layouts` that a linear is in."""
        return self.layouts[0]

    def arguments(self, form: WeightFormat) -> dict[str, object]:
        """compressed-tensors' `QuantizationArgs` of the weights, where its files hold them."""
        channel = form.group_size == -1
        return {"num_bits": form.bits, "type": form.kind, "symmetric": True, "dynamic": False,
                "strategy": "channel" if channel else "group", "group_size": None if channel else form.group_size}

    def scales(self, dtype: str, expert: bool) -> str:
        """The dtype of the scales, in a model of `dtype`."""
        return expert_scale_dtype(dtype) if expert else scale_dtype(dtype)

    def group_for(self, bits: int) -> int | None:
        """The group size that a recipe has to ask for; null where it may choose."""
        return self.group_size

    def fitted(self, bits: int, group_size: int | None, columns: int) -> int | None:
        """The group size that a weight of so many columns gets."""
        return group_size

    def for_engine(self, engine: str, form: WeightFormat) -> WeightFormat:
        """How a linear is stored for an engine that a recipe names: as it is, unless that would compute another thing
        from it."""
        return form

    def obstacle(self, rows: int, columns: int, own_parameter: bool) -> str:
        """Why a weight stays in 16 bits, or an empty string.

        Args:
            own_parameter: the weight is a parameter by itself, and no part of fused experts.
        """
        return f"{self.backend} packs nn.Linear only" if self.foreign and not own_parameter else ""

    def refuses(self, name: str, bits: int, group_size: int | None, method: str) -> str:
        """What a recipe asks of a linear and the format does not have, as a sentence; or an empty one."""
        return ""

    def check_model(self, architecture: str, folder: str | None, columns: Mapping[str, int]) -> None:
        """Refuse a model that its files cannot hold: any will do.

        Args:
            architecture: transformers' class. folder: of the model, None for one that was made in memory. columns:
                linear that is to be packed -> its input columns.
        """

    def file_size(self, tensors: Mapping[str, Tensor], carried: Mapping[str, Tensor], architecture: str,
                  folder: str | None) -> int:
        """Bytes of the files of a checkpoint with these tensors, to the byte: safetensors with their headers.

        Args:
            tensors: name -> (dtype, shape), linears packed. carried: those of them that no engine needs.
            architecture, folder: as in `check_model`.
        """
        files = checkpoint_files(dict(tensors))
        return sum(len(file_header(file)) + total_bytes(file.values()) for file in files)

    def more_precise(self, form: WeightFormat, columns: int) -> WeightFormat | None:
        """The next format with more bits that may stand in the same checkpoint, or None."""
        higher = [bits for bits in self.bits if bits > form.bits] if self.mixed else []
        if not higher:
            return None
        return replace(form, bits=higher[0], group_size=self.fitted(higher[0], form.group_size, columns))


DEFAULT_BACKEND = "compressed-tensors"
OWN = "sinkquant"
"""`quant_method` of a checkpoint in sinkquant's own format: compressed-tensors' tensors with others beside them."""
COMPRESSED = (DEFAULT_BACKEND, OWN)
"""`quant_method` of the checkpoints whose tensors are compressed-tensors'."""
