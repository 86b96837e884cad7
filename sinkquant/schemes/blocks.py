"""Floating-point weights in blocks: NVFP4, and MXFP4 and MXFP8 of OCP Microscaling 1.0, as compressed-tensors has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sinkquant.schemes.loads import Loads
from sinkquant.schemes.scheme import DEFAULT_BACKEND, Scheme
from sinkquant.schemes.tensors import Tensor
from sinkquant.schemes.weight_format import WeightFormat

PLACE = "vLLM's compressed_tensors/schemes"


@dataclass(frozen=True)
class Blocks(Scheme):
    """A scale of 8 bits for every block of columns: an FP8 number under one float32 scale of the whole tensor
    (`fused_scale`), or an exponent of two. Codes of 4 bits come two to a byte.

    compressed-tensors 0.20 unpacks all of them to bfloat16, whatever the model's dtype is.
    """

    scale_dtype: str = "uint8"

    def tensors(self, rows: int, columns: int, form: WeightFormat, dtype: str, expert: bool) -> dict[str, Tensor]:
        """Codes and scales; the scale of the tensor, and one of the inputs, where the format has them."""
        codes: dict[str, Tensor] = ({"weight_packed": ("uint8", [rows, columns // 2])} if form.bits == 4 else
                                    {"weight": ("float8_e4m3fn", [rows, columns])})
        whole: dict[str, Tensor] = {"weight_global_scale": ("float32", [1])} if self.fused_scale else {}
        inputs: dict[str, Tensor] = {"input_global_scale": ("float32", [1])} if form.static_inputs else {}
        return codes | {"weight_scale": (self.scale_dtype, [rows, form.groups(columns)])} | whole | inputs

    def arguments(self, form: WeightFormat) -> dict[str, object]:
        """As compressed-tensors' own presets have them."""
        stored = f"torch.{self.scale_dtype}"
        return {"num_bits": form.bits, "type": "float", "symmetric": True, "dynamic": False,
                "strategy": "tensor_group" if self.fused_scale else "group", "group_size": form.group_size,
                "scale_dtype": stored, "zp_dtype": stored}

    def scales(self, dtype: str, expert: bool) -> str:
        """The same in every model."""
        return self.scale_dtype

    def obstacle(self, rows: int, columns: int, own_parameter: bool) -> str:
        """transformers unpacks experts with a scale per group or channel alone."""
        return "" if own_parameter else f"transformers unpacks no experts in {self.words}"

ROUNDED_TOO = "; newer GPUs round the inputs too, unsaid"
"""vLLM 0.32 takes any MXFP4 or MXFP8 weights for those with rounded inputs, and has kernels for these on SM100."""


def _loads(inputs: str, native: str, weights_alone: str = "SM75", more: str = "") -> tuple[Loads, ...]:
    """Args:
        inputs, native: the format's own inputs, and what rounds to them. weights_alone: what runs it with inputs of 16
            bits. more: what to know of that.
    """
    both, alone = frozenset({"16-bit"}), frozenset({inputs})
    return (Loads("transformers", "any", "5.0", "tried", "tests/formats", caveat="models in bfloat16"),
            Loads("vllm", f"CUDA, {weights_alone}", "", "read", PLACE, inputs=both, caveat=f"Marlin kernels{more}"),
            Loads("vllm", f"CUDA, {native}", "", "read", PLACE, inputs=alone,
                  caveat="older GPUs run the weights alone, with inputs of 16 bits"))


NVFP4 = Blocks(
    storage="nvfp4-pack-quantized", backend=DEFAULT_BACKEND, words="NVFP4 weights", kind="float", format="nvfp4",
    bits=(4,), group_size=16, mixed=True, grid=True, steps=True, fused_scale=True, inputs=("16-bit", "nvfp4"),
    dtypes=("bfloat16",), layouts=("nvfp4-pack-quantized",), scale_dtype="float8_e4m3fn",
    loads=_loads("nvfp4", "SM100 or SM120"))
MXFP4 = Blocks(
    storage="mxfp4-pack-quantized", backend=DEFAULT_BACKEND, words="MXFP4 weights", kind="float", format="mxfp4",
    bits=(4,), group_size=32, mixed=True, grid=True, steps=True, inputs=("16-bit", "mxfp4", "fp8"),
    input_scales=("group", "token"), dtypes=("bfloat16",), layouts=("mxfp4-pack-quantized",),
    loads=(*_loads("mxfp4", "SM100", "SM80 to SM90", ROUNDED_TOO), Loads(
        "vllm", "CUDA, SM80", "0.32.0", "read", PLACE, inputs=frozenset({"fp8"}),
        caveat="Humming kernels; without them inputs become mxfp4, with a warning")))
MXFP8 = Blocks(
    storage="mxfp8-quantized", backend=DEFAULT_BACKEND, words="MXFP8 weights", kind="float", format="mxfp8", bits=(8,),
    group_size=32, mixed=True, methods=("rtn",), inputs=("16-bit", "mxfp8"), dtypes=("bfloat16",),
    layouts=("mxfp8-quantized",), loads=_loads("mxfp8", "SM100", "SM75 to SM90", ROUNDED_TOO))
