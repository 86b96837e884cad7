"""GGUF, the one file that llama.cpp runs: its names, its layout, its metadata and its blocks. Nothing here imports
torch."""

from sinkquant.schemes.gguf.scheme import BACKEND, GGUF, Blocks
