"""Plan -> weights: one walk over the model, block by block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import ModuleDecision, Plan
from sinkquant.artifacts.sizes import module_bytes, scale_dtype
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, Step, Walk, check_finite, pick_device, read_text, token_rows
from sinkquant.quantize.gptq import GPTQ
from sinkquant.quantize.hessian import collected, token_weights
from sinkquant.quantize.packed import PackedWeight
from sinkquant.quantize.rtn import RTN
from sinkquant.quantize.state import ATTRIBUTE, QuantizedState, is_quantized

Progress = Callable[[int, int, str], None]


def quantize(model: PreTrainedModel, plan: Plan, tokenizer: PreTrainedTokenizerBase | None = None,
             device: str = "auto", dtype: str = "float32", progress: Progress | None = None) -> PreTrainedModel:
    """Carry out a plan: the weights of `model` become, in place, what the saved checkpoint will give.

    A plan without GPTQ needs neither text nor tokenizer. With it, the calibration rows walk through the model once:
    the Hessians of a block are taken with all earlier blocks quantized. If this fails in the middle, blocks that were
    done stay quantized; load the model again.

    Returns:
        the model, which now carries what `save` needs.

    Raises:
        RequestError: the plan does not fit this model, or it is quantized already.
        SinkquantError: a Hessian cannot be inverted.
    """
    decoder = Decoder.of(model)
    check(decoder, plan)
    check_finite(model)
    state = QuantizedState(plan)
    todo = {name: decision for name, decision in plan.modules.items() if decision.bits < 16}
    store = getattr(torch, scale_dtype(str(model.dtype).removeprefix("torch.")))
    if any(decision.method == "gptq" for decision in todo.values()):
        _calibrated(decoder, plan, tokenizer, todo, state, store, pick_device(device), getattr(torch, dtype), progress)
    else:
        for done, (name, decision) in enumerate(todo.items()):
            _quantize_one(decoder.linears[name], name, decision, plan, state, store, None)
            if progress:
                progress(done + 1, len(todo), "rounding")
    setattr(model, ATTRIBUTE, state)
    return model


def check(decoder: Decoder, plan: Plan) -> None:
    """Refuse a plan that does not fit a model, before anything is computed.

    Raises:
        RequestError: modules or sizes of another model, a module that is no nn.Linear, a group size that does not
            divide, fused modules in several formats, a model that is quantized already.
    """
    if is_quantized(decoder.model):
        raise RequestError("this model is quantized already; start from the unquantized one.")
    shape = decoder.shape("")
    missing = [name for name in shape.linears if name not in plan.modules]
    if missing:
        raise RequestError(f"the plan is of another model: it says nothing of {missing[0]}; make one for this model.")
    for name, decision in plan.modules.items():
        if decision.bits >= 16:
            continue
        module = decoder.linears.get(name)
        if not isinstance(module, nn.Linear):
            raise RequestError(f"the plan quantizes {name}, which is no nn.Linear of this model; make a plan for it.")
        if decision.group_size is None or (decision.group_size != -1 and module.in_features % decision.group_size):
            raise RequestError(f"group size {decision.group_size} does not divide the {module.in_features} input "
                               f"columns of {name}.")
        if decision.bytes != module_bytes(shape, name, decision.bits, decision.group_size):
            raise RequestError(f"the plan was made for another size of {name}; make a plan for this model.")
        for other in shape.linears[name].fused_with:
            twin = plan.modules.get(other)
            if twin is None or (twin.bits, twin.group_size) != (decision.bits, decision.group_size):
                raise RequestError(f"{name} and {other} are fused by engines and must share bits and group size.")


def _calibrated(decoder: Decoder, plan: Plan, tokenizer: PreTrainedTokenizerBase | None,
                todo: dict[str, ModuleDecision], state: QuantizedState, store: torch.dtype, device: str,
                dtype: torch.dtype, progress: Progress | None) -> None:
    if tokenizer is None:
        raise RequestError("the plan uses gptq, which needs calibration rows; hand over the tokenizer.")
    settings = plan.calibration
    rows = token_rows(tokenizer, read_text(settings.text, "calibration"), settings.rows,
                      min(settings.length, decoder.max_length), settings.bos, decoder.vocabulary)
    weights = token_weights(rows, settings.sinks)
    shape = decoder.shape("")
    walk = Walk(decoder, rows, settings.batch_size, device, dtype)
    for step in walk.steps():
        mine = {name: decision for name, decision in todo.items() if name.startswith(step.name + ".")}
        # Fused modules read one input: its Hessian is collected once.
        source = {name: shape.linears[name].fused_with[0] for name in mine}
        readers = {source[name]: decoder.linears[source[name]]
                   for name, decision in mine.items() if decision.method == "gptq"}
        if readers:
            with collected(step, readers, weights) as hessians:
                step.run()
            means = {name: hessian.mean() for name, hessian in hessians.items()}
            for name, decision in mine.items():
                _quantize_one(decoder.linears[name], name, decision, plan, state, store, means.get(source[name]))
        else:
            for name, decision in mine.items():
                _quantize_one(decoder.linears[name], name, decision, plan, state, store, None)
        if mine:
            _replay(step)
        if progress:
            progress(step.index + 1, len(decoder.blocks), "quantizing blocks")


def _replay(step: Step) -> None:
    """The next block must see what this one gives now."""
    step.run()


def _quantize_one(module: nn.Module, name: str, decision: ModuleDecision, plan: Plan, state: QuantizedState,
                  store: torch.dtype, hessian: torch.Tensor | None) -> None:
    weight = module.weight.data
    assert isinstance(weight, torch.Tensor)
    assert decision.group_size is not None
    if decision.method == "gptq":
        if hessian is None:
            raise RequestError(f"no calibration token reached {name}; give more text, or set its method to rtn.")
        packed = GPTQ(decision.bits, decision.group_size, plan.calibration.damping, plan.calibration.act_order,
                      store).quantize(weight, hessian, name)
    else:
        packed = RTN(decision.bits, decision.group_size, store).quantize(weight)
    new = packed.dequantized(torch.float32)
    state.losses[name] = relative_error(weight.float(), new, hessian)
    module.weight.data = new.to(weight.dtype)
    state.weights[name] = PackedWeight(packed.codes.cpu(), packed.scale.cpu(), packed.bits)


def relative_error(weight: torch.Tensor, new: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """trace(dW H dW^T) / trace(W H W^T); H is the identity where none was taken."""
    difference = (new - weight).double()
    original = weight.double()
    if hessian is None:
        return float(difference.square().sum() / original.square().sum().clamp(min=1e-30))
    return float(((difference @ hessian) * difference).sum() / ((original @ hessian) * original).sum().clamp(min=1e-30))
