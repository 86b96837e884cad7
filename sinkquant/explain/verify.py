"""A recipe change carried out on the baseline: is the loss really gone?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import SinkMap
from sinkquant.artifacts.explanation import Cause, Verified
from sinkquant.cache import prepare
from sinkquant.errors import RequestError
from sinkquant.explain.probe import Probe
from sinkquant.models import Decoder, cast_model
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize, state_of
from sinkquant.recipe import Recipe


def verified(cause: Cause, recipe: Recipe, fresh: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase,
             sink_map: SinkMap, probe: Probe, loss: float) -> Cause:
    """The cause with what its recipe change makes of the baseline; the same where it has none, or the change and the
    recipe do not go together.

    Args:
        recipe: what the checkpoint was made with. fresh: gives the baseline, to be quantized. loss: of the checkpoint.
    """
    if not cause.recipe:
        return cause
    model = fresh()
    try:
        plan = make_plan(Decoder.of(model).shape(""), sink_map, recipe.replace(cause.recipe))
        quantize(model, plan, tokenizer, str(model.device), recipe.compute.dtype)
        cast_model(model, str(model.device), probe.original.dtype)  # as the checkpoint was loaded
        cache = plan.kv_cache
        if cache is not None:
            state = state_of(model)
            prepare(model, state.prefix, state.bases, own=True)
    except RequestError as error:
        return cause.model_copy(update={"advice": f"{cause.advice} (the change was refused: {error})"})
    now = (probe if cache == probe.kv else replace(probe, kv=cache)).loss(model)
    return cause.model_copy(update={"verified": Verified(kl=now, removes=1 - now / loss)})
