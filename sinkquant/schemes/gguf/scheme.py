"""Weights in ggml's blocks of 32 with one scale each: Q4_0, Q4_1 and Q8_0, in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sinkquant.errors import RequestError
from sinkquant.schemes.gguf.layout import FileTensor, file_bytes
from sinkquant.schemes.gguf.metadata import family_of, metadata_size, rope_factors
from sinkquant.schemes.gguf.names import CODES, EMBEDDING, HEAD, Family, file_name
from sinkquant.schemes.loads import Loads
from sinkquant.schemes.scheme import NO_ROUNDING, Scheme
from sinkquant.schemes.tensors import Tensor
from sinkquant.schemes.weight_format import WeightFormat

BACKEND = "gguf"
BLOCK = 32
"""Weights that share a scale."""
BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
"""Kind -> bytes of a block: the scale in float16, in Q4_1 the least value too, then the codes."""
PLAIN_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ROPE = "rope_freqs.weight"


@dataclass(frozen=True)
class Blocks(Scheme):
    """Codes and a float16 scale for every 32 columns, of 4 bits with a zero point where not symmetric; a larger group
    writes both as often as it has blocks. Linears that are left alone keep their 16 bits, norms and biases take 32 as
    llama.cpp wants them."""

    def tensors(self, rows: int, columns: int, form: WeightFormat, dtype: str, expert: bool) -> dict[str, Tensor]:
        """The blocks of every row, as they stand in the file."""
        kind = self.kind_of(form.bits)
        return {kind: ("uint8", [rows, columns // BLOCK * BLOCK_BYTES[kind]])}

    def kind_of(self, bits: int) -> str:
        """ggml's kind of block, as a tensor's name ends with."""
        return "q4_1" if bits == 4 and not self.symmetric else f"q{bits}_0"

    def scales(self, dtype: str, expert: bool) -> str:
        """float16 in any model."""
        return "float16"

    def refuses(self, name: str, bits: int, group_size: int | None, method: str) -> str:
        """Groups that blocks do not fill."""
        if group_size is not None and group_size != -1 and group_size % BLOCK:
            return (f"a scale of a GGUF file is of {BLOCK} columns, and {name} gets groups of {group_size}; set "
                    f"weights.group_size={BLOCK} (or a multiple), and its override.")
        return ""

    def check_model(self, architecture: str, folder: str | None, columns: Mapping[str, int]) -> None:
        """Refuse a model that llama.cpp has no name for, cannot be told all of, or whose rows blocks do not fill."""
        family_of(architecture)
        for name, width in columns.items():
            if width % BLOCK:
                raise RequestError(f"a block of a GGUF file is of {BLOCK} columns, which does not divide the {width} "
                                   f"input columns of {name}; use another backend.")
        if folder is None:
            raise RequestError("a GGUF file holds the tokenizer and the configuration of the model's folder, and this "
                               "model was made in memory; save it and load it from there.")
        metadata_size(folder, architecture)

    def file_size(self, tensors: Mapping[str, Tensor], carried: Mapping[str, Tensor], architecture: str,
                  folder: str | None) -> int:
        """Bytes of the one file, tokenizer included."""
        if folder is None:
            self.check_model(architecture, folder, {})
        family, place = family_of(architecture), str(folder)
        own = {name: tensor for name, tensor in tensors.items() if name not in carried}
        return file_bytes(metadata_size(place, architecture), self.file_tensors(own, family, Path(place)))

    def file_tensors(self, tensors: Mapping[str, Tensor], family: Family, folder: Path) -> dict[str, FileTensor]:
        """The tensors of a file, name -> kind and shape, in their order.

        Args:
            tensors: of the checkpoint under transformers' names, linears packed. folder: of the model.

        Raises:
            RequestError: GGUF has no name for one of them.
        """
        found: dict[str, FileTensor] = {}
        factors = rope_factors(folder)
        if factors:
            found[ROPE] = FileTensor("F32", (len(factors),))
        for source, (dtype, shape) in tensors.items():
            name = file_name(family, source)
            if name is None:
                raise RequestError(f"GGUF has no name for the tensor {source} of this model; use another backend.")
            found[name] = FileTensor(*self._stored(source, dtype, shape), source)
        return found

    def _stored(self, source: str, dtype: str, shape: list[int]) -> tuple[str, tuple[int, ...]]:
        module, _, leaf = source.rpartition(".")
        if leaf in CODES:
            rows, size = shape
            return leaf.upper(), (rows, size // BLOCK_BYTES[leaf] * BLOCK)
        if len(shape) < 2:
            return "F32", tuple(shape)
        if module in (EMBEDDING, HEAD) and self.ends != NO_ROUNDING:
            return self.ends.upper(), tuple(shape)
        return PLAIN_KINDS[dtype], tuple(shape)


def _blocks(ends: str, symmetric: bool) -> Blocks:
    names = [BACKEND, *([] if symmetric else ["q4_1"]), *([] if ends == NO_ROUNDING else [ends])]
    return Blocks(
        storage="-".join(names), backend=BACKEND, symmetric=symmetric,
        words="blocks of a GGUF file" if symmetric else "blocks with zero points of a GGUF file", bits=(4, 8),
        mixed=True, integers=symmetric, grid=not symmetric, ends=ends, packages=(("gguf", "gguf"),),
        loads=(Loads("llama.cpp", "any", "", "tried", "tests/engines"),
               Loads("transformers with gguf_file", "any", "5.0", "tried", "tests/schemes/gguf",
                     caveat="makes the weights dense; without the frequencies of Llama 3's kind of scaling"),
               Loads("sinkquant", "any", "0.1", "tried", "tests/schemes/gguf")))


GGUF = tuple(_blocks(ends, symmetric) for symmetric in (True, False)
             for ends in (NO_ROUNDING, "f16", "bf16", "q8_0"))
