"""Which engines load what a plan makes: what the schemes' rows of the engine table say, and what only a whole model
tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sinkquant.artifacts import KVCachePlan, LinearShape, ModelShape, Plan
from sinkquant.artifacts.kv_scheme import KVScheme
from sinkquant.artifacts.sizes import own_format
from sinkquant.errors import RequestError
from sinkquant.policy.rules import Draft
from sinkquant.schemes import INTEGERS, Scheme, WeightFormat, scheme_of
from sinkquant.schemes.loads import EXPERTS_BY_NAME, VLLM, reads_kv_scales
from sinkquant.schemes.registry import SCHEMES

OWN = "sinkquant"
ANY = "any"
"""No engine is asked for."""
OTHERWISE = "or leave the engine out (engine=any)"


def loads_in(shape: ModelShape, formats: Mapping[str, WeightFormat], own: bool,
             kv_scheme: KVScheme | None = None) -> list[str]:
    """The engines that load every linear of a checkpoint, in the order of the table.

    Args:
        formats: module name -> format of every packed linear. own: the checkpoint is in sinkquant's own format.
        kv_scheme: its scales are to be read, too.
    """
    if own:
        return [OWN]
    schemes = dict.fromkeys(scheme_of(form) for form in formats.values()) or [INTEGERS]
    named = list(dict.fromkeys(row.engine for scheme in schemes for row in scheme.loads))
    found = [engine for engine in named if all(_takes(engine, form) for form in formats.values())]
    superfluous = {row.engine for scheme in schemes for row in scheme.loads if row.instead_of in found}
    found = [engine for engine in found if engine not in superfluous]
    if not _experts_load(shape, formats):
        found = [engine for engine in found if engine not in EXPERTS_BY_NAME]
    found = [engine for engine in found if not _named_otherwise(engine, shape)]
    return [engine for engine in found if kv_scheme is None or reads_kv_scales(engine)]


def engine_loads(engine: str, form: WeightFormat, linear: LinearShape) -> bool:
    """Whether a budget for `engine` ("any" or one of the table) may use a packed format. What is split or stored
    transposed takes sinkquant's own format."""
    return engine in (ANY, OWN) or (not (form.split or linear.transposed) and engine_takes(engine, form)
                                    and (linear.part_of is None or engine not in VLLM or _expert_runs(form)))


def engine_takes(engine: str, form: WeightFormat) -> bool:
    """Whether a budget for `engine` may store the head or the embedding so."""
    return engine in (ANY, OWN) or _takes(engine, form)


def for_engine(choices: dict[str, Draft], engine: str) -> dict[str, Draft]:
    """The choices as the engine that a recipe names wants them stored."""
    found = dict(choices)
    for name, choice in choices.items():
        if not choice.quantized:
            continue
        form = scheme_of(choice.form).for_engine(engine, choice.form)
        if form != choice.form:
            held = f"held to {form.bits} bits of them, which no processor saturates" if form.bits < choice.bits else (
                "so that inputs are rounded")
            found[name] = replace(choice, bits=form.bits, storage=form.storage,
                                  reason=f"{choice.reason}; codes of a byte each for {engine}, {held}")
    return found


def require_engine_cache(engine: str, kv_cache: KVCachePlan | None, kv_scheme: KVScheme | None) -> None:
    """Refuse a KV cache that the engine that a recipe names does not have."""
    if engine != ANY and kv_cache is not None:
        raise RequestError(f"{engine} keeps its KV cache in 16 bits and knows no prefix of sinkquant's; set "
                           f"kv_cache=null, {OTHERWISE}.")
    if engine != ANY and kv_scheme is not None and not reads_kv_scales(engine):
        raise RequestError(f"{engine} reads no kv_cache_scheme; set it to null, {OTHERWISE}.")


def require_engine_names(engine: str, shape: ModelShape) -> None:
    """Refuse a model whose checkpoints an engine does not load in whatever format."""
    if _named_otherwise(engine, shape):
        raise RequestError(f"{engine} knows tensors of {shape.architecture} by other names than transformers, whose "
                           f"names checkpoints have; use another engine, {OTHERWISE}.")


def require_engine(engine: str, plan: Plan, shape: ModelShape) -> None:
    """Refuse a plan that the engine that a recipe names does not run."""
    require_engine_names(engine, shape)
    require_engine_cache(engine, plan.kv_cache, plan.kv_scheme)
    if engine == ANY:
        return
    formats = plan.stored
    if own_format(shape, plan.formats):
        raise RequestError(f"{engine} does not load columns beside the codes, nor weights that a model stores "
                           f"transposed, which take sinkquant's own format; set protect.channels=none, {OTHERWISE}.")
    for name, form in formats.items():
        if name in plan.modules and plan.modules[name].simulated:
            raise RequestError(f"inputs in {plan.modules[name].activations} are rounded by sinkquant alone, and not by "
                               f"{engine}; set activations.format=16-bit, {OTHERWISE}.")
        if not _takes(engine, form):
            raise RequestError(f"{engine} does not run {_in_words(form)} ({name}); {_what_it_runs(engine, form)}, "
                               f"{OTHERWISE}.")
    if engine in EXPERTS_BY_NAME and not _experts_load(shape, formats):
        raise RequestError(f"{engine} loads packed experts only where all of them are packed, under names that end in "
                           f"_proj, integers in 4 or 8 bits, and this plan's are not; use another model or "
                           f"plan, {OTHERWISE}.")


def _in_words(form: WeightFormat) -> str:
    groups = "per channel" if form.group_size in (-1, None) else f"in groups of {form.group_size}"
    return f"{scheme_of(form).words} of {form.bits} bits {groups} with {form.inputs} inputs"


def _what_it_runs(engine: str, form: WeightFormat) -> str:
    """The engine's rows of this number format; where it has none, of which others it has any."""
    mine = scheme_of(form)
    asked = [one for one in SCHEMES if mine.integers and one.integers and one.backend == mine.backend] or [mine]
    rows = [row for one in asked for row in one.loads if engine in row.names]
    if rows:
        return f"of these it runs {'; '.join(dict.fromkeys(row.conditions() for row in rows))}: ask for one of those"
    others: list[Scheme] = [one for one in SCHEMES if any(engine in row.names for row in one.loads)]
    words = dict.fromkeys(f"{one.words} (backend={one.backend})" for one in others)
    return f"it runs {', '.join(words)}: ask for one of those"


def _takes(engine: str, form: WeightFormat) -> bool:
    return any(engine in row.names and row.takes(form) for row in scheme_of(form).loads)


def _experts_load(shape: ModelShape, formats: Mapping[str, WeightFormat]) -> bool:
    """Whether every expert, if there is any, is packed in a tensor of its own whose name ends in _proj, in a format
    that vLLM has for experts."""
    return all(name in formats and name.endswith("_proj") and _expert_runs(formats[name])
               for name, linear in shape.linears.items() if linear.part_of)


def _expert_runs(form: WeightFormat) -> bool:
    """Whether vLLM, which runs experts by other kernels than linears, has this one for them."""
    return scheme_of(form) is not INTEGERS or form.bits in (4, 8)


def _named_otherwise(engine: str, shape: ModelShape) -> bool:
    return engine in VLLM and "vllm" in shape.not_loaded_from
