"""Recall over a long context through several KV caches: needles in prose, at all depths and several lengths.

    python evals/benchmarks/kv_recall.py MODEL --lines FILE.jsonl [--sink-map MAP] [--text FILE] [--lengths 1024 4096]
                                         [--contexts 24] [--bits 2 3] [--caches NAME ...]

Sixteen sentences with a number each stand evenly in a text; every one is asked for by the beginning of its sentence.
The text is read once, in one pass without a packed cache, and what it left is packed by every cache in turn: a pass
over a prompt does not see its own packing. The question and its answer (given, up to 16 tokens) are then read through
the cache, by a copy of it each. "recall" is the share of numbers of which every token is the likeliest; "loss" their
mean negative log-likelihood in nats per token. Intervals are paired by contexts. All caches see the same texts. Bits
are counted alike: codes, scales, zeros, windows and unfinished blocks over all numbers of the prompt. "bfloat16"
rounds keys and values to it. "ours" is as small as it gets: groups of 64, scales of 8 bits, a window of 8 tokens.
KIVI and Hadamard are this package's cache with no token exact, groups of 32, scales in float16 and a window of 32.
quanto and hqq are transformers' own, where installed. Lines that are in FILE already are not measured again.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import torch
from kv_caches import BASE, Caches
from measure import RESAMPLES, keep_line, kept_lines, parser_of_lines, sink_map_of
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.cache import Bases, SinkCache
from sinkquant.evaluate import paired_difference
from sinkquant.models import load_model, load_tokenizer, read_text, resolve
from sinkquant.recipe import Recipe

SAYS = ("The number of the red bicycle is", "Ships still call the lighthouse by its code,", "Her locker opens with",
        "The last train leaves from gate", "Doctor Hale wrote down patient", "They rented the cottage at postbox",
        "In the archive, ask for folder", "The winning ticket was", "To reach the harbour office, dial",
        "The stolen painting has inventory mark", "Engine parts are kept on shelf", "My grandfather's regiment was",
        "The password of the old library is", "On the map the well is marked", "The choir sang hymn",
        "Our spaceship was named Aurora")
"""Sentences that end with a number, as unlike each other as needles in prose are; asked for by their beginning."""


@dataclass(frozen=True)
class Haystack:
    """A prompt int64 [1, length], and per needle what asks for it with the answer, int64 [1, tokens], the last
    `answered` of them the answer's."""

    prompt: torch.Tensor
    questions: list[torch.Tensor]
    answered: list[int]


def haystack(tokenizer: PreTrainedTokenizerBase, content: str, length: int, index: int) -> Haystack:
    """The same one for the same length and index every time."""
    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    chance = random.Random(f"{length} {index}")
    asked = [ids(f"\n{says}") for says in chance.sample(SAYS, len(SAYS))]
    answers = [ids(f" {chance.randrange(1000, 10000)}") for _ in asked]
    stop, front = ids(".\n"), tokenizer("")["input_ids"]
    room = length - len(front) - sum(len(q) + len(a) + len(stop) for q, a in zip(asked, answers, strict=True))
    prose = ids(content)
    start = chance.randrange(max(1, len(prose) - room))
    text = prose[start:start + room]
    prompt = list(front)
    for needle, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        begin, end = (len(text) * (needle + part) // len(asked) for part in (0, 1))
        prompt += [*text[begin:end], *question, *answer, *stop]
    return Haystack(torch.tensor([prompt]),
                    [torch.tensor([question + answer]) for question, answer in zip(asked, answers, strict=True)],
                    [len(answer) for answer in answers])


@torch.no_grad()
def recalled(model: PreTrainedModel, cache: Cache, question: torch.Tensor, answered: int) -> tuple[bool, float]:
    """Whether every token of the answer is the likeliest, and its negative log-likelihood, nats per token."""
    logits = model(question, past_key_values=cache, use_cache=True, logits_to_keep=answered + 1).logits
    found, wanted = logits[0, :-1].float().log_softmax(-1), question[0, -answered:]
    return bool((found.argmax(-1) == wanted).all()), float(-found.gather(1, wanted[:, None]).mean())


@torch.no_grad()
def filled(cache: Cache, prompt: torch.Tensor, states: DynamicCache, bases: Bases | None) -> Cache:
    """A cache that has been given what one pass over the prompt left."""
    if isinstance(cache, SinkCache):
        cache.see(prompt, None, (1, prompt.shape[1]), prompt.device, True, bases=bases)
    for index, layer in enumerate(states.layers):
        cache.update(layer.keys, layer.values, index)
    return cache


def forked(cache: Cache) -> Cache:
    """A cache that may be gone on with while the other stays as it is. Layers of transformers replace their tensors."""
    if isinstance(cache, SinkCache):
        return copy.deepcopy(cache)
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, one line per length, bits and cache; differences are to bfloat16 over the contexts that both have."""
    made = ["| tokens | codes | cache | bits per number | numbers | recalled, % | fewer than bfloat16, points | loss "
            "| more than bfloat16 |", "|---:|---:|---|---:|---:|---:|---|---:|---|"]
    base = {(line["length"], line["context"]): line for line in lines if line["cache"] == BASE}
    for length, bits, cache in sorted({(line["length"], line["bits"], line["cache"]) for line in lines}):
        mine = [line for line in lines if (line["length"], line["bits"], line["cache"]) == (length, bits, cache)
                and (length, line["context"]) in base]
        theirs = [base[length, line["context"]] for line in mine]
        count = sum(len(line["recalled"]) for line in mine)
        cells = []
        for name, factor, sign, digits in (("recalled", 100.0, -1, 1), ("loss", 1.0, 1, 3)):
            mean = factor * sum(sum(line[name]) for line in mine) / count
            found = [([float(sum(line[name])) for line in some], [float(len(line[name])) for line in some])
                     for some in (mine, theirs)]
            between = [sign * factor * part for part in paired_difference("kl", found[0], found[1], RESAMPLES, 0)]
            cells += [f"{mean:.{digits}f}", "" if cache == BASE else "{:.{d}f}, {:.{d}f} to {:.{d}f}".format(
                between[0], *sorted(between[1:]), d=digits)]
        made.append(f"| {length} | {bits} | {cache} | {mine[0]['bits_per_number']:.2f} | {count} | "
                    f"{' | '.join(cells)} |")
    return "\n".join(made)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = parser_of_lines(__doc__, "prose; default: the packaged evaluation text")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--bits", type=int, nargs="+", default=[2], help=f"{BASE} is measured with the first alone")
    parser.add_argument("--caches", nargs="*", default=[], metavar="NAME")
    arguments = parser.parse_args()
    lines = kept_lines(arguments.lines)
    known = {(line["length"], line["bits"], line["context"], line["cache"]) for line in lines}
    folder = resolve(arguments.model)
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    sink_map = sink_map_of(arguments, model, tokenizer, Recipe().replace(["detect.super_weights=false"]))
    content = read_text(arguments.text, "evaluation")
    by_bits = {bits: Caches(model, tokenizer, sink_map, bits, arguments.lines.parent) for bits in arguments.bits}
    for length in arguments.lengths:
        named = [(bits, name, *one) for bits, caches in by_bits.items()
                 for name, one in caches.named(length, arguments.caches).items()
                 if name != BASE or bits == arguments.bits[0]]
        for index in range(arguments.contexts):
            missing = [one for one in named if (length, one[0], index, one[1]) not in known]
            if not missing:
                continue
            hay, states = haystack(tokenizer, content, length, index), DynamicCache(config=model.config)
            with torch.no_grad():
                model(hay.prompt, past_key_values=states, use_cache=True, logits_to_keep=1)
            for bits, name, make, per_number in missing:
                cache = filled(make(), hay.prompt, states, by_bits[bits].now)
                found = [recalled(model, forked(cache), question, answered)
                         for question, answered in zip(hay.questions, hay.answered, strict=True)]
                lines.append({"length": length, "bits": bits, "context": index, "cache": name,
                              "bits_per_number": per_number, "recalled": [right for right, _ in found],
                              "loss": [loss for _, loss in found]})
                keep_line(arguments.lines, lines[-1])
    print(table(lines))


if __name__ == "__main__":
    main()
