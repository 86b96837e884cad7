"""A plan for a GGUF file -> the types that `llama-quantize` is told, tensor by tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sinkquant.artifacts import ModelShape, Plan
from sinkquant.artifacts.sizes import checkpoint_tensors
from sinkquant.errors import RequestError
from sinkquant.recipe import Recipe
from sinkquant.schemes import scheme_of
from sinkquant.schemes.gguf import BACKEND, Blocks
from sinkquant.schemes.gguf.layout import aligned
from sinkquant.schemes.gguf.metadata import family_of

NOTHING_PACKED = ("the plan packs no linear, so that llama-quantize has nothing to be told; quantize some, or leave "
                  "--tensor-types out.")


@dataclass(frozen=True)
class TensorTypes:
    """Of the matrices of a file.

    Attributes:
        kinds: tensor of the file -> ggml's name of its type.
        bytes: of the data of all tensors, norms in float32 and what fills up to the next tensor included; the header is
            that of the file that is quantized.
    """

    kinds: Mapping[str, str]
    bytes: int

    @property
    def most(self) -> str:
        """The type of most matrices that are packed, as `llama-quantize` wants one for the rest."""
        packed = [kind for kind in self.kinds.values() if kind not in ("f32", "f16", "bf16")]
        return Counter(packed).most_common(1)[0][0].upper()

    def text(self) -> str:
        """What `--tensor-type-file` reads: a pattern and a type on every line."""
        return "".join(f"^{re.escape(name)}$={kind}\n" for name, kind in self.kinds.items())


def check_tensor_types(recipe: Recipe, target: Path) -> None:
    """Refuse what no types can be written of, before anything is computed.

    Args:
        target: the file to write.

    Raises:
        RequestError: no GGUF file is planned, or one that llama-quantize does not make, or there is no place for the
            types.
    """
    if recipe.backend != BACKEND:
        raise RequestError(f"llama-quantize makes GGUF files, and the recipe is for {recipe.backend}; use one with "
                           f"backend={BACKEND}, as gguf-iq4-sink.")
    if not recipe.methods:
        raise RequestError(NOTHING_PACKED)
    others = [f"weights.{key}" for key in ("rotate", "smooth") if getattr(recipe.weights, key) != "none"]
    _require_rounding_alone("recipe", [*others, *(["pruning"] if recipe.prune.zeros else [])])
    if not target.parent.is_dir() or target.is_dir():
        raise RequestError(f"{target} cannot be written as a file; name one in a folder that there is.")


def tensor_types(plan: Plan, shape: ModelShape) -> TensorTypes:
    """The types of a plan's matrices.

    Raises:
        RequestError: the plan does what llama-quantize cannot: it rounds, and nothing else.
    """
    if not plan.formats:
        raise RequestError(NOTHING_PACKED)
    scheme = scheme_of(next(iter(plan.formats.values())))
    assert isinstance(scheme, Blocks)
    others: list[str] = [transform.name for transform in plan.transforms]
    if any(decision.prune is not None for decision in plan.modules.values()) or plan.silenced_heads:
        others.append("pruning")
    _require_rounding_alone("plan", others)
    tensors = {name: tensor for name, tensor in checkpoint_tensors(shape, plan.formats).items()
               if name not in shape.carried}
    found = scheme.file_tensors(tensors, family_of(shape.architecture), Path(str(shape.folder)))
    return TensorTypes({name: one.kind.lower() for name, one in found.items() if len(one.shape) > 1},
                       sum(aligned(one.bytes) for one in found.values()))


def _require_rounding_alone(what: str, others: list[str]) -> None:
    if others:
        raise RequestError(f"llama-quantize rounds weights and does nothing else, and the {what} has "
                           f"{' and '.join(others)}; leave that out.")
