"""Weights of every number format -> the tensors of its files, and back; one file for each, in one list."""

from sinkquant.schemes.codecs.codec import Codec, LibraryCodec, LibraryWeight, StoredWeight, install_modules
from sinkquant.schemes.codecs.files import Files, LibraryFiles
from sinkquant.schemes.codecs.outliers import Outliers
from sinkquant.schemes.codecs.packed import PackedWeight, row_chunks
from sinkquant.schemes.codecs.registry import CODECS, codec_of, files_of, library_codec, library_files
