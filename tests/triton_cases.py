"""Runs the Triton kernel in Triton's interpreter on every case and prints its errors as JSON.

Run as a program with TRITON_INTERPRET=1: Triton looks at the variable when it is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from families import tiny_model
from kv_plans import kv_plan

from sinkquant.cache import attention
from sinkquant.cache.layer import SinkLayer
from sinkquant.cache.rotary import Rotary

BATCH, SCALE = 2, 0.2


@dataclass(frozen=True)
class Case:
    """One layer and the attention that is asked of it."""

    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 32
    value_dim: int = 32
    group: int = 32
    key_bits: int = 2
    value_bits: int = 2
    symmetric: bool = False
    scale_bits: int = 16
    rotate: bool = False
    columns: int = 230
    programs: int = 256
    window: int = 32
    exact: bool = True
    crop: int = 0
    evict: int | None = None
    mask: str = "none"
    softcap: float | None = None
    learned: bool = False
    dtype: torch.dtype = torch.float32
    large: float = 1.0
    """Factor of the queries."""


CASES = {
    "plain": Case(exact=False),
    "exact": Case(),
    "3 bits, a head that is no power of two": Case(key_bits=3, value_bits=3, key_dim=48, value_dim=96),
    "4 and 8 bits, groups of 64": Case(group=64, key_bits=4, value_bits=8, key_dim=64, value_dim=128, columns=300),
    "8 and 3 bits, groups of 128, symmetric": Case(group=128, key_bits=8, value_bits=3, value_dim=256, symmetric=True,
                                                   columns=420),
    "1 and 2 bits": Case(key_bits=1, value_bits=2),
    "scales of 8 bits": Case(scale_bits=8, group=64, key_dim=64, value_dim=128),
    "symmetric scales of 8 bits": Case(scale_bits=8, symmetric=True),
    "symmetric, rotated": Case(symmetric=True, rotate=True, key_dim=64, value_dim=16),
    "one KV head of many": Case(heads=13, kv_heads=1),
    "no groups, small heads": Case(heads=3, kv_heads=3, key_dim=8, value_dim=8),
    "padded rows": Case(mask="padded"),
    "a whole part masked": Case(mask="far"),
    "an added mask": Case(mask="added"),
    "a mask per head": Case(mask="per head"),
    "a mask for all rows": Case(mask="shared"),
    "a row that sees nothing": Case(mask="blind"),
    "softcap": Case(softcap=4.0, mask="padded"),
    "learned sink": Case(learned=True, softcap=30.0),
    "cut block": Case(crop=-100, mask="padded"),
    "dropped blocks": Case(evict=128, mask="padded", kv_heads=1),
    "one block": Case(columns=66, exact=False),
    "many blocks": Case(columns=420, kv_heads=1, programs=4),
    "large scores": Case(large=300.0),
    "bfloat16": Case(dtype=torch.bfloat16),
}


def _layer(case: Case, generator: torch.Generator) -> SinkLayer:
    plan = kv_plan(tiny_model("llama"), symmetric=case.symmetric, scale_bits=case.scale_bits, rotate=case.rotate,
                   exact="first-n", group_size=case.group, window=case.window, evict=case.evict)
    one = plan.layers[0].model_copy(update={
        "key_bits": [case.key_bits] * case.kv_heads, "value_bits": [case.value_bits] * case.kv_heads,
        "key_dim": case.key_dim, "value_dim": case.value_dim})
    layer = SinkLayer(plan.model_copy(update={"layers": [one]}), 0)

    layer.rotary = Rotary(torch.linspace(0.01, 1, case.key_dim // 2))

    def grow(columns: int) -> None:
        keys, values = (torch.randn(BATCH, case.kv_heads, columns, width, generator=generator) + 1
                        for width in (case.key_dim, case.value_dim))
        layer.append(keys.to(case.dtype), values.to(case.dtype))

    grow(case.columns - 1)
    if case.exact:
        flags = torch.zeros(BATCH, case.columns - 1, dtype=torch.bool)
        # Rows hold different numbers of exact tokens, and one has one in the window.
        flags[0, 3] = flags[1, 40] = flags[1, case.columns // 2 + 65] = flags[1, case.columns - 5] = True
        layer.peel(flags)
        # Were the packed copies read, outputs would differ much.
        layer.exact_keys *= 3
    layer.settle()
    if case.evict:
        # Rows that are dropped in step keep as many exact tokens each.
        assert layer.dropped
        assert layer.kept_of_dropped() == 1
    if case.crop:
        layer.crop(case.crop)
        grow(90)
        layer.settle()
        assert min(layer.lengths) < case.group
    grow(1)
    return layer


def _mask(kind: str, heads: int, columns: int, generator: torch.Generator) -> torch.Tensor | None:
    visible = torch.ones(BATCH, 1, 1, columns, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "far":
        visible[:, :, :, :-60] = False
    elif kind == "per head":
        visible = torch.rand(BATCH, heads, 1, columns, generator=generator) < 0.7
        visible[..., -1] = True
    elif kind == "blind":
        visible[1] = False
    else:
        visible[1, :, :, :37] = False
    if kind == "shared":
        return visible[1:]
    return torch.randn(visible.shape, generator=generator).where(visible, torch.finfo(torch.float32).min) \
        if kind == "added" else visible


def _reference(layer: SinkLayer, query: torch.Tensor, case: Case, mask: torch.Tensor | None,
               learned: torch.Tensor | None) -> torch.Tensor:
    keys, values = (states.double().repeat_interleave(case.heads // case.kv_heads, dim=1) for states in layer.dense())
    scores = query.double() @ keys.mT * SCALE
    if case.softcap is not None:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if learned is not None:
        scores = torch.cat([scores, learned.double().view(1, -1, 1, 1).expand(BATCH, -1, -1, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :values.shape[2]]
    return (weights @ values).transpose(1, 2)


def errors(case: Case) -> dict[str, Any]:
    """Largest differences from the float64 reference, of the kernel and of the PyTorch path, and the output's type."""
    # Imported here, because the tests take CASES from this file in a process without the interpreter.
    from sinkquant.cache import triton_decode

    triton_decode.PROGRAMS = case.programs
    generator = torch.Generator().manual_seed(0)
    layer = _layer(case, generator)
    query = (torch.randn(BATCH, case.heads, 1, case.key_dim, generator=generator) * case.large).to(case.dtype)
    mask = _mask(case.mask, case.heads, layer.dense()[0].shape[2], generator)
    learned = torch.randn(case.heads, generator=generator) + 1 if case.learned else None
    want = _reference(layer, query, case, mask, learned)
    given = (layer, query, mask, SCALE, case.softcap, learned)
    by_torch = attention.attend(*given)
    with mock.patch.object(attention, "kernel_reads", return_value=True):
        found = attention.attend(*given)
    return {"read": attention.kernel_reads(layer, torch.device("cuda"), 1, case.heads),
            "shape": list(found.shape), "same dtype": found.dtype == case.dtype,
            "finite": bool(torch.isfinite(found).all() and torch.isfinite(by_torch).all()),
            "kernel": float((found.double() - want)[want.isfinite()].abs().max()),
            "torch": float((by_torch.double() - want)[want.isfinite()].abs().max())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: errors(case) for name, case in CASES.items()}))
