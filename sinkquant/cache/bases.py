"""The matrices that a plan rotates keys and values by, found once on calibration text with the unquantized model.

They belong to a model and a plan as weights do: D * D numbers per KV head, whatever the length of the text. No bytes of
the cache count them. Keys go through theirs after rotary embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts.kv import KVCachePlan
from sinkquant.cache.exact import Massive, NewTokens, exact_tokens
from sinkquant.cache.ordered import load_ordered, save_ordered
from sinkquant.cache.prefix import fingerprint, require_embedding
from sinkquant.cache.transforms.covariance import balancing, read_by, spreading
from sinkquant.cache.transforms.descent import Descent
from sinkquant.cache.transforms.recoding import LayerBases
from sinkquant.cache.transforms.rotation import Basis
from sinkquant.errors import RequestError
from sinkquant.models import Walk, vocabulary_of
from sinkquant.models.attention import AttentionRecord, AttentionRows

SCHEMA = "sinkquant/kvbases@1"
ROWS = 16
"""Rows of the calibration text that are enough: a row of 512 tokens has several for every direction of a head."""
DESCENT = "descent"
"""Second part of the name of a layer's tensor with the moment of its queries."""
KEYS_SHARE = 1 / 3
"""What keys keep of the spectrum that they and the queries have together where codes are chosen together: queries that
are less even than the keys leave more to gain. On texts that the map was not found on, the error of scores is least
between 0.3 and 0.4 of it (SmolLM2)."""
KNOWN_BY = [0, 1, 2, 3]
"""Tokens whose embeddings tell the model from another one."""


@dataclass(frozen=True, eq=False)
class Bases:
    """Attributes:
        layers: index -> its matrices.
        model: fingerprint of the model that they were found with.
    """

    layers: dict[int, LayerBases]
    model: str


def needs_bases(plan: KVCachePlan | None) -> bool:
    """Whether a plan rotates by matrices that have to be found."""
    return plan is not None and "covariance" in (plan.rotate, plan.value_rotation)


def find_bases(walk: Walk, plan: KVCachePlan) -> Bases:
    """Let calibration rows go through the unquantized model and take the moments of every packed layer.

    Args:
        walk: over a few rows, not begun, without observers.
        plan: what its policy keeps exact is left out of the moments.
    """
    model, layers = walk.decoder.model, {}
    policy = exact_tokens(plan)
    positions = torch.arange(walk.rows.shape[1]).expand(walk.rows.shape)
    kept = policy.flags(NewTokens(positions, walk.rows))
    kept = torch.zeros_like(walk.rows, dtype=torch.bool) if kept is None else kept
    seen = _Moments(plan.group_size)
    walk.observers.append(seen)
    for step in walk.steps():
        one = plan.layers[step.index]
        seen.begin(kept, lambda step=step: step.batch, len(one.key_bits))  # type: ignore[misc]
        outputs = step.run()
        if one.packed and any(bits < 16 for bits in one.key_bits + one.value_bits):
            layers[step.index] = _of_moments(seen, plan)
        if isinstance(policy, Massive) and policy.carriers.layer == step.index:
            kept = policy.verdict(outputs).cpu()
    with walk.decoder.present([model.get_input_embeddings()]):
        return Bases(layers, fingerprint(model, KNOWN_BY))


def _of_moments(seen: _Moments, plan: KVCachePlan) -> LayerBases:
    keys = descent = None
    if plan.rotate == "covariance":
        together = plan.rounding == "descent"
        readers = _even(seen.weighed) + _even(seen.alike)
        matrix = balancing(seen.keys, readers, KEYS_SHARE if together else 0.5)
        keys = Basis.of_matrix(matrix)
        descent = Descent.of_moment(read_by(matrix, readers)) if together else None
    values = Basis.of_matrix(spreading(seen.values)) if plan.value_rotation == "covariance" else None
    return LayerBases(keys, values, descent)


@dataclass
class _Moments:
    """Adds up the moments of one layer at a time, float64 [kv_heads, D, D] each.

    Keys count without the mean of their block of `block` tokens, which its zeros take.

    Attributes:
        weighed: of queries, each counting as much as an error of its scores would change what it reads: to first order
            the sum over tokens of (attention * distance of the value from the output)^2. A head that rests on an exact
            sink reads nothing, whatever its scores of the other tokens are.
        alike: of all queries: a few weigh most of the former, and other texts ask otherwise.
    """

    block: int
    keys: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    weighed: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    alike: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    values: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    kept: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    batch: Callable[[], slice] = field(default=lambda: slice(0, 0))
    heads: int = 0
    chunks: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def begin(self, kept: torch.Tensor, batch: Callable[[], slice], heads: int) -> None:
        """A new layer. kept: bool [rows, length], tokens that do not count. batch: which rows are at hand. heads: those
        that a cache holds, of which JetMoE attends to copies, one after the other; 0: all."""
        self.keys = self.weighed = self.alike = self.values = torch.zeros((), dtype=torch.float64)
        self.kept, self.batch, self.heads = kept, batch, heads

    def attention_rows(self, rows: AttentionRows) -> None:
        """Keep the squares of one batch, of the columns that a query sees: half of the matrix."""
        reach = int(rows.allowed.any(0).nonzero().max()) + 1
        self.chunks.append((rows.start, rows.probabilities[..., :reach].square()))

    def attention(self, record: AttentionRecord) -> None:
        """Add one batch."""
        counted = ~self.kept[self.batch()].to(record.key.device)[:, None, :, None]
        groups, heads = record.query.shape[1] // record.key.shape[1], self.heads or record.key.shape[1]
        values, output = record.value.float().repeat_interleave(groups, dim=1), record.output.float()
        chunks, self.chunks = self.chunks, []
        weight = torch.cat([_moved(squares * counted.mT[..., :squares.shape[3]], values[:, :, :squares.shape[3]],
                                   output[:, :, start:start + squares.shape[2]]) for start, squares in chunks], dim=2)
        queries = record.query.float() * counted
        self.weighed = self.weighed + _of_copies(_moment(_end_to_end(queries * weight.sqrt(), groups)), heads)
        self.alike = self.alike + _of_copies(_moment(_end_to_end(queries, groups)), heads)
        self.keys = self.keys + _moment(_deviations(record.key[:, :heads].float(), counted, self.block))
        self.values = self.values + _moment(_deviations(record.value[:, :heads].float(), counted, counted.shape[2]))


def _of_copies(moment: torch.Tensor, heads: int) -> torch.Tensor:
    """The sum over the copies of every head, [heads, D, D]."""
    return moment.unflatten(0, (-1, heads)).sum(0)


def _end_to_end(queries: torch.Tensor, groups: int) -> torch.Tensor:
    """The query heads that read one KV head, one after the other: [batch, kv_heads, groups * tokens, D]."""
    return queries.unflatten(1, (-1, groups)).flatten(2, 3)


def _even(moment: torch.Tensor) -> torch.Tensor:
    """Of every head with the trace 1; as it is where it is all zeros."""
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    return moment / torch.where(trace > 0, trace, torch.ones_like(trace))


def _moved(squares: torch.Tensor, values: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Sum over tokens t of squares_t |value_t - output|^2, [batch, heads, queries, 1].

    Args:
        squares: of attention, [batch, heads, queries, tokens]. values: [batch, heads, tokens, D].
        output: [batch, heads, queries, D].
    """
    own = squares @ values.square().sum(-1, keepdim=True) - 2 * (squares @ values * output).sum(-1, keepdim=True)
    return (own + squares.sum(-1, keepdim=True) * output.square().sum(-1, keepdim=True)).clamp(min=0)


def _deviations(states: torch.Tensor, counted: torch.Tensor, block: int) -> torch.Tensor:
    """What [batch, heads, tokens, D] differs by from the mean of its block, zero where not counted [batch, 1, tokens,
    1]; the last block may be shorter."""
    parts = []
    for values, some in zip(states.split(block, dim=2), counted.split(block, dim=2), strict=True):
        mean = (values * some).sum(2, keepdim=True) / some.sum(2, keepdim=True).clamp(min=1)
        parts.append((values - mean) * some)
    return torch.cat(parts, dim=2)


def _moment(states: torch.Tensor) -> torch.Tensor:
    """Sum of outer products of [batch, heads, tokens, D], float64 [heads, D, D]."""
    return (states.mT @ states).sum(0).double().cpu()


def save_bases(bases: Bases, path: str | os.PathLike[str]) -> None:
    """Write them as one safetensors file, float32."""
    tensors = {f"{index}.{kind}": basis.matrix.contiguous() for index, layer in bases.layers.items()
               for kind, basis in (("keys", layer.keys), ("values", layer.values)) if basis is not None}
    tensors |= {f"{index}.{DESCENT}": layer.descent.moment.contiguous() for index, layer in bases.layers.items()
                if layer.descent is not None}
    save_ordered(tensors, path, {"schema": SCHEMA, "model": bases.model})


def load_bases(path: str | os.PathLike[str]) -> Bases:
    """Read them back.

    Raises:
        RequestError: there is no such file, or it holds something else.
    """
    facts, tensors = load_ordered(path, SCHEMA, "KV bases", "make the checkpoint again", "there are no")
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, matrix in tensors.items():
        index, _, kind = name.partition(".")
        found.setdefault(int(index), {})[kind] = matrix

    def layer(kinds: dict[str, torch.Tensor]) -> LayerBases:
        keys, values = (Basis.of_matrix(kinds[kind]) if kind in kinds else None for kind in ("keys", "values"))
        return LayerBases(keys, values, Descent(kinds[DESCENT]) if DESCENT in kinds else None)

    return Bases({index: layer(kinds) for index, kinds in found.items()}, facts["model"])


def require_bases_of(bases: Bases, model: PreTrainedModel) -> None:
    """Raises RequestError where they were found with another model, or its embedding is offloaded."""
    require_embedding(model)
    vocabulary = vocabulary_of(model)
    if vocabulary <= max(KNOWN_BY) or fingerprint(model, KNOWN_BY) != bases.model:
        raise RequestError("the KV bases were found with another model; find them again with find_bases.")
