"""Integers of 2 to 8 bits by group or by channel, in compressed-tensors' `pack-quantized` and `int-quantized`; and the
columns and single weights that may stand beside them, in sinkquant's own format."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sinkquant.schemes.loads import Loads
from sinkquant.schemes.scheme import DEFAULT_BACKEND, Scheme
from sinkquant.schemes.tensors import Tensor, scale_dtype
from sinkquant.schemes.weight_format import PLAIN, WeightFormat

KERNEL_GROUPS = frozenset({-1, 32, 64, 128})
"""Group sizes that the 4- and 8-bit kernels of most engines have."""
ON_CPU = "vllm-cpu"
SURVIVES = 7
"""Bits of a code that processors without VNNI multiply with bytes exactly: they add pairs of products in 16 bits, and
two of 255 and -64 fit."""
BYTES = "int-quantized"
"""The storage of codes that take a byte each."""


@dataclass(frozen=True)
class Integers(Scheme):
    """Symmetric codes, dense int32 words or a byte each; a 16-bit scale for every group."""

    def tensors(self, rows: int, columns: int, form: WeightFormat, dtype: str, expert: bool) -> dict[str, Tensor]:
        """Words, scales and the weight's shape; or codes of a byte each and scales. One scale more where the inputs
        have a static one; and what stands beside the codes."""
        scale: dict[str, Tensor] = {"weight_scale": (self.scales(dtype, expert), [rows, form.groups(columns)])}
        inputs: dict[str, Tensor] = {"input_scale": (scale_dtype(dtype), [1])} if form.static_inputs else {}
        if bytewise(form):
            return {"weight": ("int8", [rows, columns])} | scale | inputs
        words: dict[str, Tensor] = {"weight_packed": ("int32", [rows, math.ceil(columns * form.bits / 32)])}
        return words | scale | {"weight_shape": ("int64", [2])} | inputs | beside(rows, form, dtype)

    def layout(self, form: WeightFormat) -> str:
        """A byte for every code, or dense words."""
        return self.layouts[bytewise(form)]

    def arguments(self, form: WeightFormat) -> dict[str, object]:
        """Codes of a byte each are said to have 8 bits, whatever they use of them: so engines multiply them."""
        return super().arguments(replace(form, bits=8) if bytewise(form) else form)

    def for_engine(self, engine: str, form: WeightFormat) -> WeightFormat:
        """vLLM on a CPU rounds the inputs of codes of a byte each alone, and runs packed ones with inputs of 16 bits.
        Which processor will serve is not known here, so that no code may need more than any has."""
        if engine != ON_CPU or form.inputs != "int8" or form.group_size != -1 or form.bits > 8:
            return form
        return replace(form, bits=min(form.bits, SURVIVES), storage=BYTES)

    def more_precise(self, form: WeightFormat, columns: int) -> WeightFormat | None:
        """More bits of a byte that is stored anyway are no other format."""
        return None if form.storage == BYTES else super().more_precise(form, columns)


def bytewise(form: WeightFormat) -> bool:
    """Whether codes take a byte each (`int-quantized`): where an engine multiplies them with 8-bit inputs as they
    stand, and where they have to stand under the name of the weight."""
    return form.storage == BYTES or (form.bits == 8 and form.group_size == -1 and form.inputs == "int8")


def beside(rows: int, form: WeightFormat, dtype: str) -> dict[str, Tensor]:
    """The tensors of the columns and single weights that stand beside the codes of a weight, in 16 bits each."""
    found: dict[str, Tensor] = {}
    if form.columns:
        found |= {"weight_columns": ("int32", [form.columns]),
                  "weight_exact": (scale_dtype(dtype), [rows, form.columns])}
    if form.scalars:
        found |= {"weight_places": ("int32", [form.scalars, 2]), "weight_values": (scale_dtype(dtype), [form.scalars])}
    return found


INTEGERS = Integers(
    storage=PLAIN, backend=DEFAULT_BACKEND, words="integer weights", mixed=True, integers=True, beside=True,
    inputs=("16-bit", "int8", "int6", "int4"), layouts=(PLAIN, "int-quantized"),
    loads=(
        Loads("transformers", "any", "5.0", "tried", "tests/formats"),
        Loads("vllm", "CUDA", "", "read", "docs.vllm.ai", frozenset({4, 8}), KERNEL_GROUPS, frozenset({"16-bit"}),
              "Marlin and Machete kernels"),
        Loads("vllm", "CUDA", "", "read", "docs.vllm.ai", frozenset({8}), frozenset({-1}), frozenset({"int8"})),
        Loads("vllm-cuda", "CUDA, SM75 with float16, SM80 with bfloat16", "", "read",
              "github.com/vllm-project/compressed-tensors/issues/719", None, KERNEL_GROUPS, frozenset({"16-bit"}),
              "Humming kernels", instead_of="vllm"),
        Loads("vllm-cuda", "CUDA, SM75", "0.32.0", "read", "vLLM's compressed_tensors_wNa8.py", None, KERNEL_GROUPS,
              frozenset({"int8"}), "Humming kernels; inputs with a scale per token", instead_of="vllm",
              input_scales=frozenset({"token"})),
        Loads(ON_CPU, "CPU with AVX-512", "0.32.0", "tried", "tests/engines", frozenset({4}), KERNEL_GROUPS,
              frozenset({"16-bit"}), "no float32; the build for AVX2 lacks the kernel", instead_of="vllm",
              instructions="AVX-512"),
        Loads(ON_CPU, "CPU with VNNI", "0.32.0", "tried", "tests/engines", frozenset({8}), frozenset({-1}),
              frozenset({"int8"}), "without VNNI its product saturates, unsaid: engine=vllm-cpu holds codes to 7 bits; "
              "inputs are divided by 127 steps, not 127.5", instead_of="vllm", instructions="VNNI")))
IN_BYTES = replace(
    INTEGERS, storage=BYTES, format="", words="integer weights of a byte each", beside=False, inputs=("16-bit", "int8"),
    loads=(Loads("transformers", "any", "5.0", "tried", "tests/formats",
                 caveat="of a token embedding, of a head that shares its codes, and for engine=vllm-cpu"),
           Loads("vllm", "CUDA", "", "read", "docs.vllm.ai", None, frozenset({-1}), frozenset({"int8"})),
           Loads(ON_CPU, "CPU", "0.32.0", "tried", "tests/engines", frozenset(range(2, SURVIVES + 1)), frozenset({-1}),
                 frozenset({"int8"}), "of 7 bits at most, so that no product saturates", instead_of="vllm")))
"""Under the name of the weight itself. transformers loads a packed embedding so alone: what it initializes modules with
asks every embedding for its `weight`, which dense words take away."""
