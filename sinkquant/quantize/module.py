"""One linear, or one projection of one expert: its decision is carried out, and the model holds the result."""

from __future__ import annotations

import torch

from sinkquant.artifacts import ModuleDecision, Plan
from sinkquant.errors import RequestError
from sinkquant.methods import Problem, method_named
from sinkquant.models import Decoder
from sinkquant.quantize.block import QuantizedBlock
from sinkquant.quantize.hessian import Hessian
from sinkquant.quantize.pruning import prune, still_pruned, unheard
from sinkquant.quantize.split import solve_beside
from sinkquant.schemes import scheme_of
from sinkquant.schemes.codecs import StoredWeight, library_codec, row_chunks

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
    settings = plan.calibration
    silent = made.silent.get(name)
    if seen is not None and silent is not None:
        unheard(seen, silent)
    hessian = None if seen is None else seen.mean()
    method = None if decision.bits >= 16 else method_named(decision.method)
    # A method with a Hessian comes back to the weights that are left by itself.
    passes = 0 if method is not None and method.needs_hessian else settings.descent
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
    if (library := library_codec(decision.form)) is not None:
        whole = (weight if pruned is None else pruned.weight).to(decoder.model.dtype)
        put_packed(decoder, name, library.rounded(whole, decision.form), made, weight, hessian)
        return
    assert method is not None
    if method.needs_hessian and hessian is None:
        raise RequestError(f"no calibration token reached {name}; give more text, or set its method to rtn.")
    cross = seen.cross() if seen is not None and method.needs_unquantized_inputs else None
    start = weight if pruned is None or method.needs_hessian else pruned.weight
    scales = scheme_of(decision.form).scales(str(decoder.model.dtype).removeprefix("torch."), name in decoder.experts)
    problem = Problem(name, decision.form, start, getattr(torch, scales), settings, hessian, cross,
                      None if pruned is None else pruned.kept, made.fused_scales.get(name))
    if decision.form.split:
        packed = solve_beside(method, problem, decision.columns, decision.scalars)
    else:
        packed = method.solve(problem)
    put_packed(decoder, name, packed, made, weight, hessian)


def put_packed(decoder: Decoder, name: str, packed: StoredWeight, made: QuantizedBlock,
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
