"""Experts that stay on disk while rows walk through their block: one of them is in memory at a time.

A layer's experts are handed all tokens and, for every token, the experts that it goes to. That is recorded for all rows
first; then every expert is read once, makes what it makes of its tokens, and goes. What came out is handed back when
the rows are replayed. An expert is run by transformers' own code: a copy of the layer's module that holds it alone.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sinkquant.models.activations import ActivationStore
from sinkquant.models.alone import StoredPart, stored_parts
from sinkquant.models.decoder import Decoder
from sinkquant.models.experts import ExpertLinear, fused_by_owner, handed_to_experts, shares_of, those_chosen
from sinkquant.models.handed import RoutedTokens
from sinkquant.models.shards import StoredTensor
from sinkquant.models.source import WeightSource, require_finite

LARGE = 1 << 25
"""A layer's experts that have no more weights together are in memory with their block."""
TOKENS = 4096
"""Tokens that go through an expert at a time."""


@dataclass
class ExpertsOnDisk:
    """One layer's experts.

    Attributes:
        owner: module name. module: transformers' module, whose parameters are on the meta device.
        parts: name -> projection of one expert; empty where they cannot be told apart.
        readers: parameter of the module -> what gives the slice of one expert, in the parameter's dtype.
        alone: where projections of experts are found while they are in memory, `Decoder.alone`.
        device, dtype: where and in which precision experts compute.
        changed: parameter of the module -> its new values in its own dtype, [experts, ...], for the experts in `done`.
        answers: what the experts make of the rows to come, [tokens, hidden_size], or None; `answered` of the tokens
            have come.
        silent: whether they make zeros for now.
    """

    owner: str
    module: nn.Module
    parts: dict[str, ExpertLinear]
    readers: dict[str, Callable[[int], torch.Tensor]]
    alone: dict[str, torch.Tensor]
    device: str
    dtype: torch.dtype
    store: ActivationStore
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    held: dict[int, nn.Module] = field(default_factory=dict)
    answers: torch.Tensor | None = None
    answered: int = 0
    silent: bool = False

    @contextlib.contextmanager
    def holding(self, index: int) -> Iterator[nn.Module]:
        """Hold one expert in memory while the context is open: the module with that expert as its only one. What is
        done to its weights is lost at the end, unless it is `keep`t.

        Raises:
            RequestError: a weight holds NaN or Inf.
        """
        if index in self.held:
            yield self.held[index]
            return
        one = copy.copy(self.module)
        one.__dict__.pop("forward", None)
        one.num_experts = 1  # type: ignore[assignment]
        one._parameters = {leaf: nn.Parameter(self._slice(leaf, index).to(self.device, self.dtype)[None],
                                              requires_grad=False) for leaf in self.readers}
        mine = {name: part for name, part in self.parts.items() if part.index == index}
        self.held[index] = one
        self.alone |= {name: one.get_parameter(part.leaf).data[0, part.start:part.start + part.rows]
                       for name, part in mine.items()}
        try:
            yield one
        finally:
            del self.held[index]
            for name in mine:
                del self.alone[name]

    def keep(self, index: int) -> None:
        """From now on this expert is as the one that is held."""
        for leaf in self.readers:
            given = self.module.get_parameter(leaf)
            if leaf not in self.changed:
                self.changed[leaf] = self.store.empty(tuple(given.shape), given.dtype)
            self.changed[leaf][index] = self.held[index].get_parameter(leaf).data[0].to("cpu", given.dtype)
        self.done.add(index)

    def whole(self, leaf: str) -> torch.Tensor:
        """A parameter with all experts as they are now, in its own dtype; in the store, where it is large."""
        for index in range(len(self.module.get_parameter(leaf))):
            if index not in self.done:
                with self.holding(index):
                    self.keep(index)
        return self.changed[leaf]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What transformers calls in place of the module's own forward."""
        states, chosen = handed_to_experts(args, kwargs)
        if self.silent:
            made = torch.zeros_like(states)
        elif self.answers is not None:
            made = self.answers[self.answered:self.answered + len(states)].to(states)
            self.answered += len(states)
        else:
            made = self.run([RoutedTokens(states, chosen, shares_of(args, kwargs))], [torch.zeros_like(states)])[0]
        return made.reshape(next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)).shape)

    def run(self, handed: Sequence[RoutedTokens], out: list[torch.Tensor]) -> list[torch.Tensor]:
        """Add to `out` what the experts make of some sets of tokens, one expert after the other. out: for every set
        [tokens, hidden_size]."""
        count = len(self.module.get_parameter(next(iter(self.readers))))
        for index in those_chosen(torch.cat([given.chosen.flatten() for given in handed]), count):
            with self.holding(index) as one:
                for given, made in zip(handed, out, strict=True):
                    self._add(one, index, given, made)
        return out

    def _add(self, one: nn.Module, index: int, given: RoutedTokens, out: torch.Tensor) -> None:
        tokens, slots = torch.where(given.chosen == index)
        for token, slot in zip(tokens.split(TOKENS), slots.split(TOKENS), strict=True):
            share = given.shares[token, slot][:, None].to(self.device)
            made = type(one).forward(one, given.states[token].to(self.device, self.dtype),
                                     torch.zeros_like(share, dtype=torch.long), share)
            out.index_add_(0, token.to(out.device), made.to(out.device, out.dtype))

    def _slice(self, leaf: str, index: int) -> torch.Tensor:
        if index in self.done:
            return self.changed[leaf][index].clone()
        return self.readers[leaf](index)


def find_on_disk(decoder: Decoder, block: str, device: str = "cpu", dtype: torch.dtype = torch.float32,
                 store: ActivationStore | None = None) -> list[ExpertsOnDisk]:
    """The experts of a block that can stay on disk and are large: their output is the sum of what each makes of a
    token, and the weights of each can be read by themselves. None in a model that holds its weights."""
    found: list[ExpertsOnDisk] = []
    if decoder.source is None:
        return found
    for owner, fused in fused_by_owner(decoder.model, (block,)).items():
        module = decoder.model.get_submodule(owner)
        if sum(one.numel() for one in fused.values()) <= LARGE or not _adds_up(module):
            continue
        mine = {name: part for name, part in decoder.experts.items() if part.owner == owner}
        readers = _readers(decoder.source, owner, module, mine)
        if readers is not None:
            found.append(ExpertsOnDisk(owner, module, mine, readers, decoder.alone, device, dtype,
                                       store or ActivationStore()))
    return found


@contextlib.contextmanager
def one_expert(module: nn.Module, index: int, on_disk: ExpertsOnDisk | None) -> Iterator[tuple[nn.Module, int]]:
    """A module that holds an expert, and the expert's index in there. on_disk: the experts, if not in memory."""
    if on_disk is None:
        yield module, index
        return
    with on_disk.holding(index) as one:
        yield one, 0


def _adds_up(module: nn.Module) -> bool:
    """Whether transformers gives it the tokens' experts and shares, and every parameter has a slice per expert."""
    known = hasattr(module, "has_gate") and not getattr(module, "has_post_expert_norm", False)
    count = getattr(module, "num_experts", None)
    return known and all(len(parameter) == count for parameter in module.parameters()) and not any(
        True for child in module.children() for _ in child.parameters())


def _readers(source: WeightSource, owner: str, module: nn.Module,
             parts: Mapping[str, ExpertLinear]) -> dict[str, Callable[[int], torch.Tensor]] | None:
    """Parameter -> what reads the slice of an expert; None where one of them can only be read as a whole."""
    found: dict[str, Callable[[int], torch.Tensor]] = {}
    stored = stored_parts(source, parts)
    for leaf, parameter in module.named_parameters():
        name = f"{owner}.{leaf}"
        names: dict[int, list[str]] = {}
        for part, one in parts.items():
            if one.leaf == leaf:
                names.setdefault(one.index, []).append(part)
        if len(names) == len(parameter) and all(part in stored for each in names.values() for part in each):
            found[leaf] = _by_parts({index: [stored[part] for part in each] for index, each in names.items()})
            continue
        whole = source.stored(name)
        if parts or not isinstance(whole, StoredTensor):
            return None
        found[leaf] = _by_slices(name, whole, parameter.dtype)
    return found


def _by_parts(parts: Mapping[int, Sequence[StoredPart]]) -> Callable[[int], torch.Tensor]:
    return lambda index: torch.cat([part.read() for part in parts[index]])


def _by_slices(name: str, whole: StoredTensor, dtype: torch.dtype) -> Callable[[int], torch.Tensor]:
    def read(index: int) -> torch.Tensor:
        values = whole.rows(index, index + 1)[0].to(dtype)
        require_finite(name, values)
        return values

    return read
