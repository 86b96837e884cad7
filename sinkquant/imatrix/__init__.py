"""Importance matrices for llama.cpp's quantizer, whose statistics know the sinks."""

from sinkquant.imatrix.imatrix import imatrix
