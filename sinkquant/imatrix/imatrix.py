"""Model + sink map -> an importance matrix for `llama-quantize`: what every input channel of every matrix carries, with
the sinks' weight."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import LinearShape, SinkMap
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.imatrix.file import Importance, expert_names, tensor_names, write_importance
from sinkquant.models import ActivationStore, Decoder, Step, Walk, pick_device
from sinkquant.models.decoder import require_dense, weight_matrix
from sinkquant.models.experts import fused_parameters
from sinkquant.models.hooks import hooked
from sinkquant.models.numerics import own_numerics
from sinkquant.models.steps import Progress
from sinkquant.policy.calibration import calibration_of
from sinkquant.policy.choices import check_same_model
from sinkquant.policy.headers import FOR_SINKS
from sinkquant.quantize import is_quantized
from sinkquant.quantize.experts import record
from sinkquant.quantize.hessian import Diagonal, Hessian
from sinkquant.quantize.rows import text_rows
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe

PACKAGED = "packaged prose"


@own_numerics()
def imatrix(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike[str],
            sink_map: SinkMap | None = None, recipe: Recipe | None = None, store: ActivationStore | None = None,
            progress: Progress | None = None) -> dict[str, Importance]:
    """Write the importance matrix of a model in llama.cpp's GGUF format.

    For every matrix it holds sum_t x_t^2 of every input channel, as `llama-imatrix` does, but tokens weigh what they
    weigh in sinkquant's Hessians (`protect.statistics`, `protect.sink_weight`): the stored sum is the weighted mean
    times the number of tokens. Rows begin as the model's tokenizer begins a text. An expert that fewer than
    `calibration.min_expert_tokens` tokens were sent to gets the statistics of all tokens of its layer.

    Args:
        model: unquantized, in memory or from `open_model`. path: of the file.
        sink_map: of this model; not needed where the recipe's statistics know no sinks (`protect.tokens=false`, or
            `protect.statistics` "all" or "attention").
        store: where the hidden states of the rows live; RAM by default.

    Returns:
        name of a tensor in a GGUF file -> what was written of it.

    Raises:
        RequestError: llama.cpp's names for the model are not known, it is quantized, there is no sink map, or too
            little text.
        SinkquantError: hidden states are not finite, or no token reached a matrix.
    """
    recipe, target = recipe or Recipe(), Path(path)
    decoder = Decoder.of(model)
    names = check_imatrix(decoder, target)
    if sink_map is None and recipe.statistics in FOR_SINKS:
        raise RequestError("an importance matrix with the sinks' weight needs a sink map; run detect, or set "
                           "protect.tokens=false for one in which every token weighs the same.")
    if sink_map is not None:
        check_same_model(decoder.shape(sink_map.model.name), sink_map)
    settings = calibration_of(recipe, sink_map)
    rows = text_rows(decoder, settings, tokenizer)
    weights = TokenWeights(rows, settings)
    walk = Walk(decoder, rows, settings.batch_size, pick_device(recipe.compute.device),
                getattr(torch, recipe.compute.dtype), store=store)
    found: dict[str, Importance] = {}
    linears = decoder.shape("").linears
    for step in walk.steps():
        weights.enter(step)
        found |= _experts(step, decoder, weights, settings.min_expert_tokens)
        found |= _dense(step, decoder, linears, names, weights)
        if progress:
            progress(step.index + 1, len(decoder.blocks), "importance of inputs")
    texts = settings.text if isinstance(settings.text, list) else [settings.text or PACKAGED]
    write_importance(target, found, texts, len(rows), rows.shape[1])
    return found


def check_imatrix(decoder: Decoder, target: Path) -> dict[str, str]:
    """Refuse what no importance matrix can be written of, before anything is computed.

    Returns:
        linear -> name of its tensor.
    """
    if is_quantized(decoder.model):
        raise RequestError("this model is quantized; an importance matrix is of the unquantized one.")
    require_dense(decoder.model)
    names = tensor_names(decoder)
    apart = {part.parameter for part in decoder.experts.values()}
    together = [name for name in fused_parameters(decoder.model, decoder.block_names) if name not in apart]
    if together:
        raise RequestError(f"the experts of {together[0]} cannot be told apart, so that no importance matrix can be "
                           "written; use llama-imatrix.")
    if not target.parent.is_dir():
        raise RequestError(f"there is no folder {target.parent} to write {target.name} into; make it first.")
    if target.is_dir():
        raise RequestError(f"{target} is a folder; name the file, as {target / 'imatrix.gguf'}.")
    return names


def _dense(step: Step, decoder: Decoder, shape: Mapping[str, LinearShape], names: Mapping[str, str],
           weights: TokenWeights) -> dict[str, Importance]:
    """What the linears of a block read, taken while the rows walk on; those that engines fuse read one input, which is
    looked at once."""
    mine = {name: shape[name].fused_with[0] for name in names if name.startswith(f"{step.name}.")}
    sums: dict[str, Hessian] = {}
    handles = []
    for read in dict.fromkeys(mine.values()):
        linear = decoder.linears[read]
        sums[read] = Diagonal(weight_matrix(linear).shape[1], torch.device(step.walk.device))
        handles.append(linear.register_forward_pre_hook(_adds(sums[read], step, weights)))
    with hooked(handles):
        step.run()
    for name, read in mine.items():
        if not sums[read].tokens:
            raise SinkquantError(f"no calibration token reached {name}; give more text.")
    return {names[name]: _importance([sums[read]]) for name, read in mine.items()}


def _adds(sums: Hessian, step: Step, weights: TokenWeights) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = args[0].flatten(0, -2)
        sums.add(inputs, weights.of(step, inputs))

    return hook


def _experts(step: Step, decoder: Decoder, weights: TokenWeights, least: int) -> dict[str, Importance]:
    """What the experts of a block read, one after the other. least: tokens that an expert's own statistics take."""
    parts = {part.owner: part.module for name, part in decoder.experts.items() if name.startswith(f"{step.name}.")}
    found: dict[str, Importance] = {}
    for routed in (record(step, parts) if parts else {}).values():
        sums: dict[str, list[Hessian]] = {"up": [], "down": []}
        for index, count in enumerate(routed.counts()):
            one = routed.hessians(index, weights, count < least, step.walk.device, step.walk.dtype, kind=Diagonal)
            for role, each in sums.items():
                each.append(one[role])
        for role, each in sums.items():
            found |= dict.fromkeys(expert_names(step.index, role), _importance(each))
    return found


def _importance(sums: list[Hessian]) -> Importance:
    """The weighted means as sums over as many tokens as were seen."""
    counts = torch.tensor([one.tokens for one in sums], dtype=torch.float64)
    squares = torch.stack([one.mean().cpu() for one in sums]) * counts[:, None]
    return Importance(squares.float(), counts.float())
