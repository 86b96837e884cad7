"""What the run's log says of a block that was quantized."""

from __future__ import annotations

from collections.abc import Mapping

from sinkquant.artifacts import Plan
from sinkquant.artifacts.experts import few_tokens, in_short
from sinkquant.quantize import QuantizedBlock
from sinkquant.schemes.codecs.compressed import EXPERT


def in_words(block: QuantizedBlock, losses: Mapping[str, float], plan: Plan) -> str:
    """The relative error of every module, experts together; tokens per expert, and who had too few of them.

    Args:
        losses: module name -> relative error, of this block and of any others.
    """
    start = f"{block.name}."
    losses = {name.removeprefix(start): loss for name, loss in losses.items() if name.startswith(start)}
    said = [f"{name} {loss:.3g}" for name, loss in losses.items() if not EXPERT.search(name)]
    experts = {name: loss for name, loss in losses.items() if EXPERT.search(name)}
    if experts:
        worst = max(experts, key=lambda name: experts[name])
        said.append(f"experts {sum(experts.values()) / len(experts):.3g} on average, {experts[worst]:.3g} at most "
                    f"({worst})")
    for owner, counts in block.tokens.items():
        said.append(f"tokens per expert of {owner.removeprefix(block.name + '.')} {in_short(counts)}")
        if few := few_tokens({owner: counts}, plan.calibration.min_expert_tokens):
            said.append(f"quantized as if all tokens went there: {few}")
    return ", ".join(said)
