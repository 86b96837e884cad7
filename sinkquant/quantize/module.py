"""One linear, or one projection of one expert: its decision is carried out, and the model holds the result."""

from __future__ import annotations

import torch

from sinkquant.artifacts import Calibration, ModuleDecision, Plan
from sinkquant.artifacts.plan import CALIBRATED
from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.quantize.backend import BackendWeight, rounds_itself
from sinkquant.quantize.block import QuantizedBlock
from sinkquant.quantize.fp8 import FP8
from sinkquant.quantize.gptq import GPTQ
from sinkquant.quantize.hessian import Hessian
from sinkquant.quantize.packed import PackedWeight, row_chunks
from sinkquant.quantize.pruning import Pruned, prune, still_pruned, unheard
from sinkquant.quantize.rtn import RTN
from sinkquant.quantize.split import Solve, Split
from sinkquant.schemes.tensors import expert_scale_dtype, scale_dtype

TOGETHER = 1 << 24
"""Weights whose error is taken in one product with the Hessian."""


def quantize_module(decoder: Decoder, name: str, decision: ModuleDecision, plan: Plan, made: QuantizedBlock,
                    seen: Hessian | None) -> None:
    """Prune and quantize one module as a plan decides, and note the result in `made`.

    Args:
        seen: the Hessian of its inputs, or None where no rows walk.

    Raises:
        RequestError: the plan asks for what does not go together, or no token reached a module that needs some.
        SinkquantError: the Hessian cannot be inverted.
    """
    weight = decoder.weight(name)
    kind = expert_scale_dtype if name in decoder.experts else scale_dtype
    scales = getattr(torch, kind(str(decoder.model.dtype).removeprefix("torch.")))
    settings = plan.calibration
    silent = made.silent.get(name)
    if seen is not None and silent is not None:
        unheard(seen, silent)
    hessian = None if seen is None else seen.mean()
    # GPTQ takes the zeros alone, and comes back to the other weights itself.
    passes = 0 if decision.method in CALIBRATED else settings.descent
    pruned = None if decision.prune is None else prune(weight, decision.prune, hessian, settings.damping, passes, name)
    if silent is not None:
        pruned = still_pruned(pruned, weight, silent)
    if pruned is not None:
        if decision.form.split:
            raise RequestError(f"the plan both prunes and splits {name}; it can do one of the two.")
        made.kept[name] = pruned.kept
        if decision.bits >= 16:
            _put_dense(decoder, name, pruned.weight, made, hessian)
            return
    if rounds_itself(decision.form):
        whole = (weight if pruned is None else pruned.weight).to(decoder.model.dtype)
        put_packed(decoder, name, BackendWeight.of(whole, decision.form), made, weight, hessian)
        return
    if decision.storage == "gptq":
        scales = torch.float16  # whatever the model's dtype is
    if decision.method in CALIBRATED and hessian is None:
        raise RequestError(f"no calibration token reached {name}; give more text, or set its method to rtn.")
    cross = seen.cross() if seen is not None and decision.method == "gptaq" else None
    solve = _method(decision, settings, scales, name, pruned)
    if decision.form.split:
        packed = Split.of(decision, settings, scales).quantize(weight, hessian, solve, cross, name)
    else:
        packed = solve(weight, hessian, cross)
    put_packed(decoder, name, packed, made, weight, hessian)


def put_packed(decoder: Decoder, name: str, packed: PackedWeight | BackendWeight, made: QuantizedBlock,
               weight: torch.Tensor, hessian: torch.Tensor | None) -> None:
    """Let a module hold a packed weight in place of `weight`."""
    # What the checkpoint will give: rounded to the model's own dtype, whatever the walk computes in.
    new = packed.dequantized(decoder.model.dtype).to(weight.dtype)
    made.losses[name] = relative_error(weight, new, hessian)
    decoder.put(name, new)
    made.weights[name] = packed.cpu()


def relative_error(weight: torch.Tensor, new: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """trace(dW H dW^T) / trace(W H W^T); H is the identity where none was taken."""
    metric = None if hessian is None else hessian.float()
    error, total = 0.0, 0.0
    # Few rows would read the whole Hessian for little work.
    for rows in row_chunks(weight) if metric is None else row_chunks(weight, TOGETHER):
        before = weight[rows].float()
        error += _norm(new[rows].float() - before, metric)
        total += _norm(before, metric)
    return error / max(total, 1e-30)


def _method(decision: ModuleDecision, settings: Calibration, scales: torch.dtype, name: str,
            pruned: Pruned | None) -> Solve:
    """The decision's method as a function of weight, Hessian and cross. `pruned`: what of the weight is zero."""
    assert decision.group_size is not None
    if decision.method in CALIBRATED:
        gptq = GPTQ(decision.bits, decision.group_size, settings.damping, settings.act_order, scales,
                    settings.scale_search, passes=settings.descent)

        def solve(weight: torch.Tensor, hessian: torch.Tensor | None, cross: torch.Tensor | None) -> PackedWeight:
            assert hessian is not None
            return gptq.quantize(weight, hessian, name, cross, None if pruned is None else pruned.kept)

        return solve
    nearest = (FP8(scales, settings.scale_search) if decision.kind == "float"
               else RTN(decision.bits, decision.group_size, scales, settings.scale_search))
    return lambda weight, hessian, _: nearest.quantize(weight if pruned is None else pruned.weight,
                                                       None if hessian is None else hessian.diagonal())


def _put_dense(decoder: Decoder, name: str, new: torch.Tensor, made: QuantizedBlock,
               hessian: torch.Tensor | None) -> None:
    """Let a module that stays in 16 bits hold another weight, [rows, columns]."""
    weight = decoder.weight(name)
    stored = new.to(decoder.model.dtype)  # what the checkpoint will hold, whatever the walk computes in
    made.losses[name] = relative_error(weight, stored.to(weight.dtype), hessian)
    weight.copy_(stored)
    if name in decoder.experts:
        return  # `keep_dense` takes the fused parameter, once it is done
    parameter = decoder.linears[name].weight
    assert isinstance(parameter, torch.Tensor)
    made.dense[f"{name}.weight"] = parameter.data.to("cpu", decoder.model.dtype)


def _norm(part: torch.Tensor, metric: torch.Tensor | None) -> float:
    """trace(X H X^T) of some rows."""
    return float(((part if metric is None else part @ metric) * part).sum(dtype=torch.float64))
