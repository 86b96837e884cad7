"""A checkpoint of any format that is read here: where it is, what it is called, what it weighs, how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkquant.artifacts import KVCachePlan, SinkMap
from sinkquant.errors import RequestError
from sinkquant.formats import read_checkpoint
from sinkquant.models import resolve
from sinkquant.models.folder import RUN_MODEL, inside_run, method_of, published
from sinkquant.models.gguf import contents, gguf_at
from sinkquant.run.candidates import loader, weight_bytes


@dataclass(frozen=True)
class Checkpoint:
    """One model to be measured.

    Attributes:
        name: short, and of no other one. named: as the user named it. folder: what is loaded.
        bytes: of its tensors' files, or of the tensors in a GGUF file. form: its format in a word or two.
        kv: the packed cache that it is read through. sinks: the sink map that it carries.
        recipe: the recipe that it carries, as read from the file. transformed: whether weights were rotated or rescaled
            before they were rounded. kept: the blocks of the whole model that it has, where some were dropped.
    """

    name: str
    named: str
    folder: Path
    bytes: int
    form: str
    kv: KVCachePlan | None = None
    sinks: SinkMap | None = None
    recipe: dict[str, Any] | None = None
    transformed: bool = False
    kept: list[int] | None = None

    def load(self, dtype: torch.dtype | str, device: str, trust_remote_code: bool = False) -> PreTrainedModel:
        """The model, dense."""
        return loader(self.folder, dtype, device, trust_remote_code)()


def open_checkpoints(named: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints by those names: run folders, model folders, GGUF files, hub ids, or "demo".

    Raises:
        RequestError: one of them is none, or is named twice.
    """
    places = [inside_run(one) for one in named]
    twice = next((one for one in places if places.count(one) > 1), None)
    if twice is not None:
        raise RequestError(f"{twice} is named twice; name every checkpoint once.")
    return [_opened(one, place, name) for one, place, name in zip(named, places, _short_names(places), strict=True)]


def _short_names(places: Sequence[str]) -> list[str]:
    """The last part of every path, or as many parts as tell them apart."""
    parts = [[part for part in Path(place).parts if part != RUN_MODEL] or [place] for place in places]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(places)


def _opened(named: str, place: str, name: str) -> Checkpoint:
    folder = resolve(place)
    packed = gguf_at(place)
    if packed is not None:
        size, _, form = contents(packed)
    else:
        origin = published(place) or folder
        size, form = weight_bytes(origin), method_of(origin) or "unquantized"
    content = read_checkpoint(folder)
    if content is None:
        return Checkpoint(name, named, folder, size, form)
    plan = content["plan"]
    return Checkpoint(name, named, folder, size, form, plan.kv_cache, content["sink_map"] or None,
                      content.get("recipe"), bool(plan.transforms), plan.blocks.kept if plan.blocks else None)
