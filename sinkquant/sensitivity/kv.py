"""What packing the keys and values of every KV head costs: predicted by the walk back, and measured.

A query sees packed keys or values of old tokens, and its head gives another output. That output is computed as it would
be, softmax and all, with the packed states of the very cache that a plan names; its error times the gradient of the
output is the change of the log-likelihood, and half its square the KL divergence to second order, as for weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import Head, KVCachePlan, KVLayer, KVLoss, SinkMap
from sinkquant.artifacts.kv import packed_tokens, value_group
from sinkquant.cache import Bases
from sinkquant.cache.score import cached_logits
from sinkquant.cache.store import PackedStates
from sinkquant.cache.transforms.recoding import LayerBases, Recoding, recodings
from sinkquant.models import Walk
from sinkquant.models.attention import AttentionRecord, AttentionRows
from sinkquant.models.backward import BackStep, steps_back
from sinkquant.models.steps import Progress
from sinkquant.recipe import Recipe
from sinkquant.sensitivity.measure import divergence

Place = tuple[int, str, int]
"""KV head, "key" or "value", bits."""


def kv_losses(walk: Walk, plan: KVCachePlan, exact: torch.Tensor, sink_map: SinkMap, recipe: Recipe,
              bases: Bases | None = None, progress: Progress | None = None) -> list[KVLoss]:
    """The predicted loss of every KV head's keys and values in every number of bits, in the order of the layers.

    Args:
        walk: a walk that has not begun. plan: the cache; its bits do not matter.
        exact: bool [rows, length], the tokens that stay exact.
        bases: what keys and values are rotated by, where the plan does so by covariance.
    """
    found: dict[int, list[KVLoss]] = {}
    count = len(plan.layers)
    for done, back in enumerate(steps_back(walk, recipe.seed)):
        layer = plan.layers[back.step.index]
        if layer.packed:
            seen = _HeadErrors(back, plan, layer, exact, recipe.kv_tried,
                               None if bases is None else bases.layers.get(back.step.index))
            back.pull([seen])
            readers = _readers(sink_map, back.step.index, len(layer.key_bits), seen.copies)
            found[back.step.index] = [KVLoss(
                layer=back.step.index, head=head, kind=kind, bits=bits,  # type: ignore[arg-type]
                predicted=total / 2 / walk.rows.numel(),
                no_op=bool(readers[head]) and all(one.no_op for one in readers[head]),
                sink_score=max((one.sink_score for one in readers[head]), default=0.0))
                for (head, kind, bits), total in sorted(seen.totals.items())]
        if progress:
            progress(done + 1, count, "sensitivities of the KV cache")
    return [loss for index in sorted(found) for loss in found[index]]


@torch.no_grad()
def measured_kv(model: PreTrainedModel, plan: KVCachePlan, rows: torch.Tensor, losses: list[KVLoss],
                progress: Progress | None = None) -> list[KVLoss]:
    """The same with the divergence of forward passes through a cache that packs nothing else.

    Args:
        model: in memory; it is made ready for the cache, and has been given what the plan needs (bases, and the prefix
            that rows bring along). rows: int64 [rows, length].
    """
    totals = [0.0] * len(losses)
    for done, row in enumerate(rows.split(1)):
        before = torch.log_softmax(model(row.to(model.device), use_cache=False).logits[0].float(), -1)
        for index, loss in enumerate(losses):
            after = cached_logits(model, row.to(model.device), _alone(plan, loss))[0]
            totals[index] += divergence(before, torch.log_softmax(after.float(), -1))
            if progress:
                progress(done * len(losses) + index + 1, len(rows) * len(losses), "measuring the KV cache")
    return [loss.model_copy(update={"measured": total / rows.numel()})
            for loss, total in zip(losses, totals, strict=True)]


def _alone(plan: KVCachePlan, loss: KVLoss) -> KVCachePlan:
    """The cache with the keys or values of one head packed; nothing is dropped or shown beyond a window."""
    layers = [layer.model_copy(update={"key_bits": [16] * len(layer.key_bits),
                                       "value_bits": [16] * len(layer.value_bits)}) for layer in plan.layers]
    bits = list(layers[loss.layer].key_bits)
    bits[loss.head] = loss.bits
    layers[loss.layer] = layers[loss.layer].model_copy(update={f"{loss.kind}_bits": bits})
    return plan.model_copy(update={"layers": layers, "front": [], "prefix": own_prefix(plan), "evict": None,
                                   "sliding_sinks": False})


def own_prefix(plan: KVCachePlan) -> list[int]:
    """What of the prefix rows bring along."""
    return plan.prefix[len(plan.front):]


@dataclass
class _HeadErrors:
    """Sees the attention of one layer and adds up the squared scores of every candidate.

    Attributes:
        copies: of every KV head, one after the other, that attention reads where the cache holds one (JetMoE).
    """

    back: BackStep
    plan: KVCachePlan
    layer: KVLayer
    exact: torch.Tensor
    bits: Sequence[int]
    bases: LayerBases | None = None
    copies: int = 1
    totals: dict[Place, float] = field(default_factory=dict)
    chunks: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def attention_rows(self, rows: AttentionRows) -> None:
        # Of the columns that a query sees: half of the matrix.
        reach = int(rows.allowed.any(0).nonzero().max()) + 1
        self.chunks.append((rows.start, rows.probabilities[..., :reach].detach().clone()))

    def attention(self, record: AttentionRecord) -> None:
        chunks, self.chunks = self.chunks, []
        if not record.output.requires_grad:
            return
        batch = self.back.step.batch
        heads = len(self.layer.key_bits)
        self.copies = record.key.shape[1] // heads
        states = (record.query.detach(), record.key[:, :heads].detach(), record.value[:, :heads].detach())
        # Not the record: a hook that holds its own tensor keeps the graph until the garbage collector comes.
        scale, softcap = record.scale, record.softcap
        record.output.register_hook(
            lambda gradient: self._add(chunks, *states, scale, softcap, gradient.detach(), batch))

    @torch.no_grad()
    def _add(self, chunks: list[tuple[int, torch.Tensor]], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
             scale: float, softcap: float | None, gradient: torch.Tensor, batch: slice) -> None:
        """chunks: first query and probabilities [batch, heads, queries, columns]; query and gradient [batch, heads,
        length, D]. What is heads x length x length is never whole here."""
        length, kv_heads = key.shape[2], key.shape[1]
        packed = self._packed(length).to(key.device)
        if not bool(packed.any()):
            self._count({(head, kind, bits): 0.0 for head in range(kv_heads) for kind in ("key", "value")
                         for bits in self.bits})
            return

        def read(states: torch.Tensor) -> torch.Tensor:
            """Of KV heads, one for every query head that reads it."""
            return states.repeat(1, self.copies, 1, 1).repeat_interleave(
                query.shape[1] // (kv_heads * self.copies), dim=1)

        query = scale * query.float()
        values = read(value.float())
        keys = None if softcap is None else read(key.float())
        of_keys, of_values = recodings(self.plan, self.bases)
        group = value_group(self.plan.group_size, self.layer.value_dim)
        for bits in self.bits:
            wrong = read(self._error(key, bits, None, of_keys, batch))
            wrong_values = read(self._error(value, bits, group, of_values, batch))
            for start, probabilities in chunks:
                stop, reach = start + probabilities.shape[2], probabilities.shape[3]
                there = packed[start:stop, :reach]
                if not bool(there.any()):
                    continue
                asked, mine = query[:, :, start:stop], gradient[:, :, start:stop]
                change = asked @ wrong[:, :, :reach].mT
                if keys is not None and softcap is not None:
                    scores = asked @ keys[:, :, :reach].mT
                    change = softcap * (torch.tanh((scores + change) / softcap) - torch.tanh(scores / softcap))
                # As logits: exp(change) alone overflows.
                logits = change.masked_fill_(~there, 0.0).add_(probabilities.log())
                learned = (1 - probabilities.sum(-1, keepdim=True)).clamp(min=0).log()
                top = torch.maximum(logits.amax(-1, keepdim=True), learned)
                other = logits.sub_(top).exp_()
                other.div_(other.sum(-1, keepdim=True) + (learned - top).exp())
                self._squares(other.sub_(probabilities) @ values[:, :, :reach], mine, kv_heads, "key", bits)
                self._squares(probabilities.masked_fill(~there, 0.0) @ wrong_values[:, :, :reach], mine, kv_heads,
                              "value", bits)

    def _packed(self, length: int) -> torch.Tensor:
        """bool [length, length]: which tokens a query finds packed when it is read, as decoding reads it."""
        ends = torch.tensor([packed_tokens(i, self.plan.window, self.plan.group_size) for i in range(length)])
        return torch.arange(length)[None] < ends[:, None]

    def _error(self, states: torch.Tensor, bits: int, group: int | None, recoding: Recoding,
               batch: slice) -> torch.Tensor:
        """What packing changes, float32 [batch, kv_heads, length, D]; nothing at exact tokens or after whole blocks."""
        size, length = self.plan.group_size, states.shape[2]
        count = length // size * size
        kept = self.exact[batch, :count].to(states.device)
        store = PackedStates([bits] * states.shape[1], size, group, self.plan.symmetric, recoding,
                             self.plan.scale_bits)
        store.append(states[:, :, :count], ~kept)
        error = torch.zeros_like(states, dtype=torch.float32)
        error[:, :, :count] = store.dense(torch.float32) - states[:, :, :count].float()
        error[:, :, :count].masked_fill_(kept[:, None, :, None], 0.0)
        return error

    def _squares(self, error: torch.Tensor, gradient: torch.Tensor, kv_heads: int, kind: str, bits: int) -> None:
        score = (error * gradient.float()).sum(-1).unflatten(1, (self.copies, kv_heads, -1)).sum((1, 3))
        sums = score.double().square().sum((0, 2)).tolist()
        self._count({(head, kind, bits): total for head, total in enumerate(sums)})

    def _count(self, sums: dict[Place, float]) -> None:
        for place, total in sums.items():
            self.totals[place] = self.totals.get(place, 0.0) + total


def _readers(sink_map: SinkMap, layer: int, kv_heads: int, copies: int) -> list[list[Head]]:
    """For every KV head what the sink map says of the query heads that read it, or one of its copies."""
    heads = sink_map.heads[layer] if layer < len(sink_map.heads) else []
    groups = max(1, len(heads) // max(1, kv_heads * copies))
    return [[one for copy in range(copies) for one in heads[(copy * kv_heads + head) * groups:][:groups]]
            for head in range(kv_heads)]


def exact_places(rows: torch.Tensor, plan: KVCachePlan, sinks: torch.Tensor) -> torch.Tensor:
    """Which tokens of rows int64 [rows, length] the cache keeps exact: bool, alike.

    Args:
        sinks: bool, alike, the sinks of the map that `plan.exact` means.
    """
    places = torch.zeros_like(sinks)
    if plan.exact in ("detected", "massive"):
        places = sinks.clone()
    elif plan.exact == "first-n":
        places[:, :plan.first_n] = True
    own = own_prefix(plan)
    if own:
        begins = (rows[:, :len(own)] == torch.tensor(own)).all(1)
        places[:, :len(own)] |= begins[:, None]
    return places & (places.cumsum(1) <= plan.max_exact + len(own))
