"""Whether a plan fits a model, before anything is computed."""

from __future__ import annotations

from sinkquant.artifacts import Plan
from sinkquant.artifacts.conflicts import check_conflicts
from sinkquant.artifacts.distill import check_distill
from sinkquant.artifacts.ends import end_bytes
from sinkquant.artifacts.experts import TUNE_AND_EXPERTS, mixed_experts, require_loadable
from sinkquant.artifacts.sizes import module_bytes, own_format
from sinkquant.cache.rotary import require_rotary
from sinkquant.errors import RequestError
from sinkquant.methods import require_methods
from sinkquant.models import Decoder, require_dense
from sinkquant.quantize.pruning import check_heads, check_pruning
from sinkquant.quantize.ranks import this_rank
from sinkquant.quantize.state import is_quantized
from sinkquant.quantize.transforms import require_equivalent
from sinkquant.quantize.trial import require_loads
from sinkquant.schemes import scheme_of
from sinkquant.schemes.packages import require_packages


def check(decoder: Decoder, plan: Plan) -> None:
    """Refuse a plan that does not fit a model, before anything is computed.

    Raises:
        RequestError: modules or sizes of another model, a module that is no linear, a group size that does not
            divide, fused modules in several formats, a model that is quantized already, or one whose family its
            library does not load in these formats.
    """
    if is_quantized(decoder.model):
        raise RequestError("this model is quantized already, if only in part; start from the unquantized one.")
    require_dense(decoder.model)
    require_packages(plan.backend)
    if plan.needs_rows and this_rank()[1] > 1 and any(scheme_of(form).rounds_itself for form in plan.formats.values()):
        raise RequestError(f"weights that {plan.backend} rounds are not shared among processes; run it in one.")
    shape = decoder.shape("")
    missing = [name for name in shape.linears if name not in plan.modules]
    if missing:
        raise RequestError(f"the plan is of another model: it says nothing of {missing[0]}; make one for this model.")
    if plan.kv_cache is not None and not all(0 <= token < decoder.vocabulary for token in plan.kv_cache.prefix):
        raise RequestError("the plan's prefix names tokens that the model does not have; make a plan for this model.")
    if plan.kv_cache is not None and plan.kv_cache.evict is not None:
        require_rotary(decoder.model)
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
    require_loadable(shape, plan.formats, own_format(shape, plan.formats))
    check_conflicts(plan)
    check_distill(plan, shape)
    require_methods(plan)
    if plan.calibration.tune and any(plan.modules[name].bits < 16 for name in decoder.experts):
        raise RequestError(TUNE_AND_EXPERTS)
    for name, end in plan.ends.items():
        if name not in shape.ends or end.bytes != end_bytes(shape, name, end.form, end.shares):
            raise RequestError(f"the plan was made for another {name}; make a plan for this model.")
    require_loads(decoder, shape, plan.formats, plan.ends, plan.kv_scheme)
