"""What every head does with its attention: controls mixing, waits for a condition, reads positions, or information.

A head that rests on a sink adds next to nothing to the tokens that it reads for (Barbero et al. 2504.02732): resting at
every token it only holds mixing back. Guo et al. (2410.13835) and Barbero et al. found heads that rest unless the
token, or the one before it, is of a kind. Here that is looked for in every head: whether the mass on the sinks depends
on the token more than it would if the tokens were dealt out anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from sinkquant.artifacts.heads import HeadRole, Role
from sinkquant.detect.detector import Detector, Found, text_of
from sinkquant.detect.survey import batch_rows
from sinkquant.models import AttentionRecord, AttentionRows, Step, Walk

TOKENS = 2048
"""Tokens of the rows that are read once more, now that the sinks are known."""
EARLY = 4
"""The first queries of a row see little but the sink and are left out."""
RESTING = 0.5
"""A head rests at a token where it gives the sinks at least this share of its attention: most of it."""
ALWAYS = 0.95
"""A head that rests at this share of the tokens does so whatever the text; at 1 - ALWAYS it never does."""
OFFSETS = 8
"""Tokens back, 0 being the token itself, that a positional head may look at."""
MOST = 0.5
"""A head is positional where one offset gets more than this share of what it does not give to the sinks."""
DEALT = 20
"""How often the tokens are dealt out anew."""
DEVIATIONS = 4.0
"""A dependence is one where it is so many standard deviations over the mean of those of dealt tokens: by chance in one
of 30,000 heads."""
LEAST = 4
"""Occurrences of a token below which it counts as one of the rare ones, which make up one class."""
SHOWN = 6


class HeadRoles(Detector):
    """What role every query head plays."""

    fields = ("head_roles",)
    null = ("a dependence on tokens is measured again with the tokens dealt out anew, and an offset's share stands "
            "beside that of even attention; in random models of every family no head rests, none waits for a token and "
            "none is positional")

    def result(self, found: Found) -> dict[str, Any]:
        """Of `TOKENS` tokens of the rows that show the sinks best; where there are no sinks, of the first position."""
        survey = found.best
        rows = survey.rows[:max(2, TOKENS // survey.rows.shape[1])]
        sinks = found.sinks.mask(rows)
        if not sinks.any() and not survey.table.has_learned_sink:
            sinks[:, 0] = True
        table = RoleTable(rows, sinks)
        batch = batch_rows(self.decoder, self.recipe, rows.shape[1])
        walk = Walk(self.decoder, rows, batch, found.device, found.dtype, [table])
        for step in walk.steps():
            table.step = step
            step.run()
            table.close_layer()
            if found.progress:
                found.progress(step.index + 1, len(self.decoder.blocks), "reading roles")
        return {"head_roles": roles_of(table, self.recipe.seed, lambda token: str(text_of(token, found.tokenizer)))}


def roles_of(table: RoleTable, seed: int, decode: Callable[[int], str]) -> list[list[HeadRole]]:
    """The role of every head, [layer][head], by what an observer has kept of a walk.

    Args:
        seed: of the tokens that are dealt out anew. decode: a token in letters.
    """
    found: list[list[HeadRole]] = []
    for mass, offsets, even in zip(table.mass, table.offsets, table.even, strict=True):
        if not len(mass):
            found.append([])
            continue
        rests = (mass >= RESTING).double().mean(1)
        waits = [(when, dependence(mass, ids, seed), ids) for when, ids in table.conditions]
        roles = []
        for head, shares in enumerate(offsets):
            offset = int(shares.argmax())
            when, (explained, null, bound), ids = max(waits, key=lambda one: float(one[1][0][head] - one[1][2][head]))
            tokens = [] if float(explained[head]) <= float(bound[head]) else awake(mass[head], ids, float(rests[head]))
            role = judge(float(rests[head]), bool(tokens), float(shares[offset]))
            roles.append(HeadRole(
                role=role, rests=float(rests[head]), explained=float(explained[head]), explained_null=float(null[head]),
                condition=when if role == "switched" else None,
                tokens=[decode(token) for token in tokens[:SHOWN]] if role == "switched" else [],
                offset=offset, offset_share=float(shares[offset]), offset_null=float(even[head])))
        found.append(roles)
    return found


def judge(rests: float, waits: bool, offset_share: float) -> Role:
    """The role of a head. rests: share of tokens at which it rests. waits: whether tokens are known at which it does
    not. offset_share: of what it does not give to the sinks, what the offset that gets most gets."""
    if rests >= ALWAYS:
        return "mixing"
    if waits and rests > 1 - ALWAYS:
        return "switched"
    return "positional" if offset_share > MOST else "information"


def dependence(mass: torch.Tensor, ids: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How far the mass on the sinks depends on a token: the share of its variance that lies between tokens.

    Args:
        mass: float64 [heads, queries]. ids: int64 [queries].

    Returns:
        [heads] each: the share; its mean where the tokens are dealt out anew; and the bound that it has to pass.
    """
    _, classes, counts = ids.unique(return_inverse=True, return_counts=True)
    classes = torch.where(counts[classes] >= LEAST, classes, len(counts))
    generator = torch.Generator().manual_seed(seed)
    dealt = torch.stack([_between(mass, classes[torch.randperm(len(ids), generator=generator)]) for _ in range(DEALT)])
    mean, spread = dealt.mean(0), dealt.std(0)
    return _between(mass, classes), mean, mean + DEVIATIONS * spread


def awake(mass: torch.Tensor, ids: torch.Tensor, rests: float) -> list[int]:
    """The tokens at which a head rests at most half as often as it does on the whole; most queries first.

    Args:
        mass: float64 [queries]. ids: int64 [queries]. rests: share of all queries at which it rests.
    """
    tokens, classes, counts = ids.unique(return_inverse=True, return_counts=True)
    at = torch.zeros(len(tokens), dtype=torch.float64).index_add_(0, classes, (mass >= RESTING).double()) / counts
    fewer = (counts >= LEAST) & (at <= rests / 2)
    order = torch.where(fewer, counts * (rests - at), -1.0).argsort(descending=True, stable=True)
    return [int(tokens[place]) for place in order[:int(fewer.sum())]]


def _between(mass: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """[heads], the share of the variance of each row that lies between classes."""
    size = int(classes.max()) + 1
    counts = torch.bincount(classes, minlength=size).clamp(min=1)
    centred = mass - mass.mean(1, keepdim=True)
    means = torch.zeros(len(mass), size, dtype=mass.dtype).index_add_(1, classes, centred) / counts
    total = centred.square().sum(1)
    return torch.where(total > 1e-12 * mass.shape[1], (means.square() * counts).sum(1) / total.clamp(min=1e-30), 0.0)


class RoleTable:
    """An observer of attention that keeps what roles are told by, a number per head and token.

    Queries count from `EARLY` and the row's first sink on, where they are no sinks themselves.

    Attributes (lists over layers):
        mass: float64 [heads, queries], mass on the sinks and on the learned sink column.
        offsets: float64 [heads, OFFSETS], of what is not given to the sinks, the share of every offset.
        even: float64 [heads], the share of one offset if it were spread evenly over what is no sink.
    """

    def __init__(self, rows: torch.Tensor, sinks: torch.Tensor) -> None:
        self.sinks = sinks
        places = torch.arange(rows.shape[1])
        first = torch.where(sinks.any(1), sinks.float().argmax(1), 0)
        self.counted = (places >= EARLY) & (places > first[:, None]) & ~sinks
        before = rows.roll(1, dims=1)
        self.conditions: list[tuple[Literal["token", "previous"], torch.Tensor]] = [
            ("token", rows[self.counted]), ("previous", before[self.counted])]
        self.step: Step | None = None
        self.mass: list[torch.Tensor] = []
        self.offsets: list[torch.Tensor] = []
        self.even: list[torch.Tensor] = []
        self._mass: list[list[torch.Tensor]] = [[]]
        self._sums: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def attention_rows(self, rows: AttentionRows) -> None:
        """Reduce a chunk of queries."""
        assert self.step is not None
        p, batch = rows.probabilities, self.step.batch
        places = torch.arange(rows.start, rows.start + p.shape[2], device=p.device)
        sinks = self.sinks[batch].to(p.device)
        counted = self.counted[batch].to(p.device)[:, None, places]
        mass = (p * sinks[:, None, None, :]).sum(-1) + (1 - p.sum(-1)).clamp(min=0)
        left = (1 - mass).clamp(min=0) * counted
        others = (rows.allowed[None] & ~sinks[:, None, :]).sum(-1).clamp(min=1)
        shares = []
        for offset in range(OFFSETS):
            column = (places - offset).clamp(min=0)
            here = counted & (places >= offset) & ~sinks[:, None, column]
            shares.append((p.gather(-1, column.expand(*p.shape[:2], -1)[..., None])[..., 0] * here).sum((0, 2)))
        self._mass[-1].append(mass.cpu())
        self._sums.append((torch.stack(shares, 1).double().cpu(), left.sum((0, 2)).double().cpu(),
                           (left / others[:, None]).sum((0, 2)).double().cpu()))

    def attention(self, record: AttentionRecord) -> None:
        """The end of a batch."""
        self._mass.append([])

    def close_layer(self) -> None:
        """All batches of a layer were seen: put them together. One without an attention matrix has no heads."""
        if not self._sums:
            nobody = torch.zeros(0, int(self.counted.sum()), dtype=torch.float64)
            self.mass.append(nobody)
            self.offsets.append(nobody[:, :OFFSETS])
            self.even.append(nobody[:, 0])
            return
        mass = torch.cat([torch.cat(chunks, -1) for chunks in self._mass if chunks])
        self.mass.append(mass.double().transpose(0, 1)[:, self.counted])
        shares, left, even = (torch.stack(parts).sum(0) for parts in zip(*self._sums, strict=True))
        self.offsets.append(shares / left[:, None].clamp(min=1e-30))
        self.even.append(even / left.clamp(min=1e-30))
        self._mass, self._sums = [[]], []
