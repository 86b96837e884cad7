"""Plan -> weights: one walk over the model, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Calibration, ModuleDecision, Plan
from sinkquant.artifacts.distill import check_distill
from sinkquant.artifacts.experts import TUNE_AND_EXPERTS, mixed_experts
from sinkquant.artifacts.plan import CALIBRATED
from sinkquant.artifacts.sizes import expert_scale_dtype, module_bytes, scale_dtype
from sinkquant.errors import RequestError
from sinkquant.models import (
    ActivationStore,
    Decoder,
    Step,
    Walk,
    check_finite,
    pick_device,
    weight_matrix,
)
from sinkquant.models.inputs import inputs_left_alone
from sinkquant.quantize.backend import BackendWeight, install_modules, require_packages, rounds_itself
from sinkquant.quantize.end_to_end import Start, distilled, lesson_of
from sinkquant.quantize.experts import Routed, record
from sinkquant.quantize.fp8 import FP8
from sinkquant.quantize.gptq import GPTQ
from sinkquant.quantize.hessian import Hessian, collect
from sinkquant.quantize.inputs import get_ready, put, round_block
from sinkquant.quantize.offsets import leanings
from sinkquant.quantize.packed import PackedWeight, row_chunks
from sinkquant.quantize.pruning import Pruned, check_heads, check_pruning, prune, silence, still_pruned, unheard
from sinkquant.quantize.ranks import add_up, hand_over, solver, this_rank
from sinkquant.quantize.rows import calibration_rows
from sinkquant.quantize.rtn import RTN
from sinkquant.quantize.split import Solve, Split
from sinkquant.quantize.state import ATTRIBUTE, QuantizedState, is_quantized
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.quantize.transforms import require_equivalent, rotate, scale_block
from sinkquant.quantize.tune import Tune

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class QuantizedBlock:
    """What `quantized_blocks` did to one block.

    Attributes:
        weights: module name -> packed weight. losses: module name -> relative error that it was left with.
        dense: parameter name -> its new values in the model's dtype, for what was changed and stays in 16 bits.
        kept: module name -> bool [rows, columns], the weights that pruning has left; others are zero.
        silent: output projection -> bool [columns], the input columns of heads that were taken out.
        input_scales: module name -> stored scale of its inputs, [1], where it has one.
        tokens: module name of a layer's experts -> calibration tokens that went to each of them.
        leanings: module name -> where its weights lie beside their codes, where the whole model is tuned in the end.
    """

    index: int
    name: str
    weights: dict[str, PackedWeight | BackendWeight]
    losses: dict[str, float]
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    silent: dict[str, torch.Tensor] = field(default_factory=dict)
    input_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    leanings: dict[str, torch.Tensor] = field(default_factory=dict)


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
    rotate(decoder, plan)
    state = QuantizedState(plan)
    place, kind = pick_device(device), getattr(torch, dtype)
    lesson = lesson_of(decoder, plan, tokenizer, place, kind)
    starts: dict[str, Start] = {}
    for block in quantized_blocks(decoder, plan, tokenizer, place, kind, progress):
        state.weights |= block.weights
        state.losses |= block.losses
        state.input_scales |= block.input_scales
        state.tokens |= block.tokens
        codes = _ours(block.weights)
        starts |= {name: Start(codes[name], lean) for name, lean in block.leanings.items()}
    if lesson is not None:
        state.weights |= distilled(decoder, plan, lesson, starts, place, kind, progress)
    install_modules(model, {name: w for name, w in state.weights.items() if isinstance(w, BackendWeight)})
    setattr(model, ATTRIBUTE, state)
    return model


def quantized_blocks(decoder: Decoder, plan: Plan, tokenizer: PreTrainedTokenizerBase | None, device: str,
                     dtype: torch.dtype, progress: Progress | None = None, store: ActivationStore | None = None,
                     done: int = 0, input_scales: Mapping[str, torch.Tensor] | None = None) -> Iterator[QuantizedBlock]:
    """Carry out a plan block by block; each is yielded while its weights, dense and quantized, are in memory.

    Args:
        device, dtype: where Hessians and GPTQ are computed, and in which precision rows walk.
        store: where the hidden states of the calibration rows live.
        done: so many blocks are quantized already: rows walk through them as they are, and nothing is yielded.
        input_scales: the stored scales of the inputs of these.

    Raises:
        RequestError: GPTQ without a tokenizer, or with too little text.
        SinkquantError: a Hessian cannot be inverted.
    """
    changed = set(plan.changed)
    todo = {name: decision for name, decision in plan.modules.items() if decision.bits < 16 or name in changed}
    get_ready(decoder, plan, done, input_scales or {})
    if plan.needs_rows:
        blocks = _calibrated(decoder, plan, tokenizer, todo, device, dtype, store, done)
    else:
        blocks = _rounded(decoder, plan, todo, done)
    for block in blocks:
        yield block
        if progress:
            progress(block.index + 1, len(decoder.blocks), "quantizing blocks")


def check(decoder: Decoder, plan: Plan) -> None:
    """Refuse a plan that does not fit a model, before anything is computed.

    Raises:
        RequestError: modules or sizes of another model, a module that is no linear, a group size that does not
            divide, fused modules in several formats, a model that is quantized already.
    """
    if is_quantized(decoder.model):
        raise RequestError("this model is quantized already; start from the unquantized one.")
    require_packages(plan.backend)
    if plan.needs_rows and this_rank()[1] > 1 and any(rounds_itself(form) for form in plan.formats.values()):
        raise RequestError(f"weights that {plan.backend} rounds are not shared among processes; run it in one.")
    shape = decoder.shape("")
    missing = [name for name in shape.linears if name not in plan.modules]
    if missing:
        raise RequestError(f"the plan is of another model: it says nothing of {missing[0]}; make one for this model.")
    check_heads(decoder, plan)
    for name, decision in plan.modules.items():
        linear = shape.linears.get(name)
        if decision.prune is not None:
            check_pruning(name, decision.prune, None if linear is None else linear.columns)
        if decision.bits >= 16:
            continue
        if linear is None or not (name in decoder.experts or name in decoder.linears):
            raise RequestError(f"the plan quantizes {name}, which is no nn.Linear of this model; make a plan for it.")
        if decision.group_size is None or (decision.group_size != -1 and linear.columns % decision.group_size):
            raise RequestError(f"group size {decision.group_size} does not divide the {linear.columns} input "
                               f"columns of {name}.")
        if decision.bytes != module_bytes(shape, name, decision.form):
            raise RequestError(f"the plan was made for another size of {name}; make a plan for this model.")
        for other in [] if linear.part_of else linear.fused_with:
            twin = plan.modules.get(other)
            if twin is None or not twin.shares_format(decision):
                raise RequestError(f"{name} and {other} are fused by engines and must share bits, group size, "
                                   "activations and the columns that are kept.")
    if decoder.source is not None and decoder.source.edits:
        raise RequestError("this model is rotated already; open it again.")
    require_equivalent(decoder, plan)
    if mixed := mixed_experts(shape, {name: decision.form for name, decision in plan.modules.items()}):
        raise RequestError(f"{mixed[0]} and {mixed[1]} cannot stand in one checkpoint: packed experts must share one "
                           "format, and a layer's be all packed or all in 16 bits.")
    check_distill(plan, shape)
    if plan.calibration.tune and any(plan.modules[name].bits < 16 for name in decoder.experts):
        raise RequestError(TUNE_AND_EXPERTS)


def _rounded(decoder: Decoder, plan: Plan, todo: dict[str, ModuleDecision], done: int) -> Iterator[QuantizedBlock]:
    for index, (name, block) in enumerate(zip(decoder.block_names, decoder.blocks, strict=True)):
        if index >= done:
            with decoder.present([block]), torch.no_grad():
                made = QuantizedBlock(index, name, {}, {}, silent=silence(decoder, plan, index))
                for module, decision in _inside(name, todo).items():
                    _quantize_one(decoder, module, decision, plan, made, None)
                _keep_dense(decoder, _inside(name, todo), made)
                put(decoder, _inside(name, todo), {})  # no static ones: those need rows
                yield made


def _calibrated(decoder: Decoder, plan: Plan, tokenizer: PreTrainedTokenizerBase | None,
                todo: dict[str, ModuleDecision], device: str, dtype: torch.dtype, store: ActivationStore | None,
                done: int) -> Iterator[QuantizedBlock]:
    settings = plan.calibration
    rows = calibration_rows(decoder, plan, tokenizer)
    weights = TokenWeights(rows, settings)
    rank, ranks = this_rank()
    shape = decoder.shape("")
    walk = Walk(decoder, rows, settings.batch_size, device, dtype, store=store)
    tune = Tune(settings.tune, plan.seed) if settings.tune else None
    ideal: torch.Tensor | None = None
    for step in walk.steps():
        if step.index < done:
            continue
        if plan.follows_unquantized and ideal is None:
            ideal = walk.hidden
        mine = _inside(step.name, todo)
        experts = {name: mine.pop(name) for name in list(mine) if name in decoder.experts}
        silent = silence(decoder, plan, step.index)
        scaled = scale_block(decoder, step, plan, weights, shape)
        made = QuantizedBlock(step.index, step.name, {}, {}, silent=silent,
                              input_scales=round_block(step, decoder, plan, getattr(torch, scale_dtype(
                                  str(decoder.model.dtype).removeprefix("torch.")))))
        # Fused modules read one input: its Hessian is collected once.
        source = {name: shape.linears[name].fused_with[0] for name in mine}
        readers = {source[name]: decoder.linears[source[name]] for name in mine}
        asymmetric = any(decision.method == "gptaq" for decision in mine.values())
        hessians = collect(step, readers, weights, ideal if asymmetric else None) if readers or experts else {}
        add_up(hessians, readers, asymmetric)
        routed = _record(step, decoder, experts, ideal)
        if ideal is not None:
            with inputs_left_alone(decoder.model):
                ideal = step.replay(ideal)
        last = {source[name]: name for name in mine}
        tuned = [name for name in mine if mine[name].bits < 16] if tune or settings.distill else []
        originals = {name: weight_matrix(decoder.linears[name]) for name in tuned}
        for place_in_block, (name, decision) in enumerate(mine.items()):
            # What stays in 16 bits is pruned by every rank: the sums are the same, and it is quickly done.
            if solver(place_in_block) == rank or decision.bits >= 16:
                _quantize_one(decoder, name, decision, plan, made, hessians.get(source[name]))
            if last[source[name]] == name and not tune:
                hessians.pop(source[name], None)
        if ranks > 1:
            _exchange(decoder, mine, made)
        if tune and tuned and ideal is not None:
            linears = {name: decoder.linears[name] for name in tuned}
            codes = _ours(made.weights)
            for name, packed in tune.run(step, linears, codes, originals, ideal, weights, made.kept).items():
                seen = hessians.get(source[name])
                _put(decoder, name, packed, made, originals[name], None if seen is None else seen.mean())
        if settings.distill:
            codes = _ours(made.weights)
            made.leanings.update({name: leanings(codes[name], originals[name], made.kept.get(name)) for name in tuned})
        _quantize_experts(step, decoder, experts, routed, weights, plan, made)
        made.dense.update({parameter: decoder.model.get_parameter(parameter).data.to("cpu", stored)
                           for parameter, stored in scaled.items()})
        if mine or experts or scaled:
            step.run()  # the next block must see what this one gives now
        yield made


def _ours(weights: dict[str, PackedWeight | BackendWeight]) -> dict[str, PackedWeight]:
    """Those that are on our grids: a backend's are neither tuned nor handed over."""
    return {name: weight for name, weight in weights.items() if isinstance(weight, PackedWeight)}


def _exchange(decoder: Decoder, mine: dict[str, ModuleDecision], made: QuantizedBlock) -> None:
    """Let every rank hold what each of them has solved of a block."""
    weights, losses = _ours(made.weights), dict(made.losses)
    for index, name in enumerate(mine):
        if mine[name].bits >= 16:
            continue
        made.weights[name], made.losses[name] = hand_over(solver(index), weights.get(name), losses.get(name))
        old = decoder.weight(name)
        decoder.put(name, made.weights[name].dequantized(decoder.model.dtype).to(old.device, old.dtype))
    for kept in (made.weights, made.losses):  # in the order of the module names, as one process has them
        ordered = {name: kept[name] for name in mine if name in kept}
        kept.clear()
        kept.update(ordered)  # type: ignore[arg-type]


def _inside(block: str, todo: dict[str, ModuleDecision]) -> dict[str, ModuleDecision]:
    return {name: decision for name, decision in todo.items() if name.startswith(f"{block}.")}


def _record(step: Step, decoder: Decoder, experts: dict[str, ModuleDecision],
            ideal: torch.Tensor | None) -> dict[str, Routed]:
    """What the layer's experts are handed, before anything of the block is changed."""
    if not experts:
        return {}
    asymmetric = any(decision.method == "gptaq" for decision in experts.values())
    parts = [decoder.experts[name] for name in experts]
    return record(step, {part.owner: part.module for part in parts}, ideal if asymmetric else None)


def _quantize_experts(step: Step, decoder: Decoder, todo: dict[str, ModuleDecision], routed: dict[str, Routed],
                      weights: TokenWeights, plan: Plan, made: QuantizedBlock) -> None:
    """One expert after the other, with its Hessians in memory alone; with several ranks, as many at a time as ranks."""
    rank, ranks = this_rank()
    for owner, one in routed.items():
        experts: dict[int, dict[str, ModuleDecision]] = {}
        for name, decision in todo.items():
            if decoder.experts[name].owner == owner:
                experts.setdefault(decoder.experts[name].index, {})[name] = decision
        made.tokens[owner] = one.counts()
        for start in range(0, len(experts), ranks):
            together = dict(list(experts.items())[start:start + ranks])
            hessians = {}
            for index in together:
                few = made.tokens[owner][index] < plan.calibration.min_expert_tokens
                for role, hessian in one.hessians(index, weights, few, step.walk.device, step.walk.dtype).items():
                    hessians[f"{index} {role}"] = hessian
            add_up(hessians, dict.fromkeys(hessians, one.module), one.ideal is not None)
            solved = QuantizedBlock(step.index, step.name, {}, {})
            decisions = {name: decision for members in together.values() for name, decision in members.items()}
            for place, (name, decision) in enumerate(decisions.items()):
                if solver(place) == rank or decision.bits >= 16:
                    part = decoder.experts[name]
                    _quantize_one(decoder, name, decision, plan, solved, hessians[f"{part.index} {part.role}"])
            if ranks > 1:
                _exchange(decoder, decisions, solved)
            made.weights.update(solved.weights)
            made.losses.update(solved.losses)
            made.kept.update(solved.kept)
    _keep_dense(decoder, todo, made)


def _keep_dense(decoder: Decoder, todo: dict[str, ModuleDecision], made: QuantizedBlock) -> None:
    """The fused parameters whose experts were changed and stay in 16 bits."""
    for name, decision in todo.items():
        part = decoder.experts.get(name)
        if decision.bits >= 16 and part is not None and (key := part.parameter) not in made.dense:
            made.dense[key] = decoder.model.get_parameter(key).data.to("cpu", decoder.model.dtype)


def _quantize_one(decoder: Decoder, name: str, decision: ModuleDecision, plan: Plan, made: QuantizedBlock,
                  seen: Hessian | None) -> None:
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
        _put(decoder, name, BackendWeight.of(whole, decision.form), made, weight, hessian)
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
    _put(decoder, name, packed, made, weight, hessian)


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


def _put(decoder: Decoder, name: str, packed: PackedWeight | BackendWeight, made: QuantizedBlock, weight: torch.Tensor,
         hessian: torch.Tensor | None) -> None:
    """Let a module hold a packed weight in place of `weight`."""
    # What the checkpoint will give: rounded to the model's own dtype, whatever the walk computes in.
    new = packed.dequantized(decoder.model.dtype).to(weight.dtype)
    made.losses[name] = relative_error(weight, new, hessian)
    decoder.put(name, new)
    made.weights[name] = packed.cpu()


def _put_dense(decoder: Decoder, name: str, new: torch.Tensor, made: QuantizedBlock,
               hessian: torch.Tensor | None) -> None:
    """Let a module that stays in 16 bits hold another weight, [rows, columns]."""
    weight = decoder.weight(name)
    stored = new.to(decoder.model.dtype)  # what the checkpoint will hold, whatever the walk computes in
    made.losses[name] = relative_error(weight, stored.to(weight.dtype), hessian)
    weight.copy_(stored)
    if name in decoder.experts:
        return  # `_keep_dense` takes the fused parameter, once it is done
    parameter = decoder.linears[name].weight
    assert isinstance(parameter, torch.Tensor)
    made.dense[f"{name}.weight"] = parameter.data.to("cpu", decoder.model.dtype)


def relative_error(weight: torch.Tensor, new: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """trace(dW H dW^T) / trace(W H W^T); H is the identity where none was taken."""
    metric = None if hessian is None else hessian.float()
    error, total = 0.0, 0.0
    for rows in row_chunks(weight):
        before = weight[rows].float()
        error += _norm(new[rows].float() - before, metric)
        total += _norm(before, metric)
    return error / max(total, 1e-30)


def _norm(part: torch.Tensor, metric: torch.Tensor | None) -> float:
    """trace(X H X^T) of some rows."""
    return float(((part if metric is None else part @ metric) * part).sum(dtype=torch.float64))
