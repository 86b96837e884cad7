"""One observer of attention, for every decoder whose attention goes through transformers' attention interface.

While the context manager `observed_attention` is open, a function of ours computes the attention of every layer and
hands an `AttentionRecord` to the observers. The softmax is computed for a chunk of queries at a time and only its
column sums are kept, so that no length x length matrix ever exists. Grouped queries, masks of any kind (causal,
sliding, chunked), soft-capping and learned sinks are handled here, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from sinkquant.errors import RequestError

QUERY_CHUNK = 128


@dataclass(frozen=True)
class AttentionRecord:
    """The attention of one layer on one batch.

    Attributes:
        layer: index of the layer.
        query: [batch, heads, length, head_dim], after rotary embedding.
        key, value: [batch, kv_heads, length, head_dim].
        received: [batch, heads, length] float32, the sum over queries of the softmax column of every position.
        learned: [batch, heads] float32, the same sum for the learned sink column, zeros where there is none.
        visible: [length] number of queries that may see each position.
        uniform: [length] float32, what `received` would be if every query spread its attention evenly: the null.
        output: [batch, heads, length, head_dim], attention-weighted values before the output projection.
        scale: what query . key is multiplied by. softcap: scores become softcap * tanh(score / softcap); None: they do
            not.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    received: torch.Tensor
    learned: torch.Tensor
    visible: torch.Tensor
    uniform: torch.Tensor
    output: torch.Tensor
    has_learned_sink: bool
    scale: float
    softcap: float | None = None


@dataclass(frozen=True)
class AttentionRows:
    """A few rows of the attention matrices of one layer on one batch.

    Attributes:
        layer: index of the layer. start: the first query.
        probabilities: [batch, heads, queries, length] float32; what a row lacks of 1 is on the learned sink column.
        allowed: bool [queries, length], what each query may see.
    """

    layer: int
    start: int
    probabilities: torch.Tensor
    allowed: torch.Tensor


class AttentionObserver(Protocol):
    """What wants to see attention."""

    def attention(self, record: AttentionRecord) -> None:
        """Called once for every layer and batch."""


@runtime_checkable
class RowObserver(AttentionObserver, Protocol):
    """An observer that wants the rows of the attention matrix too, and keeps less than it sees."""

    def attention_rows(self, rows: AttentionRows) -> None:
        """Called for every chunk of queries, before `attention` is called for the layer and batch."""


@contextlib.contextmanager
def observed_attention(model: PreTrainedModel, observers: Sequence[AttentionObserver] = ()) -> Iterator[None]:
    """Run `model`'s attention through our function while the context is open.

    Raises:
        RequestError: the model does not dispatch its attention through transformers' attention interface.
    """
    require_attention_interface(model)

    def function(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 attention_mask: torch.Tensor | None, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return _attend(observers, module, query, key, value, attention_mask, **kwargs), None

    name = f"sinkquant_{id(observers)}_{id(model)}"
    before = [(config, config._attn_implementation) for config in _configs(model)]
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)
        for config, own in before:  # one by one: towers beside the text part have others, or take no other
            config._attn_implementation_internal = own


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations of a model and of all its parts, each once."""
    found: dict[int, PreTrainedConfig] = {}
    todo = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while todo:
        config = todo.pop()
        found[id(config)] = config
        todo += [part for key in config.sub_configs if (part := getattr(config, key, None)) is not None]
    return list(found.values())


def keys_picked(module: nn.Module) -> int | None:
    """How many keys every query of an attention module sees at most, where an indexer picks them (DeepSeek 3.2's sparse
    attention, MiniMax M3's blocks); None where a query sees all."""
    indexer: Any = getattr(module, "indexer", None)
    if hasattr(indexer, "topk_blocks"):
        return int(indexer.topk_blocks * indexer.block_size)
    picked = getattr(indexer, "index_topk", None)
    return None if picked is None else int(picked)


def require_attention_interface(model: PreTrainedModel) -> None:
    """Refuse models whose attention cannot be observed, by name.

    Raises:
        RequestError: the architecture has no attention, or its own that transformers does not dispatch.
    """
    # Not the flag alone: Qwen3-Next, StableLM and all hybrids of Mamba and attention dispatch without announcing it.
    if not (getattr(model, "_supports_attention_backend", False) or model._can_set_attn_implementation()):
        raise RequestError(
            f"{type(model).__name__} is not supported: it does not dispatch its attention through transformers' "
            "attention interface, so its sinks cannot be seen.")


def _attend(observers: Sequence[AttentionObserver], module: nn.Module, query: torch.Tensor, key: torch.Tensor,
            value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None = None,
            dropout: float = 0.0, softcap: float | None = None, s_aux: torch.Tensor | None = None,
            is_causal: bool | None = None, position_bias: torch.Tensor | None = None,
            **_: Any) -> torch.Tensor:
    """Scaled-dot-product attention, [batch, length, heads, head_dim]; reports column sums to the observers."""
    if position_bias is not None:
        raise RequestError(f"{type(module).__name__} is not supported: it adds a position bias of its own.")
    if key.shape[2] != query.shape[2]:
        raise RequestError("attention is observed on whole rows only, without a KV cache.")
    batch, heads, length, _dim = query.shape
    picked = keys_picked(module)
    if picked is not None and length > picked:
        raise RequestError(f"{type(module).__name__} picks {picked} keys for every query of a longer row, which is not "
                           f"observed; use rows of at most {picked} tokens (detect.long_length, calibration.length).")
    groups = heads // key.shape[1]
    keys = key.repeat_interleave(groups, dim=1) if groups > 1 else key
    values = value.repeat_interleave(groups, dim=1) if groups > 1 else value
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not observers and softcap is None and s_aux is None:
        out = nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale, is_causal=mask is None and causal and length > 1)
        return out.transpose(1, 2).contiguous()

    row_observers = [observer for observer in observers if isinstance(observer, RowObserver)]
    layer = int(getattr(module, "layer_idx", 0) or 0)
    received = torch.zeros(batch, heads, length, dtype=torch.float32, device=query.device)
    learned = torch.zeros(batch, heads, dtype=torch.float32, device=query.device)
    visible = torch.zeros(length, dtype=torch.long, device=query.device)
    uniform = torch.zeros(length, dtype=torch.float32, device=query.device)
    output = torch.empty(batch, heads, length, values.shape[-1], dtype=query.dtype, device=query.device)
    column = torch.arange(length, device=query.device)
    for start in range(0, length, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, length)
        # Keys that no query of the chunk sees are left out; observers of rows get zeros for them.
        ahead = not causal if mask is None else _allowed(mask, start, stop, column, causal)[..., stop:].any()
        reach = length if ahead else stop
        logits = (query[:, :, start:stop] @ keys[:, :, :reach].mT).float().mul_(scale)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        allowed = _allowed(mask, start, stop, column[:reach], causal)
        if mask is not None and mask.dtype != torch.bool:
            logits += mask[:, :, start:stop, :reach].float()
        logits.masked_fill_(~allowed, float("-inf"))
        if s_aux is not None:
            column_logits = s_aux.float().reshape(1, -1, 1, 1).expand(batch, heads, stop - start, 1)
            probabilities = torch.softmax(torch.cat([logits, column_logits], dim=-1), dim=-1)
            learned += probabilities[..., -1].sum(-1)
            probabilities = probabilities[..., :-1]
        else:
            probabilities = torch.softmax(logits, dim=-1)
        received[:, :, :reach] += probabilities.sum(dim=2)
        visible[:reach] += allowed[0, 0].sum(0)
        uniform[:reach] += (allowed[0, 0] / allowed[0, 0].sum(-1, keepdim=True).clamp(min=1)).sum(0)
        if row_observers:
            rows = AttentionRows(layer, start, nn.functional.pad(probabilities, (0, length - reach)),
                                 nn.functional.pad(allowed[0, 0], (0, length - reach)))
            for row_observer in row_observers:
                row_observer.attention_rows(rows)
        output[:, :, start:stop] = (probabilities.to(values.dtype) @ values[:, :, :reach]).to(output.dtype)
    for observer in observers:
        observer.attention(AttentionRecord(
            layer=layer, query=query, key=key, value=value, received=received,
            learned=learned, visible=visible, uniform=uniform, output=output, has_learned_sink=s_aux is not None,
            scale=float(scale), softcap=softcap))
    return output.transpose(1, 2).contiguous()


def _allowed(mask: torch.Tensor | None, start: int, stop: int, column: torch.Tensor, causal: bool) -> torch.Tensor:
    """Which columns the queries start..stop may see: bool [batch or 1, heads or 1, stop - start, length]."""
    if mask is None:
        rows = torch.arange(start, stop, device=column.device)
        seen = column[None, :] <= rows[:, None] if causal else torch.ones_like(rows[:, None] + column[None, :]).bool()
        return seen[None, None]
    part = mask[:, :, start:stop, : len(column)]
    return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
