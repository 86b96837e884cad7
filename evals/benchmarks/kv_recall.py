"""Recall over a long context through several KV caches: a needle in prose, at several depths and lengths.

    python evals/benchmarks/kv_recall.py MODEL --lines FILE.jsonl [--sink-map MAP] [--text FILE] [--lengths 1024 4096]
                                         [--depths 0.1 0.5 0.9] [--bits 2] [--caches NAME ...] [--needles 2]

A sentence with a number stands at a depth of a text, and the text ends with the beginning of the same sentence. The
prompt up to there is read in one pass, what follows token by token through the cache. "recall" is the share of needles
of whose number every token is the likeliest; "loss" its mean negative log-likelihood in nats per token. All caches see
the same prompts. Bits are counted alike: codes, scales, zeros, windows and unfinished blocks over all numbers of the
prompt. "ours" is as small as it gets: groups of 64, scales of 8 bits, a window of 8 tokens. KIVI and Hadamard are this
package's cache with no token exact, groups of 32, scales in float16 and a window of 32. quanto and hqq are
transformers' own, where installed. Lines that are in FILE already are not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import forget_bases, keep_line, kept_lines
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import QuantizedCache

from sinkquant.artifacts import KVCachePlan, SinkMap
from sinkquant.cache import Bases, SinkCache, prepare
from sinkquant.detect import detect
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve
from sinkquant.policy.kv_cache import make_kv_control, make_kv_plan
from sinkquant.policy.plan import calibration_of
from sinkquant.quantize.bases import cache_bases
from sinkquant.recipe import Recipe

GROUP, WINDOW = 32, 32
PUBLISHED = (f"group_size={GROUP}", f"window={WINDOW}", "scale_bits=16")
SMALLEST = ("group_size=64", "window=8")
SAYS = "The number of the {place} is"
PLACES = ("old lighthouse", "red bicycle", "second bridge", "northern gate", "small orchard", "white boat")
LOOKED_FOR = {"quanto": "optimum.quanto", "hqq": "hqq"}


def haystacks(tokenizer: PreTrainedTokenizerBase, content: str, length: int, depth: float,
              count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(prompt int64 [1, tokens], answer int64 [1, tokens]) of every needle; the texts differ, and are the same every
    time."""
    prose = tokenizer(content, add_special_tokens=False)["input_ids"]
    front = tokenizer("")["input_ids"]
    for index in range(count):
        chance = random.Random(f"{length} {depth} {index}")
        says, number = SAYS.format(place=PLACES[index % len(PLACES)]), str(chance.randrange(1000, 10000))
        asked = tokenizer(f"\n{says}", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" {number}", add_special_tokens=False)["input_ids"]
        stop = tokenizer(".\n", add_special_tokens=False)["input_ids"]
        room = length - len(front) - 2 * len(asked) - 2 * len(answer) - len(stop)
        start = chance.randrange(max(1, len(prose) - room))
        text = prose[start:start + room]
        place = int(depth * len(text))
        ids = [*front, *text[:place], *asked, *answer, *stop, *text[place:], *asked]
        yield torch.tensor([ids]), torch.tensor([answer])


@torch.no_grad()
def recalled(model: PreTrainedModel, cache: Cache, prompt: torch.Tensor, answer: torch.Tensor) -> tuple[bool, float]:
    """Whether every token of the answer is the likeliest, and its negative log-likelihood, nats per token.

    The last tokens of the prompt go through the packed cache too, as everything that follows it: while they are read
    with the rest, the question would be answered before anything is packed.
    """
    asked = 8
    model(prompt[:, :-asked], past_key_values=cache, use_cache=True, logits_to_keep=1)
    rest = torch.cat([prompt[:, -asked:], answer], dim=1)
    logits = [model(token, past_key_values=cache, use_cache=True).logits[0] for token in rest.split(1, dim=1)]
    found = torch.cat(logits)[asked - 1:-1].float().log_softmax(-1)
    wanted = answer[0]
    return bool((found.argmax(-1) == wanted).all()), float(-found.gather(1, wanted[:, None]).mean())


class Caches:
    """New caches by name, with what a number takes in each."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sink_map: SinkMap,
                 bits: int) -> None:
        self.model, self.tokenizer, self.bits = model, tokenizer, bits
        self.shape, self.sink_map = Decoder.of(model).shape("benchmark"), sink_map
        self.config = model.config
        self.bases: dict[str, Bases | None] = {}

    def named(self, length: int) -> dict[str, tuple[Callable[[], Cache], float]]:
        """Name -> what makes a cache, and its bits per number for a row of that length."""
        ours = self._plan(length, *SMALLEST, "rotate=covariance", "clip=both")
        plans = {"ours": ours, "control": make_kv_control(ours), "plain, sinks exact": self._plan(length, *SMALLEST),
                 "KIVI": self._plan(length, *PUBLISHED, "exact=none"),
                 "Hadamard": self._plan(length, *PUBLISHED, "exact=none", "rotate=hadamard")}
        found: dict[str, tuple[Callable[[], Cache], float]] = {
            "unquantized": (lambda: DynamicCache(config=self.config), 16.0)}
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
        return found

    def _plan(self, length: int, *settings: str) -> KVCachePlan:
        made = make_kv_plan(self.shape, self.sink_map, Recipe().replace([
            f"kv_cache.key_bits={self.bits}", f"kv_cache.value_bits={self.bits}",
            f"kv_cache.length={length}", *(f"kv_cache.{one}" for one in settings)]))
        assert made is not None
        return made

    def _packed(self, plan: KVCachePlan) -> SinkCache:
        key = f"{plan.rotate} {plan.exact}"  # those of the control are others
        if key not in self.bases:
            self.bases[key] = cache_bases(Decoder.of(self.model), plan, calibration_of(Recipe(), None), self.tokenizer,
                                          "cpu", torch.float32)
        forget_bases(self.model)
        prepare(self.model, bases=self.bases[key])
        return SinkCache(self.config, plan)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, one line per length and cache."""
    made = ["| tokens | cache | bits per number | recall | loss |", "|---:|---|---:|---:|---:|"]
    for length, cache in dict.fromkeys((line["length"], line["cache"]) for line in lines):
        mine = [line for line in lines if (line["length"], line["cache"]) == (length, cache)]
        made.append(f"| {length} | {cache} | {mine[0]['bits_per_number']:.2f} | "
                    f"{sum(line['recalled'] for line in mine)} of {len(mine)} | "
                    f"{sum(line['loss'] for line in mine) / len(mine):.3f} |")
    return "\n".join(made)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lines", type=Path, required=True, help="one JSON object per line; gone on with")
    parser.add_argument("--sink-map", help="of this model, made before")
    parser.add_argument("--text", help="prose; default: the packaged evaluation text")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--needles", type=int, default=2)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--caches", nargs="*", default=[], metavar="NAME")
    arguments = parser.parse_args()
    lines = kept_lines(arguments.lines)
    known = {(line["length"], line["depth"], line["needle"], line["cache"]) for line in lines}
    folder = resolve(arguments.model)
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    sink_map = (SinkMap.load(arguments.sink_map) if arguments.sink_map else
                detect(model, tokenizer, recipe=Recipe().replace(["detect.super_weights=false"])))
    caches = Caches(model, tokenizer, sink_map, arguments.bits)
    content = read_text(arguments.text, "evaluation")
    for length in arguments.lengths:
        for name, (make, bits) in caches.named(length).items():
            for depth in arguments.depths if not arguments.caches or name in arguments.caches else []:
                for needle, (prompt, answer) in enumerate(haystacks(tokenizer, content, length, depth,
                                                                    arguments.needles)):
                    if (length, depth, needle, name) in known:
                        continue
                    right, loss = recalled(model, make(), prompt, answer)
                    lines.append({"length": length, "depth": depth, "needle": needle, "cache": name,
                                  "bits_per_number": bits, "recalled": right, "loss": loss})
                    keep_line(arguments.lines, lines[-1])
    print(table(lines))


if __name__ == "__main__":
    main()
