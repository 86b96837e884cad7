"""Weights in ggml's blocks of 32 with one scale each, in a GGUF file: Q4_0, Q5_0 and Q8_0, with zero points Q4_1 and
Q5_1, and on a grid that is no line IQ4_NL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sinkquant.errors import RequestError
from sinkquant.schemes.gguf.layout import KINDS, FileTensor, file_bytes
from sinkquant.schemes.gguf.metadata import family_of, metadata_size, rope_factors
from sinkquant.schemes.gguf.names import CODES, EMBEDDING, HEAD, Family, file_name
from sinkquant.schemes.loads import Loads
from sinkquant.schemes.scheme import NO_ROUNDING, Scheme
from sinkquant.schemes.tensors import Tensor
from sinkquant.schemes.weight_format import WeightFormat

BACKEND = "gguf"
BLOCK = 32
"""Weights that share a scale."""
LADDERS = {"q4_0": ("q4_0", "q5_0", "q8_0"), "q4_1": ("q4_1", "q5_1", "q8_0"), "iq4_nl": ("iq4_nl", "q5_0", "q8_0")}
"""Kind of block with 4 bits -> the kinds with 4, 5 and 8 that stand in one file."""
PLAIN_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ROPE = "rope_freqs.weight"


@dataclass(frozen=True)
class Blocks(Scheme):
    """Codes and a float16 scale for every 32 columns, of 4 and 5 bits with a zero point where not symmetric; a larger
    group writes both as often as it has blocks. Linears that are left alone keep their 16 bits, norms and biases take
    32 as llama.cpp wants them.

    Attributes:
        kinds: ggml's kind of block for each of `bits`.
    """

    kinds: tuple[str, ...] = ()

    @property
    def tried_as(self) -> str:
        """What the ends are held in makes no difference to a linear."""
        return self.storage.removesuffix(f"-{self.ends}")

    def tensors(self, rows: int, columns: int, form: WeightFormat, dtype: str, expert: bool) -> dict[str, Tensor]:
        """The blocks of every row, as they stand in the file."""
        kind = self.kind_of(form.bits)
        return {kind: ("uint8", [rows, columns // BLOCK * KINDS[kind.upper()][2]])}

    def kind_of(self, bits: int) -> str:
        """ggml's kind of block, as a tensor's name ends with."""
        return self.kinds[self.bits.index(bits)]

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
            return leaf.upper(), (rows, size // KINDS[leaf.upper()][2] * BLOCK)
        if len(shape) < 2:
            return "F32", tuple(shape)
        if module in (EMBEDDING, HEAD) and self.ends != NO_ROUNDING:
            return self.ends.upper(), tuple(shape)
        return PLAIN_KINDS[dtype], tuple(shape)


def _blocks(four: str, ends: str) -> Blocks:
    words = {"q4_0": "blocks of a GGUF file", "q4_1": "blocks with zero points of a GGUF file",
             "iq4_nl": "blocks of a GGUF file on the grid of IQ4_NL"}
    curved = four == "iq4_nl"
    names = [BACKEND, *([] if four == "q4_0" else [four]), *([] if ends == NO_ROUNDING else [ends])]
    return Blocks(
        storage="-".join(names), backend=BACKEND, format="iq4_nl" if curved else "int",
        symmetric=four != "q4_1", words=words[four], bits=(4, 5, 8), kinds=LADDERS[four], mixed=True,
        integers=four == "q4_0", grid=four != "q4_0", zero_from=5 if curved else 0, ends=ends,
        packages=(("gguf", "gguf"),),
        loads=(Loads("llama.cpp", "any", "", "tried", "tests/engines"),
               Loads("transformers with gguf_file", "any", "5.0", "tried", "tests/schemes/gguf",
                     caveat="makes the weights dense; without the frequencies of Llama 3's kind of scaling"),
               Loads("sinkquant", "any", "0.1", "tried", "tests/schemes/gguf")))


GGUF = tuple(_blocks(four, ends) for four in LADDERS for ends in (NO_ROUNDING, "f16", "bf16", "q8_0"))


def holding(kind: str, main: Blocks) -> Blocks:
    """The scheme that a kind of block is of, in a file that is mostly in `main`."""
    return next(scheme for scheme in (main, *GGUF) if kind in scheme.kinds and scheme.ends == main.ends)
