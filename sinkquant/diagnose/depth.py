"""The depth at which tokens settle: after which block a token's prediction stays what the whole model predicts.

The model's own final norm and output head are applied to what every block gives, as early exits do (LayerSkip, arXiv
2404.16710), with nothing trained for it. A token has settled once the divergence of that prediction from the model's
own stays within a bound up to the last block. It is the most that an adaptive depth could save without training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from sinkquant.artifacts.diagnosis import SettledTokens, SettlingDepth
from sinkquant.diagnose.null import measured
from sinkquant.diagnose.survey import WalkSettings
from sinkquant.models import Decoder
from sinkquant.models.head import runs_of_positions, what_follows
from sinkquant.models.text import is_delimiter

BOUND = 0.1
"""Nats per token: about what 4-bit weights cost a small model."""
Kind = Literal["sinks", "delimiters", "others"]
TOKENS = 128
"""Of a kind, drawn from the rows; twice as many of those that are neither sinks nor delimiters."""


def settling_depth(decoder: Decoder, rows: torch.Tensor, sinks: torch.Tensor, decode: Callable[[int], str],
                   compute: WalkSettings, bound: float = BOUND) -> SettlingDepth:
    """The blocks that predictions need, by kind of token.

    Args:
        decoder: of a model in memory. rows: int64 [rows, length]. sinks: bool [rows, length].
        decode: a token in letters. bound: nats.
    """
    kinds = drawn(rows, sinks, decode, compute.seed)
    places = torch.cat(list(kinds.values()))
    walk, states = compute.walk(decoder, rows), []
    for step in walk.steps():
        states.append(step.run().flatten(0, 1)[places])
    with what_follows(decoder, compute.device, compute.dtype) as logits:
        depth, top = depths(logits, decoder.vocabulary, states, bound)
    found, start = [], 0
    for name, mine in kinds.items():
        part = slice(start, start + len(mine))
        start += len(mine)
        if len(mine):
            found.append(SettledTokens(
                kind=name, tokens=len(mine), depth=measured(depth[part], compute.seed),
                same_top=measured(top[part], compute.seed),
                settled=[float((depth[part] <= block + 1).double().mean()) for block in range(len(states))]))
    return SettlingDepth(bound=bound, blocks=len(states), kinds=found)


def depths(logits: Callable[[torch.Tensor], torch.Tensor], vocabulary: int, states: list[torch.Tensor],
           bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of blocks after which every token has settled.

    Args:
        logits: of what a block gives. states: what every block gives, [tokens, hidden_size] each.

    Returns:
        int64 [tokens] each: by divergence, and by the token that is predicted first.
    """
    count = len(states[0])
    over = torch.zeros(len(states), count, dtype=torch.bool)
    other = torch.zeros_like(over)
    for run in runs_of_positions(vocabulary, count):
        last = torch.log_softmax(logits(states[-1][run]), -1)
        for block, given in enumerate(states):
            early = torch.log_softmax(logits(given[run]), -1)
            over[block, run] = ((last.exp() * (last - early)).sum(-1) > bound).cpu()
            other[block, run] = (last.argmax(-1) != early.argmax(-1)).cpu()
    # One more than the last block that is not there yet.
    number = torch.arange(1, len(states) + 1)[:, None]
    return (number * over).amax(0) + 1, (number * other).amax(0) + 1


def drawn(rows: torch.Tensor, sinks: torch.Tensor, decode: Callable[[int], str], seed: int) -> dict[Kind, torch.Tensor]:
    """Kind -> flat places of tokens of it, ascending: "sinks", "delimiters" (no letter or digit), "others". The last
    token of a row counts as any other."""
    ids, inverse = rows.unique(return_inverse=True)
    marks = torch.tensor([is_delimiter(decode(int(token))) for token in ids.tolist()])
    delimiters = marks[inverse] & ~sinks
    generator = torch.Generator().manual_seed(seed)
    kinds: tuple[tuple[Kind, torch.Tensor, int], ...] = (
        ("sinks", sinks, TOKENS), ("delimiters", delimiters, TOKENS), ("others", ~sinks & ~delimiters, 2 * TOKENS))
    found: dict[Kind, torch.Tensor] = {}
    for name, kind, count in kinds:
        places = kind.flatten().nonzero().flatten()
        found[name] = places[torch.randperm(len(places), generator=generator)[:count]].sort().values
    return found
