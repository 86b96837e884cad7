"""Who loads a number format, on which hardware, and where that is known from: the rows of the engine table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sinkquant.schemes.weight_format import WeightFormat

VLLM = frozenset({"vllm", "vllm-cuda", "vllm-cpu"})
"""Its names. It loads packed experts only where all of them are packed, one tensor each, under names that end in _proj,
as most families call them; of integers those of 4 or 8 bits."""
EXPERTS_BY_NAME = VLLM | {"gptqmodel"}
"""Engines that look for experts under the names of the hub, one tensor each."""


@dataclass(frozen=True)
class Loads:
    """One engine that loads a scheme, for the formats of it that meet all conditions; null: any will do.

    Attributes:
        engine: as `plan.json` names it. hardware, since: where it runs; the oldest version that is known to do so,
            empty where none was named.
        known: "tried" by the tests or by hand, or "read" in `place`.
        bits, group_sizes, inputs, input_scales: what weights and inputs may be. caveat: what to know of it.
        instructions: of the processor, that its kernels need: "AVX-512" or "VNNI".
        instead_of: an engine that makes this row superfluous in a plan where it loads all, too.
    """

    engine: str
    hardware: str
    since: str
    known: Literal["tried", "read"]
    place: str
    bits: frozenset[int] | None = None
    group_sizes: frozenset[int] | None = None
    inputs: frozenset[str] | None = None
    caveat: str = ""
    instead_of: str = ""
    instructions: str = ""
    input_scales: frozenset[str | None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The engine, without what it takes beside it ("transformers with bitsandbytes"), and the engine on this
        hardware: "vllm" and "vllm-cuda"."""
        return tuple(dict.fromkeys((self.engine, self.engine.partition(" with ")[0],
                                    f"{self.engine}-{self.hardware.partition(',')[0].lower()}")))

    def takes(self, form: WeightFormat) -> bool:
        """Whether a format meets the conditions on weights and inputs."""
        return (self.bits is None or form.bits in self.bits) and (
            self.group_sizes is None or form.group_size in self.group_sizes) and (
            self.inputs is None or form.inputs in self.inputs) and (
            self.input_scales is None or form.input_scale in self.input_scales)

    def conditions(self) -> str:
        """What weights and inputs may be, in words; empty where any will do."""
        parts = []
        if self.bits is not None:
            parts.append(f"{_listed(self.bits)} bits")
        if self.group_sizes is not None:
            sizes = _listed(size for size in self.group_sizes if size > 0)
            named = ([f"groups of {sizes}"] if sizes else []) + (["per channel"] if -1 in self.group_sizes else [])
            parts.append(" or ".join(named))
        if self.inputs is not None:
            parts.append(f"{' or '.join(sorted(self.inputs))} inputs")
        return ", ".join(parts)


def _listed(numbers: Iterable[int]) -> str:
    """"2, 3 or 4"; "2 to 8" where none between is left out."""
    found = sorted(numbers)
    if len(found) > 3 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]} to {found[-1]}"
    return " or ".join(filter(None, [", ".join(map(str, found[:-1])), str(found[-1]) if found else ""]))


KV_SCALES = "FP8 keys and values"
READ_KV_SCALES = (
    Loads("transformers", "any", "5.0", "tried", "tests/formats",
          caveat="rounds keys and values as it goes, and keeps them in 16 bits"),
    Loads("vllm", "CUDA", "", "read", "docs.vllm.ai"),
    Loads("vllm-cpu", "CPU", "0.32.0", "read", "vLLM's attention/backends/cpu_attn.py", instead_of="vllm"))
"""Who reads the scales of an FP8 KV cache that a checkpoint stores (`kv_cache_scheme`)."""


def reads_kv_scales(engine: str) -> bool:
    """Whether an engine, named as in `loads_in` or as a recipe names it, reads them."""
    return any(engine in row.names or engine.partition(" with ")[0] in row.names for row in READ_KV_SCALES)
