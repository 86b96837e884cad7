"""Scales that linears which engines fuse have in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sinkquant.artifacts import ModuleDecision
from sinkquant.models import Decoder
from sinkquant.schemes import scheme_of
from sinkquant.schemes.codecs import codec_of


def fused_scales(decoder: Decoder, todo: Mapping[str, ModuleDecision]) -> dict[str, torch.Tensor]:
    """Module name -> the scale of the whole tensor, float32 [1], in formats that have one.

    To be taken before any of the linears is changed. Experts share nothing: engines do not fuse one with another.

    Args:
        todo: name -> decision of linears of one block, with all that are fused with them.
    """
    concerned = [name for name, decision in todo.items() if decision.bits < 16 and scheme_of(decision.form).fused_scale]
    if not concerned:
        return {}
    fused = {name: linear.fused_with for name, linear in decoder.shape("").linears.items()}
    found: dict[str, torch.Tensor] = {}
    for name in concerned:
        if name not in found:
            members = [name] if name in decoder.experts else fused[name] or [name]
            scale = codec_of(todo[name].form).fused_scale([decoder.weight(member) for member in members])
            found |= dict.fromkeys(members, scale)
    return found
