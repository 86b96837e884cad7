"""Linears, or projections of one expert, that read one input: their decisions are carried out, and the model holds the
results."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sinkquant.artifacts import ModelShape, ModuleDecision, Plan
from sinkquant.errors import RequestError
from sinkquant.methods import Problem, method_named, need_hessian
from sinkquant.models import Decoder
from sinkquant.quantize.block import QuantizedBlock
from sinkquant.quantize.hessian import Hessian
from sinkquant.quantize.pruning import Pruned, prune, still_pruned, unheard
from sinkquant.quantize.split import solve_beside
from sinkquant.schemes import WeightFormat, scheme_of
from sinkquant.schemes.codecs import StoredWeight, codec_of, library_codec, row_chunks

TOGETHER = 1 << 24
"""Weights whose error is taken in one product with the Hessian."""


def quantize_modules(decoder: Decoder, decisions: Mapping[str, ModuleDecision], plan: Plan, made: QuantizedBlock,
                     seen: Hessian | None) -> None:
    """Prune and quantize modules that read one input as a plan decides, and note the results in `made`.

    Args:
        decisions: module name -> decision. seen: the Hessian of their input, or None where no rows walk.

    Raises:
        RequestError: the plan asks for what does not go together, or no token reached a module that needs some.
        SinkquantError: the Hessian cannot be inverted.
    """
    for name in decisions:
        if seen is not None and name in made.silent:
            unheard(seen, made.silent[name])
    hessian = seen.mean() if seen is not None and decisions else None
    together: dict[tuple[str, WeightFormat, float | None], list[Problem]] = {}
    for name, decision in decisions.items():
        pruned = _pruned(decoder, name, decision, plan, made, hessian)
        if decision.bits >= 16:
            if pruned is not None:
                _put_dense(decoder, name, pruned.weight, made, hessian)
        elif (library := library_codec(decision.form)) is not None:
            weight = decoder.weight(name)
            whole = (weight if pruned is None else pruned.weight).to(decoder.model.dtype)
            put_packed(decoder, name, library.rounded(whole, decision.form), made, weight, hessian)
        else:
            problem = _problem(decoder, name, decision, plan, made, pruned, seen, hessian)
            if decision.form.split:
                packed = solve_beside(method_named(decision.method), problem, decision.columns, decision.scalars)
                put_packed(decoder, name, packed, made, decoder.weight(name), hessian)
            else:
                scale = None if problem.fused_scale is None else float(problem.fused_scale)
                together.setdefault((decision.method, decision.form, scale), []).append(problem)
    for (method, _, _), problems in together.items():
        for problem, packed in zip(problems, method_named(method).solve_together(problems), strict=True):
            put_packed(decoder, problem.name, packed, made, decoder.weight(problem.name), hessian)


def _pruned(decoder: Decoder, name: str, decision: ModuleDecision, plan: Plan, made: QuantizedBlock,
            hessian: torch.Tensor | None) -> Pruned | None:
    """What pruning and silenced heads leave of a module, noted in `made`; None where all of it stays."""
    weight, settings, silent = decoder.weight(name), plan.calibration, made.silent.get(name)
    # A method with a Hessian comes back to the weights that are left by itself.
    passes = 0 if need_hessian([decision.method]) else settings.descent
    pruned = None if decision.prune is None else prune(weight, decision.prune, hessian, settings.damping, passes, name)
    if silent is not None:
        pruned = still_pruned(pruned, weight, silent)
    if pruned is not None:
        made.kept[name] = pruned.kept
    return pruned


def _problem(decoder: Decoder, name: str, decision: ModuleDecision, plan: Plan, made: QuantizedBlock,
             pruned: Pruned | None, seen: Hessian | None, hessian: torch.Tensor | None) -> Problem:
    method, weight = method_named(decision.method), decoder.weight(name)
    if method.needs_hessian and hessian is None:
        raise RequestError(f"no calibration token reached {name}; give more text, or set its method to rtn.")
    cross = seen.cross() if seen is not None and method.needs_unquantized_inputs else None
    start = weight if pruned is None or method.needs_hessian else pruned.weight
    scales = scheme_of(decision.form).scales(decoder.dtype_name, name in decoder.experts)
    return Problem(name, decision.form, start, getattr(torch, scales), plan.calibration, hessian, cross,
                   None if pruned is None else pruned.kept, made.fused_scales.get(name))


def put_packed(decoder: Decoder, name: str, packed: StoredWeight, made: QuantizedBlock,
               weight: torch.Tensor, hessian: torch.Tensor | None) -> None:
    """Let a module hold a packed weight in place of `weight`."""
    # What the checkpoint will give: rounded to the model's own dtype, whatever the walk computes in.
    new = packed.dequantized(decoder.model.dtype).to(weight.dtype)
    made.losses[name] = relative_error(weight, new, hessian)
    decoder.put(name, new)
    made.weights[name] = packed.to("cpu")


def relative_error(weight: torch.Tensor, new: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """trace(dW H dW^T) / trace(W H W^T); H is the identity where none was taken."""
    metric = None if hessian is None else hessian.float()
    error, total = 0.0, 0.0
    # Few rows would read the whole Hessian for little work.
    for rows in row_chunks(weight) if metric is None else row_chunks(weight, TOGETHER):
        before = weight[rows].float()
        error += square_norm(new[rows].float() - before, metric)
        total += square_norm(before, metric)
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


def square_norm(part: torch.Tensor, metric: torch.Tensor | None) -> float:
    """trace(X H X^T) of some rows."""
    return float(((part if metric is None else part @ metric) * part).sum(dtype=torch.float64))


def fused_scales(decoder: Decoder, todo: Mapping[str, ModuleDecision],
                 shape: ModelShape | None) -> dict[str, torch.Tensor]:
    """Module name -> the scale of the whole tensor, float32 [1], in formats that have one.

    To be taken before any of the linears is changed. Experts share nothing: engines do not fuse one with another.

    Args:
        todo: name -> decision of linears of one block, with all that are fused with them.
        shape: of the model; None where all of these are experts.
    """
    concerned = [name for name, decision in todo.items() if decision.bits < 16 and scheme_of(decision.form).fused_scale]
    found: dict[str, torch.Tensor] = {}
    for name in concerned:
        if name not in found:
            members = ([name] if shape is None or name in decoder.experts else
                       shape.linears[name].fused_with or [name])
            scale = codec_of(todo[name].form).fused_scale([decoder.weight(member) for member in members])
            found |= dict.fromkeys(members, scale)
    return found
