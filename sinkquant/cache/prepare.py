"""Prepares a model for SinkCache: shows the cache what transformers hides from it (tokens, masks, hidden states), and
lets attention read packed blocks without a dense copy."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkquant.cache.bases import Bases, require_bases_of
from sinkquant.cache.cache import SinkCache
from sinkquant.cache.dispatch import dispatch_packed, reads_packed
from sinkquant.cache.prefix import Prefix, require_same_model
from sinkquant.cache.rotary import Rotary, rotary_of
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.models.inputs import let_through, switch_of


def prepare(model: PreTrainedModel, prefix: Prefix | None = None, bases: Bases | None = None,
            own: bool = False) -> PreTrainedModel:
    """Set hooks and attention of a model, once; further calls change nothing. Without a SinkCache it runs as before.

    Args:
        prefix: what rows that begin with its tokens start from, where a plan asks for it.
        bases: what keys and values are rotated by, where a plan asks for a rotation by covariance.
        own: both come from the checkpoint that the model was loaded from, whose embedding may have been rounded since
            they were made: they are not compared with it.

    Returns:
        the model itself.

    Raises:
        RequestError: the model does not dispatch its attention through transformers, the prefix or the bases were made
            by another model, or others were given before.
    """
    before = _given(model)
    if prefix is not None:
        if not own:
            require_same_model(prefix, model)
        let_through(model, prefix.ids)
    if bases is not None and not own:
        require_bases_of(bases, model)
    if before is not None:
        if prefix is not None and before.prefix not in (None, prefix):
            raise RequestError("this model was given another KV prefix before; load it anew.")
        if bases is not None and before.bases not in (None, bases):
            raise RequestError("this model was given other KV bases before; load it anew.")
        before.prefix = before.prefix if prefix is None else prefix
        before.bases = before.bases if bases is None else bases
        return model
    decoder = Decoder.of(model)
    model.register_forward_pre_hook(_BeforeForward(prefix, bases), with_kwargs=True)
    for index, block in enumerate(decoder.blocks):
        block.register_forward_hook(functools.partial(_after_block, index), with_kwargs=True)
    model.register_forward_hook(_after_forward, with_kwargs=True)
    dispatch_packed(model)
    return model


def given_prefix(model: PreTrainedModel) -> Prefix | None:
    """The prefix that a model was given, or None."""
    before = _given(model)
    return None if before is None else before.prefix


def _given(model: PreTrainedModel) -> _BeforeForward | None:
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _BeforeForward)), None)


class _BeforeForward:
    """Shows tokens and masks to the cache of a forward pass. It holds no model, so that it can be copied with one."""

    def __init__(self, prefix: Prefix | None, bases: Bases | None) -> None:
        self.prefix, self.bases = prefix, bases
        self.rotary: Rotary | None = None

    def __call__(self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = _find(args, kwargs)
        if cache is None:
            return
        ids = kwargs.get("input_ids", args[0] if args and isinstance(args[0], torch.Tensor) else None)
        tokens = ids if ids is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else None)
        if cache.plan.evict is not None and self.rotary is None:
            self.rotary = rotary_of(module)
        cache.see(ids, mask if isinstance(mask, torch.Tensor) else None, tokens.shape[:2], tokens.device,
                  reads_packed(module), self.prefix, self.rotary, self.bases)
        switch = switch_of(module)
        if switch is not None:
            switch.exact = cache.from_prefix


def _after_block(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _find(args, kwargs)
    if cache is not None:
        cache.hidden_states(index, output[0] if isinstance(output, tuple) else output)


def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _find(args, kwargs)
    if cache is not None:
        cache.passed()


def _find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> SinkCache | None:
    for value in (*kwargs.values(), *args):
        if isinstance(value, SinkCache):
            return value
    return None
