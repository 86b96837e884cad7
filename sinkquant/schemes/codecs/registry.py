"""The codec of every number format, in one list."""

from __future__ import annotations

from sinkquant.errors import RequestError
from sinkquant.extensions import brought, loaded
from sinkquant.schemes import Scheme, WeightFormat, bitsandbytes, blocks, fp8, gguf, gptq, integers, quanto, scheme_of
from sinkquant.schemes.codecs.bitsandbytes import BitsAndBytesFiles, FourBitCodec, LLMInt8Codec
from sinkquant.schemes.codecs.blocks import BlockCodec
from sinkquant.schemes.codecs.codec import Codec, LibraryCodec
from sinkquant.schemes.codecs.compressed import CompressedTensorsFiles
from sinkquant.schemes.codecs.files import Files, LibraryFiles
from sinkquant.schemes.codecs.fp8 import FP8Codec
from sinkquant.schemes.codecs.gguf import GGMLCodec, GGUFFiles
from sinkquant.schemes.codecs.gptq import GPTQCodec, GPTQFiles
from sinkquant.schemes.codecs.integers import IntegerCodec
from sinkquant.schemes.codecs.quanto import QuantoCodec, QuantoFiles
from sinkquant.schemes.registry import all_schemes, of_backend

GROUP = "sinkquant.codecs"
"""The group of entry points that other packages bring codecs by, under the name of the storage."""
CODECS: tuple[Codec, ...] = (
    *(IntegerCodec(scheme, CompressedTensorsFiles()) for scheme in (integers.INTEGERS, integers.IN_BYTES)),
    FP8Codec(fp8.FP8, CompressedTensorsFiles()),
    *(BlockCodec(scheme, CompressedTensorsFiles()) for scheme in (blocks.NVFP4, blocks.MXFP4, blocks.MXFP8)),
    *(FourBitCodec(scheme, BitsAndBytesFiles()) for scheme in bitsandbytes.FOUR_BIT),
    LLMInt8Codec(bitsandbytes.LLM_INT8, BitsAndBytesFiles()),
    QuantoCodec(quanto.INTEGERS, QuantoFiles()), QuantoCodec(quanto.FLOAT8, QuantoFiles()),
    *(GPTQCodec(scheme, GPTQFiles()) for scheme in (gptq.GPTQ, gptq.ZEROS)),
    *(GGMLCodec(scheme, GGUFFiles()) for scheme in gguf.GGUF))


def codec_of(form: WeightFormat) -> Codec:
    """The codec of a format.

    Raises:
        RequestError: it comes from another package, which brings no codec of it.
    """
    return _codec(scheme_of(form))


def library_codec(form: WeightFormat) -> LibraryCodec | None:
    """The codec of a format whose codes a library chooses; None where one of our methods does."""
    codec = codec_of(form)
    return codec if isinstance(codec, LibraryCodec) else None


def files_of(backend: str) -> Files:
    """How the checkpoints of a backend are written."""
    return _codec(of_backend(backend)[0]).files


def library_files() -> list[LibraryFiles]:
    """The files that are read by codecs, one of a kind."""
    found = {scheme.backend: scheme for scheme in all_schemes()}
    kinds = [_codec(scheme).files for scheme in found.values()]
    return [files for files in kinds if isinstance(files, LibraryFiles)]


def _codec(scheme: Scheme) -> Codec:
    for codec in CODECS:
        if codec.scheme == scheme:
            return codec
    if scheme.storage not in brought(GROUP):
        raise RequestError(f"no package brings a codec of {scheme.storage!r} ({GROUP}); mend the one that brings the "
                           "scheme.")
    return loaded(GROUP, scheme.storage, Codec)  # type: ignore[type-abstract]
