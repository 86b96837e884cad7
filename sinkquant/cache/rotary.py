"""Moving a key to another position: what a sink needs when the tokens between it and the window are dropped.

StreamingLLM (2309.17453, section 3.2) counts positions as in the cache. Attention sees differences of positions only,
so moving the few sinks forward by the number of dropped tokens is the same as moving everything else back.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.models import Decoder
from sinkquant.models.hooks import evaluating
from sinkquant.models.shrunk import shrunk

WIDTH = 64
"""Of the tiny model that is tried in place of a large one."""


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding (RoFormer 2104.09864) in halves: channel i turns with channel i + len(frequencies).

    Attributes:
        frequencies: float32 [rotated channels / 2], radians per position.
    """

    frequencies: torch.Tensor

    def move(self, keys: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Keys [batch, heads, tokens, head_dim], each moved by its own number of positions, int [batch, tokens]."""
        half = len(self.frequencies)
        angles = by[:, None, :, None] * self.frequencies.to(keys.device, torch.float64)
        cos, sin = angles.cos().float(), angles.sin().float()
        x = keys.float()
        first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(keys.dtype)


def rotary_of(model: PreTrainedModel) -> Rotary:
    """The rotary embedding of a model, tried out before it is trusted.

    Raises:
        RequestError: positions are something else than one rotary embedding in halves with fixed frequencies.
    """
    rotary = _only_rotary(model)
    if not _all_rotate(model, rotary):
        raise _refusal_of_layers(model)
    return rotary


def require_rotary(model: PreTrainedModel) -> None:
    """Refuse a model without `rotary_of` before anything is computed: layers are tried in a tiny random model alike.

    Raises:
        RequestError: as `rotary_of`.
    """
    _only_rotary(model)
    try:
        with torch.random.fork_rng(devices=[]):
            small = type(model)._from_config(shrunk(model.config, range(len(Decoder.of(model).blocks)), WIDTH),
                                             dtype=torch.float32).eval()
        known = _all_rotate(small, _only_rotary(small))
    except Exception:  # its configuration cannot be cut down: the first pass through the cache tries the model itself
        return
    if not known:
        raise _refusal_of_layers(model)


def _refusal_of_layers(model: PreTrainedModel) -> RequestError:
    return RequestError(f"kv_cache.evict moves sinks by rotary positions, and some layers of {type(model).__name__} "
                        "have none; leave kv_cache.evict out.")


def _only_rotary(model: PreTrainedModel) -> Rotary:
    """The one rotary embedding that a model has; no weight is read."""
    refusal = RequestError(f"kv_cache.evict moves sinks by rotary positions, which {type(model).__name__} does not "
                           "have in a form that is known here; leave kv_cache.evict out.")
    modules = [module for module in model.modules() if hasattr(module, "inv_freq") and hasattr(module, "rope_type")]
    apply = getattr(sys.modules[type(Decoder.of(model).blocks[0]).__module__], "apply_rotary_pos_emb", None)
    if len(modules) != 1 or apply is None or modules[0].rope_type in ("dynamic", "longrope"):
        raise refusal
    rotary = Rotary(modules[0].inv_freq.detach().float())
    device = rotary.frequencies.device
    key = torch.linspace(-1, 1, 2 * len(rotary.frequencies), device=device)[None, None, None]
    turned = []
    try:
        for position in (3, 10):
            cos, sin = modules[0](key, torch.tensor([[position]], device=device))
            turned.append(apply(key, key, cos, sin)[1])
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise refusal from error
    seven = torch.tensor([[7]], device=device)
    if turned[0].shape != key.shape or not torch.allclose(rotary.move(turned[0], seven), turned[1], atol=1e-4):
        raise refusal
    return rotary


def _all_rotate(model: PreTrainedModel, rotary: Rotary) -> bool:
    """Whether the keys of every layer are rotated: those of a row of one token differ by nothing else between two
    positions."""
    token = torch.tensor([[Decoder.of(model).vocabulary // 2]], device=model.device)
    seven = torch.tensor([[7]], device=model.device)

    def keys_at(position: int) -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        # Without the head: who watches that would take this for a pass of the text.
        model.base_model(token, position_ids=torch.full_like(token, position), past_key_values=cache, use_cache=True)
        return [keys.float() for layer in cache.layers if (keys := getattr(layer, "keys", None)) is not None]

    with evaluating(model), torch.no_grad():
        pairs = list(zip(keys_at(3), keys_at(10), strict=True))
    return all((rotary.move(one, seven) - other).abs().max() <= 0.02 * other.abs().max() for one, other in pairs)
