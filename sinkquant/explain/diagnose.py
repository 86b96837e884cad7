"""One module -> the most specific thing wrong with it that explains what putting all of it back removes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkquant.artifacts import SinkMap
from sinkquant.artifacts.explanation import Cause
from sinkquant.explain.parts import Part, first_block, put_back
from sinkquant.explain.patterns import Evidence, findings
from sinkquant.explain.remedies import remedy
from sinkquant.models import Decoder, as_stored
from sinkquant.models.smaller import HeadCounts
from sinkquant.recipe import Recipe

MOST = 0.8
"""Share of what the whole module removes that a more specific cause has to."""


@dataclass(frozen=True)
class Measuring:
    """What every counterfactual is held against.

    Attributes:
        loss: of the checkpoint as it is served, nats per token. measure: the same with what is changed just now, which
            begins in the block that it is given. recipe: what the checkpoint was made with.
    """

    loss: float
    measure: Callable[[int], float]
    recipe: Recipe

    def removes(self, first: int = 0) -> tuple[float, float]:
        """The loss now, and the share of the whole that is gone. first: block that the change begins in, or 0."""
        now = self.measure(first)
        return now, 1 - now / self.loss


def cause_in(parts: list[Part], shares: Mapping[str, torch.Tensor], whole: tuple[float, float],
             measuring: Measuring, model: PreTrainedModel, sink_map: SinkMap | None) -> Cause:
    """The cause in one module.

    Args:
        parts: its parameters. shares: first-order parts of their single weights, by parameter name.
        whole: the loss with all of it put back, and the share that removes.
    """
    name, module = parts[0].module, _module(parts[0].module, model)
    for part in parts:
        if part.quantized.dim() != 2 or part.name not in shares:
            continue
        for finding in findings(_evidence(part, shares[part.name], module, model, sink_map)):
            mended = finding.mended.to(part.quantized.dtype)
            with put_back([part], {part.name: as_stored(module, mended)}):
                after, removes = measuring.removes(first_block(parts))
            if removes > 0 and removes >= MOST * whole[1]:
                return Cause(kind=finding.kind, where=name, kl_after=after, removes=removes,
                             sentence=f"In {name}, {finding.what}: {finding.done} removes {percent(removes)} of the "
                                      "loss.", **remedy(finding.kind, name, measuring.recipe,
                                                        Decoder.of(model).experts))
    return _whole(name, parts, whole, model, measuring.recipe)


def _whole(name: str, parts: list[Part], whole: tuple[float, float], model: PreTrainedModel, recipe: Recipe) -> Cause:
    after, removes = whole
    ends = [id(model.get_input_embeddings().weight), id(getattr(model.get_output_embeddings(), "weight", None))]
    kind = next((kind for kind, end in zip(("embedding", "head"), ends, strict=True)
                 if any(id(part.parameter) == end for part in parts)), "module")
    if name.rpartition(".")[2] == "sinks":
        kind = "learned sinks"
    matrix = max(parts, key=lambda part: part.quantized.numel())
    rows = as_stored(_module(name, model), matrix.quantized)
    bits = bits_of(rows) if rows.dim() == 2 else None
    both = kind == "embedding" and ends[0] == ends[1]
    if both:
        what = f"The token embedding, which is the output head too ({name}),"
    else:
        what = {"embedding": f"The token embedding ({name})", "head": f"The output head ({name})",
                "learned sinks": f"The learned sinks ({name})"}.get(kind, name)
    rounded = f"is rounded to {bits} bits" if bits else f"differs by {matrix.error:.0%} of its norm"
    return Cause(kind=kind, where=name, kl_after=after, removes=removes,  # type: ignore[arg-type]
                 sentence=f"{what} {rounded}: putting it back removes {percent(removes)} of the loss.",
                 **remedy("both ends" if both else kind, name, recipe))


def percent(share: float) -> str:
    """ "81 %", or that it is made worse."""
    return f"{100 * share:.0f} %" if share >= 0 else f"none (it adds {-100 * share:.0f} %)"


def bits_of(matrix: torch.Tensor, rows: int = 64) -> int | None:
    """Bits of the codes of a matrix [rows, columns], told from how many values its groups hold; None where they hold as
    many as unquantized ones.

    Of sizes that groups may have, the largest is meant whose parts hold about as many values as it: a run of two groups
    holds twice as many as either, since each has its own scale.
    """
    some = matrix[torch.linspace(0, len(matrix) - 1, min(rows, len(matrix))).long()].float().cpu()
    counts = {}
    for size in dict.fromkeys((some.shape[1], 128, 64, 32, 16)):
        if some.shape[1] % size == 0:
            found = sorted(len(group.unique()) for group in some.reshape(-1, size))
            counts[size] = found[len(found) // 2]
    sizes = sorted(counts, reverse=True)
    size = next((one for one, part in itertools.pairwise(sizes)  # zero is in every group
                 if counts[one] - 1 < (counts[part] - 1) * (one / part) ** 0.75), sizes[-1])
    bits = max(1, (counts[size] - 1).bit_length())
    return bits if 2 ** bits <= size // 2 and counts[size] < size // 2 else None


def _module(name: str, model: PreTrainedModel) -> nn.Module:
    """The module of that name, or the model where a parameter has it."""
    return dict(model.named_modules()).get(name, model)


def _evidence(part: Part, shares: torch.Tensor, module: nn.Module, model: PreTrainedModel,
              sink_map: SinkMap | None) -> Evidence:
    width, frequencies = 0, torch.empty(0)
    if part.module.rpartition(".")[2] in ("q_proj", "k_proj"):
        width = HeadCounts.of(model).width
        frequencies = next((module.inv_freq for module in model.modules()
                            if isinstance(getattr(module, "inv_freq", None), torch.Tensor)), torch.empty(0))
    known = sink_map.modules.get(part.module) if sink_map else None
    before, after, shares = (as_stored(module, one) for one in (part.unquantized, part.quantized, shares))
    return Evidence(part.module, before, after, shares, width, frequencies, tuple(known.sink_columns) if known else ())
