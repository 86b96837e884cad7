"""The codec of every number format, in one list."""

from __future__ import annotations

from sinkquant.schemes import WeightFormat, bitsandbytes, fp8, gptq, integers, quanto, scheme_of
from sinkquant.schemes.codecs.bitsandbytes import BitsAndBytesFiles, FourBitCodec, LLMInt8Codec
from sinkquant.schemes.codecs.codec import Codec, LibraryCodec
from sinkquant.schemes.codecs.compressed import CompressedTensorsFiles
from sinkquant.schemes.codecs.files import Files, LibraryFiles
from sinkquant.schemes.codecs.fp8 import FP8Codec
from sinkquant.schemes.codecs.gptq import GPTQCodec, GPTQFiles
from sinkquant.schemes.codecs.integers import IntegerCodec
from sinkquant.schemes.codecs.quanto import QuantoCodec, QuantoFiles

CODECS: tuple[Codec, ...] = (
    IntegerCodec(integers.INTEGERS, CompressedTensorsFiles()), FP8Codec(fp8.FP8, CompressedTensorsFiles()),
    *(FourBitCodec(scheme, BitsAndBytesFiles()) for scheme in bitsandbytes.FOUR_BIT),
    LLMInt8Codec(bitsandbytes.LLM_INT8, BitsAndBytesFiles()),
    QuantoCodec(quanto.INTEGERS, QuantoFiles()), QuantoCodec(quanto.FLOAT8, QuantoFiles()),
    GPTQCodec(gptq.GPTQ, GPTQFiles()))


def codec_of(form: WeightFormat) -> Codec:
    """The codec of a format."""
    scheme = scheme_of(form)
    return next(codec for codec in CODECS if codec.scheme == scheme)


def library_codec(form: WeightFormat) -> LibraryCodec | None:
    """The codec of a format whose codes a library chooses; None where one of our methods does."""
    codec = codec_of(form)
    return codec if isinstance(codec, LibraryCodec) else None


def files_of(backend: str) -> Files:
    """How the checkpoints of a backend are written."""
    return next(codec.files for codec in CODECS if codec.files.backend == backend)


def library_files() -> list[LibraryFiles]:
    """The files that are read by codecs, one of a kind."""
    found = {codec.files.backend: codec.files for codec in CODECS}
    return [files for files in found.values() if isinstance(files, LibraryFiles)]
