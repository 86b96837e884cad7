"""Plants a sink of known token, position, heads, channel and birth layer into the weights of a tiny random model.

The planted circuit is the one that trained models show: a marker in the embedding of one token (or position) fires one
neuron of the birth layer's MLP; the neuron writes a massive activation into one channel of the residual stream; in all
later layers the keys read that channel, and the queries of the chosen heads read a channel that is constant over all
tokens. Rows and columns that would disturb the circuit are zeroed, so that the ground truth is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sinkquant.models import Decoder, Walk

CONSTANT, MARKER = 5, 9
"""Channels that the circuit needs beside the massive one."""
NEURON = 3


@dataclass(frozen=True)
class Plant:
    """Ground truth. Heads in layers after `birth` listed in `heads` sink; exactly one of token_id, position is set."""

    token_id: int | None
    position: int | None
    heads: frozenset[int]
    channel: int
    birth: int
    peak: float = 30.0


@dataclass(frozen=True)
class _Views:
    """Writable views into one block, whatever the family stores."""

    q: torch.Tensor  # [heads, head_dim, hidden]
    k: torch.Tensor  # [kv_heads, head_dim, hidden]
    attention_out: torch.Tensor  # [hidden, heads * head_dim]
    mlp_in: list[torch.Tensor]  # each [neurons, hidden]
    mlp_out: list[torch.Tensor]  # each [hidden, neurons]
    mlp_bias: tuple[torch.Tensor, ...] = ()  # each [neurons], in the families whose norms centre


def plant(model: PreTrainedModel, what: Plant) -> PreTrainedModel:
    """Write the sink into `model`, in place, and return it."""
    decoder = Decoder.of(model)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, [CONSTANT, MARKER, what.channel]] = 0
        embedding[:, CONSTANT] = 0.5 / _embedding_scale(model)
        positions = _positions(model)
        if positions is not None:
            positions[:, [CONSTANT, MARKER, what.channel]] = 0
        if what.token_id is not None:
            embedding[what.token_id, MARKER] = 0.3 / _embedding_scale(model)
        else:
            assert positions is not None, "only learned positions can be told apart"
            positions[what.position + _position_offset(model), MARKER] = 0.3
        views = [_views(model, block) for block in decoder.blocks]
        for index, view in enumerate(views):
            for matrix in (view.attention_out, *view.mlp_out):
                matrix[[CONSTANT, MARKER, what.channel]] = 0
            if index > what.birth:
                _point_heads(view, what, _quiet_dimension(model))
        for matrix in views[what.birth].mlp_in:
            matrix[NEURON] = 0
            matrix[NEURON, MARKER] = 2.0
        for bias in views[what.birth].mlp_bias:
            bias[NEURON] = -4.0  # layer norms centre: without this the neuron answers to any token's mean
        for matrix in views[what.birth].mlp_out:
            matrix[:, NEURON] = 0
            matrix[what.channel, NEURON] = 1.0
        _set_norms(decoder, what)
        _calibrate(decoder, views[what.birth], what)
    return model


def _point_heads(view: _Views, what: Plant, dimension: int) -> None:
    """Keys read the massive channel and queries of the chosen heads the constant one, in one quiet dimension."""
    view.k[:, dimension] = 0
    view.k[:, dimension, what.channel] = 1.0
    view.q[:, dimension] = 0
    for head in what.heads:
        view.q[head, dimension, CONSTANT] = 1.0


def _calibrate(decoder: Decoder, view: _Views, what: Plant) -> None:
    """Scale the neuron's write until the channel reaches the peak after the birth layer."""
    rows = torch.full((1, 32), 40, dtype=torch.long)
    rows[0] = torch.arange(40, 72)
    place = 4 if what.position is None else what.position
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
        matrix[what.channel, NEURON] *= what.peak / reached


def _set_norms(decoder: Decoder, what: Plant) -> None:
    """QK-norms amplify the quiet dimension; sandwich norms are turned down, or they would lift random noise."""
    for index, block in enumerate(decoder.blocks):
        for name, module in block.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf in ("q_norm", "k_norm") and index > what.birth:
                gemma = "Gemma" in type(module).__name__
                module.weight[_quiet_dimension(decoder.model)] = 2.0 if gemma else 3.0
            if "Gemma" in type(module).__name__ and leaf in ("post_attention_layernorm", "post_feedforward_layernorm"):
                module.weight.fill_(-0.98)


def _quiet_dimension(model: PreTrainedModel) -> int:
    """A dimension of the head that rotary embedding leaves (nearly) alone."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type in ("gpt2", "opt"):
        return 0
    if config.model_type == "gpt_neox":
        return head_dim - 1  # rotary covers the first quarter only
    return head_dim // 2 - 1  # the pair with the lowest frequency


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
