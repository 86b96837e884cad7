"""Plants a sink of known token, position, heads, channel and birth layer into the weights of a tiny random model.

The planted circuit is the one that trained models show: a marker in the embedding of one token (or position) fires one
neuron of the birth layer's MLP; the neuron writes a massive activation into one channel of the residual stream; in all
later layers the keys read that channel, and the queries of the chosen heads read a channel that is constant over all
tokens. Rows and columns that would disturb the circuit are zeroed, so that the ground truth is exact. Several sinks may
be planted at once; one without heads is a massive activation without a sink, and one that is not `massive` is a sink
without a massive activation: its keys read the marker itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sinkquant.models import Decoder, Walk

CONSTANT, MARKER = 5, 9
MARKERS = (MARKER, 11, 13, 15)
"""Channels that the circuits need beside the massive ones: one marker for each plant."""
NEURONS = (3, 6, 8, 10)
"""The MLP neuron, by its index, that each plant's birth layer gives to it."""


@dataclass(frozen=True)
class Plant:
    """Ground truth. Heads in layers after `birth` (up to `last`) listed in `heads` sink; exactly one of token_id and
    position is set. `also`: more token ids that are the same sink."""

    token_id: int | None
    position: int | None
    heads: frozenset[int]
    channel: int
    birth: int
    peak: float = 30.0
    massive: bool = True
    also: tuple[int, ...] = ()
    last: int | None = None


@dataclass(frozen=True)
class _Views:
    """Writable views into one block, whatever the family stores."""

    q: torch.Tensor  # [heads, head_dim, hidden]
    k: torch.Tensor  # [kv_heads, head_dim, hidden]
    attention_out: torch.Tensor  # [hidden, heads * head_dim]
    mlp_in: list[torch.Tensor]  # each [neurons, hidden]
    mlp_out: list[torch.Tensor]  # each [hidden, neurons]
    mlp_bias: tuple[torch.Tensor, ...] = ()  # each [neurons], in the families whose norms centre


def plant(model: PreTrainedModel, *plants: Plant) -> PreTrainedModel:
    """Write the sinks into `model`, in place, and return it."""
    decoder = Decoder.of(model)
    channels = [CONSTANT, *MARKERS[: len(plants)], *(what.channel for what in plants)]
    with torch.no_grad():
        embedding, positions = model.get_input_embeddings().weight, _positions(model)
        embedding[:, channels] = 0
        embedding[:, CONSTANT] = 0.5 / _embedding_scale(model)
        if positions is not None:
            positions[:, channels] = 0
        views = [_views(model, block) for block in decoder.blocks]
        for view in views:
            for matrix in (view.attention_out, *view.mlp_out):
                matrix[channels] = 0
        for what, marker, neuron, dimension in zip(plants, MARKERS, NEURONS, _quiet_dimensions(model), strict=False):
            if what.token_id is not None:
                embedding[[what.token_id, *what.also], marker] = 0.3 / _embedding_scale(model)
            else:
                assert positions is not None, "only learned positions can be told apart"
                positions[what.position + _position_offset(model), marker] = 0.3
            for view in views[what.birth + 1:None if what.last is None else what.last + 1]:
                _point_heads(view, what, what.channel if what.massive else marker, dimension)
            _set_norms(decoder, what, dimension)
            if what.massive:
                _write_neuron(views[what.birth], what, marker, neuron)
        for what, neuron in zip(plants, NEURONS, strict=False):
            if what.massive:
                _calibrate(decoder, views[what.birth], what, neuron)
    return model


def _point_heads(view: _Views, what: Plant, channel: int, dimension: int) -> None:
    """Keys read `channel` and queries of the chosen heads the constant one, in one quiet dimension."""
    view.k[:, dimension] = 0
    view.k[:, dimension, channel] = 1.0 if what.massive else 2.0
    view.q[:, dimension] = 0
    for head in what.heads:
        view.q[head, dimension, CONSTANT] = 1.0


def _write_neuron(view: _Views, what: Plant, marker: int, neuron: int) -> None:
    """The neuron reads the marker and writes to the massive channel only."""
    for matrix in view.mlp_in:
        matrix[neuron] = 0
        matrix[neuron, marker] = 2.0
    for bias in view.mlp_bias:
        bias[neuron] = -4.0  # layer norms centre: without this the neuron answers to any token's mean
    for matrix in view.mlp_out:
        matrix[:, neuron] = 0
        matrix[what.channel, neuron] = 1.0


def _calibrate(decoder: Decoder, view: _Views, what: Plant, neuron: int) -> None:
    """Scale the neuron's write until the channel reaches the peak after the birth layer."""
    place = 4 if what.position is None else what.position
    rows = 40 + torch.arange(max(32, place + 1))[None] % 80
    if what.token_id is not None:
        rows[0, place] = what.token_id
    walk = Walk(decoder, rows, 1)
    for step in walk.steps():
        if step.index == what.birth:
            reached = float(step.run()[0, place, what.channel])
            norm = getattr(step.block, "post_feedforward_layernorm", None)
            break
    if norm is not None:
        # A sandwich norm undoes any scale of the neuron: its own weight sets the peak (Gemma stores weight - 1).
        norm.weight[what.channel] = what.peak / reached * (1 + norm.weight[what.channel]) - 1
        return
    for matrix in view.mlp_out:
        matrix[what.channel, neuron] *= what.peak / reached


def _set_norms(decoder: Decoder, what: Plant, dimension: int) -> None:
    """QK-norms amplify the quiet dimension; sandwich norms are turned down, or they would lift random noise."""
    for index, block in enumerate(decoder.blocks):
        for name, module in block.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf in ("q_norm", "k_norm") and index > what.birth:
                gemma = "Gemma" in type(module).__name__
                module.weight[dimension] = 2.0 if gemma else 3.0
            if "Gemma" in type(module).__name__ and leaf in ("post_attention_layernorm", "post_feedforward_layernorm"):
                module.weight.fill_(-0.98)


def _quiet_dimensions(model: PreTrainedModel) -> tuple[int, ...]:
    """Dimensions of the head that rotary embedding leaves (nearly) alone, one for each plant."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type in ("gpt2", "opt"):
        return 0, 1, 2, 3
    if config.model_type == "gpt_neox":
        return tuple(head_dim - i for i in range(1, 5))  # rotary covers the first quarter only
    # The pairs with the lowest frequencies.
    return head_dim // 2 - 1, head_dim - 1, head_dim // 2 - 2, head_dim - 2


def _embedding_scale(model: PreTrainedModel) -> float:
    return model.config.hidden_size**0.5 if model.config.model_type.startswith("gemma") else 1.0


def _positions(model: PreTrainedModel) -> torch.Tensor | None:
    if model.config.model_type == "gpt2":
        return model.transformer.wpe.weight
    if model.config.model_type == "opt":
        return model.model.decoder.embed_positions.weight
    return None


def _position_offset(model: PreTrainedModel) -> int:
    return 2 if model.config.model_type == "opt" else 0


def _views(model: PreTrainedModel, block: torch.nn.Module) -> _Views:
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    kind = config.model_type
    if kind == "gpt2":
        qkv = block.attn.c_attn.weight.T.view(3, heads, -1, config.hidden_size)
        mlp = block.mlp
        return _Views(qkv[0], qkv[1], block.attn.c_proj.weight.T, [mlp.c_fc.weight.T], [mlp.c_proj.weight.T],
                      (mlp.c_fc.bias,))
    if kind == "gpt_neox":
        qkv = block.attention.query_key_value.weight.view(heads, 3, -1, config.hidden_size)
        return _Views(qkv[:, 0], qkv[:, 1], block.attention.dense.weight,
                      [block.mlp.dense_h_to_4h.weight], [block.mlp.dense_4h_to_h.weight],
                      (block.mlp.dense_h_to_4h.bias,))
    attention = block.self_attn
    if kind == "phi3":
        head_dim = config.hidden_size // heads
        weight = attention.qkv_proj.weight
        q, k = weight[: heads * head_dim], weight[heads * head_dim: (heads + kv_heads) * head_dim]
    else:
        q, k = attention.q_proj.weight, attention.k_proj.weight
    q, k = q.view(heads, -1, config.hidden_size), k.view(kv_heads, -1, config.hidden_size)
    if kind == "opt":
        return _Views(q, k, attention.out_proj.weight, [block.fc1.weight], [block.fc2.weight], (block.fc1.bias,))
    out = attention.o_proj.weight
    experts = getattr(block.mlp, "experts", None)
    if experts is not None:
        gate_up, down = experts.gate_up_proj, experts.down_proj
        if kind == "gpt_oss":  # [experts, hidden, 2 * neurons], gate and up interleaved
            return _Views(q, k, out, [m for e in gate_up for m in (e[:, 0::2].T, e[:, 1::2].T)], [e.T for e in down])
        return _Views(q, k, out, [m for e in gate_up for m in e.chunk(2)], list(down))
    if kind == "phi3":
        return _Views(q, k, out, list(block.mlp.gate_up_proj.weight.chunk(2)), [block.mlp.down_proj.weight])
    return _Views(q, k, out, [block.mlp.gate_proj.weight, block.mlp.up_proj.weight], [block.mlp.down_proj.weight])
