"""ModelShape: the names, shapes and sizes of a model, all that a plan needs to know of it."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from sinkquant.artifacts.base import Strict


class LinearShape(Strict):
    """One weight matrix of a block.

    `fused_with` lists the modules (itself included) that an inference engine fuses into one and that therefore must
    share a format; `fixed` says why the module has to stay in 16 bits, or is null. `reads` is what its input is, null
    where that is not known: the residual "stream" behind a norm, attention's "values", or the "inner" channels of an
    MLP; `scaled_by` the norm or the linear that can take a scale of the input's channels, or null. `part_of` is the
    fused parameter that an expert's weights are a part of as long as they are not packed, null for a linear of its own;
    experts are listed with all experts of the model in `fused_with`, and `artifacts/experts.py` says what they must
    share. `transposed`: the model stores the weight as [columns, rows].
    """

    rows: int
    columns: int
    block: int
    fused_with: list[str] = Field(default_factory=list)
    fixed: str | None = None
    reads: Literal["stream", "values", "inner"] | None = None
    scaled_by: str | None = None
    part_of: str | None = None
    transposed: bool = False

    @property
    def parameters(self) -> int:
        """Number of weights, without the bias."""
        return self.rows * self.columns


class EndShape(Strict):
    """The token embedding or the output head: a weight of one row per token. `shared_with`: the embedding that a head
    is, or null where it has a weight of its own. `buffers`: what an embedding computes with beside its weight and no
    checkpoint holds, its factor in Gemma 3 say: transformers looks for them where the embedding is quantized."""

    kind: Literal["embedding", "head"]
    rows: int
    columns: int
    shared_with: str | None = None
    buffers: dict[str, tuple[str, list[int]]] = Field(default_factory=dict)


class KVLayerShape(Strict):
    """The keys and values of one layer: `heads` 0 where it keeps none of its own. `sliding_window` is in tokens, null
    where the layer sees the whole row. `latent`: numbers that a token takes where they are cached in place of keys and
    values."""

    heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None = None
    latent: int = 0


class ModelShape(Strict):
    """Everything that decides the size of a checkpoint, and of a KV cache.

    `linears` are the weight matrices inside the blocks by module name; `tensors` every tensor as it stands in the
    unquantized checkpoint: name -> (dtype, shape), tied weights once. `kv_layers` has one entry per layer.
    `not_rotated`: scope of a rotation ("values", "full") -> why it is not possible; `untied`: what a full rotation
    adds to `tensors`. `not_loaded_from`: backends whose checkpoints transformers loads into other experts than the
    model's own, which have tensors of other names (Llama 4), and "vllm" where that has other names than transformers
    (GPT-NeoX). `carried`: tensors of its folder that the model does not compute with and a checkpoint takes along;
    `ends`: the token embedding and the output head by module name, where they are an embedding and a linear;
    `attentions`: module name of every attention that has a place for scales of its keys and values -> its KV heads;
    `folder`: where its files lie, null for a model made in memory; `notes`: what a plan has to say about its files.
    """

    name: str
    architecture: str
    blocks: int
    dtype: str
    linears: dict[str, LinearShape]
    tensors: dict[str, tuple[str, list[int]]]
    kv_layers: list[KVLayerShape] = Field(default_factory=list)
    not_rotated: dict[str, str] = Field(default_factory=dict)
    untied: dict[str, tuple[str, list[int]]] = Field(default_factory=dict)
    not_loaded_from: list[str] = Field(default_factory=list)
    carried: dict[str, tuple[str, list[int]]] = Field(default_factory=dict)
    ends: dict[str, EndShape] = Field(default_factory=dict)
    attentions: dict[str, int] = Field(default_factory=dict)
    folder: str | None = None
    notes: list[str] = Field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Number of values in all tensors that the model computes with."""
        return sum(math.prod(size) for _, size in self.tensors.values())

    @property
    def weights(self) -> int:
        """Number of weights in all linears."""
        return sum(linear.parameters for linear in self.linears.values())

    @property
    def values(self) -> int:
        """Number of values in all tensors of the unquantized checkpoint."""
        return self.parameters + sum(math.prod(size) for _, size in self.carried.values())
