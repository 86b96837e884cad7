"""The KV caches that benchmarks set side by side, by name, with the bits that a number takes in each.

"ours" is as small as it gets: groups of 64, scales of 8 bits, a window of 8 tokens, rotated by covariance, ranges cut,
codes of a key chosen together; "control" has no token exact and a longer window of the same bytes. "by head" is ours at
`BY_HEAD` bits a number over 4,096 tokens, every head's bits, of `TRIED`, chosen by sensitivities, which are kept beside
the lines.
KIVI and Hadamard are this package's cache with no token exact, groups of 32, scales in float16 and a window of 32.
quanto and hqq are transformers' own, where installed. "bfloat16" rounds keys and values to it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measure import forget_bases
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import QuantizedCache

from sinkquant.artifacts import KVCachePlan, SinkMap
from sinkquant.cache import Bases, SinkCache, load_bases, needs_bases, prepare, save_bases
from sinkquant.evaluate.generation import HalfCache
from sinkquant.models import Decoder
from sinkquant.policy.calibration import calibration_of
from sinkquant.policy.kv_cache import accept_kv, make_kv_control, make_kv_plan
from sinkquant.policy.plan import make_plan
from sinkquant.quantize.bases import cache_bases
from sinkquant.recipe import Recipe
from sinkquant.sensitivity import find_sensitivity

BASE = "bfloat16"
GROUP, WINDOW = 32, 32
PUBLISHED = (f"group_size={GROUP}", f"window={WINDOW}", "scale_bits=16")
SMALLEST = ("group_size=64", "window=8")
OURS = (*SMALLEST, "rotate=covariance", "clip=both", "rounding=descent")
BY_HEAD, TRIED = 2.4, [1, 2, 3, 4, 8]
CODES = ("rotate", "clip", "rounding")
LOOKED_FOR = {"quanto": "optimum.quanto", "hqq": "hqq"}


class Caches:
    """New caches by name, with what a number takes in each."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sink_map: SinkMap, bits: int,
                 folder: Path) -> None:
        self.model, self.tokenizer, self.bits = model, tokenizer, bits
        self.shape, self.sink_map = Decoder.of(model).shape("benchmark"), sink_map
        self.config = model.config
        self.folder = folder
        """Where matrices of the rotations are kept between benchmarks; they depend on neither length nor bits."""
        self.bases: dict[str, Bases | None] = {}
        self.now: Bases | None = None
        """Those of the cache that was made last."""

    def named(self, length: int, wanted: Sequence[str]) -> dict[str, tuple[Callable[[], Cache], float]]:
        """Name -> what makes a cache, and its bits per number for a row of that length, of those that are wanted; no
        name: of all."""
        ours = self._plan(length, *OURS)
        plans = {"ours": ours, "control": make_kv_control(ours), "plain, sinks exact": self._plan(length, *SMALLEST),
                 "ours, nearest codes": self._plan(length, *OURS[:-1]),
                 "ours, keys one bit more": self._plan(length, *OURS, key_bits=self.bits + 1),
                 "ours, values one bit more": self._plan(length, *OURS, value_bits=self.bits + 1),
                 "KIVI": self._plan(length, *PUBLISHED, "exact=none"),
                 "Hadamard": self._plan(length, *PUBLISHED, "exact=none", "rotate=hadamard")}
        if not wanted or {"by head", "by head: control"} & set(wanted):
            by_head = accept_kv(self._by_head().model_copy(update={"length": length}), self.shape)
            plans |= {"by head": by_head, "by head: control": make_kv_control(by_head)}
        found: dict[str, tuple[Callable[[], Cache], float]] = {
            BASE: (lambda: HalfCache(config=self.config), 16.0)}
        for name, plan in plans.items():
            assert plan is not None
            found[name] = (lambda plan=plan: self._packed(plan), plan.bits_per_value)  # type: ignore[misc]
        for name, package in LOOKED_FOR.items():
            if importlib.util.find_spec(package.partition(".")[0]) and importlib.util.find_spec(package):
                axis = 1 if name == "hqq" else 0
                kept = WINDOW / length * (16 - self.bits - 32 / GROUP)
                found[name] = (lambda name=name, axis=axis: QuantizedCache(  # type: ignore[misc]
                    name, self.config, nbits=self.bits, q_group_size=GROUP, residual_length=WINDOW, axis_key=axis,
                    axis_value=axis), self.bits + 32 / GROUP + kept)
        return {name: one for name, one in found.items() if not wanted or name in wanted}

    def _plan(self, length: int, *settings: str, key_bits: int = 0, value_bits: int = 0) -> KVCachePlan:
        made = make_kv_plan(self.shape, self.sink_map, Recipe().replace([
            f"kv_cache.key_bits={key_bits or self.bits}", f"kv_cache.value_bits={value_bits or self.bits}",
            f"kv_cache.length={length}", *(f"kv_cache.{one}" for one in settings)]))
        assert made is not None
        return made

    def _by_head(self) -> KVCachePlan:
        """The same whatever the length, which decides what it weighs."""
        recipe = Recipe().replace(["weights.ignore=['*']", f"kv_cache.bits={BY_HEAD}", f"sensitivity.kv_bits={TRIED}",
                                   *(f"kv_cache.{one}" for one in OURS if one.partition("=")[0] in CODES)])
        costs = find_sensitivity(self.model, self.tokenizer, self.sink_map, recipe, self.folder / "kv-costs.json")
        made = make_plan(self.shape, self.sink_map, recipe, costs).kv_cache
        assert made is not None
        return made

    def _packed(self, plan: KVCachePlan) -> SinkCache:
        key = f"{plan.rotate} {plan.exact} {plan.rounding}"  # those of the control are others
        if key not in self.bases and needs_bases(plan):
            path = self.folder / f"bases {key}.safetensors"
            if not path.is_file():
                made = cache_bases(Decoder.of(self.model), plan, calibration_of(Recipe(), None), self.tokenizer,
                                   "cpu", torch.float32)
                assert made is not None
                save_bases(made, path)
            self.bases[key] = load_bases(path)
        forget_bases(self.model)
        self.now = self.bases.get(key)
        prepare(self.model, bases=self.now)
        return SinkCache(self.config, plan)
