"""What each transform of the KV cache is worth, alone and together: divergence beside the plain cache of its bits.

    python evals/benchmarks/kv_transforms.py MODEL --lines FILE.jsonl [--sink-map MAP] [--text FILE] [--bits 2 3]
                                             [--groups 32 64] [--rows 6] [--length 512] [--window 32] [--scale-bits 8]
                                             [--only NAME ...]

Weights are untouched; every row is read through the packed cache in chunks, as decoding would read it. Lines of the
table keep the sinks of the map exact, "no token exact" ones do not; controls spend their bytes on a longer
window. Lines that are in FILE already are not measured again, so that a run may be stopped and gone on with.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from measure import forget_bases, keep_line, kept_lines, parser_of_lines, sink_map_of

from sinkquant.artifacts import KVCachePlan
from sinkquant.cache import prepare
from sinkquant.evaluate.divergence import compare_side_by_side
from sinkquant.evaluate.states import last_states
from sinkquant.evaluate.statistics import paired_difference
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.policy.calibration import calibration_of
from sinkquant.policy.kv_cache import make_kv_control, make_kv_plan
from sinkquant.quantize.bases import cache_bases
from sinkquant.recipe import Recipe

SETTINGS: dict[str, list[str]] = {
    "plain": [],
    "keys: hadamard": ["rotate=hadamard", "rotate_values=none"],
    "keys: covariance": ["rotate=covariance", "rotate_values=none"],
    "keys: unit length": ["scale_tokens=true"],
    "keys: cut": ["clip=keys"],
    "keys: covariance, cut": ["rotate=covariance", "rotate_values=none", "clip=keys"],
    "values: hadamard": ["rotate_values=hadamard"],
    "values: covariance": ["rotate_values=covariance"],
    "values: cut": ["clip=values"],
    "hadamard": ["rotate=hadamard"],
    "hadamard, cut": ["rotate=hadamard", "clip=both"],
    "covariance": ["rotate=covariance"],
    "covariance, cut": ["rotate=covariance", "clip=both"],
    "covariance, cut, together": ["rotate=covariance", "clip=both", "rounding=descent"],
    "covariance, cut, unit length": ["rotate=covariance", "clip=both", "scale_tokens=true"],
    "covariance, cut, symmetric": ["rotate=covariance", "clip=both", "symmetric=true"],
}
BATCH = 2


class Bench:
    """A model, its rows, and what the unquantized one predicts on them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        folder = resolve(arguments.model)
        self.tokenizer = load_tokenizer(folder)
        self.base, self.other = (load_model(folder, torch.float32) for _ in range(2))
        self.recipe = Recipe().replace(["detect.super_weights=false", f"kv_cache.window={arguments.window}",
                                        f"kv_cache.scale_bits={arguments.scale_bits}",
                                        f"kv_cache.length={arguments.length}"])
        self.sink_map = sink_map_of(arguments, self.base, self.tokenizer, self.recipe)
        self.shape = Decoder.of(self.base).shape(arguments.model)
        rows = token_rows(self.tokenizer, read_text(arguments.text, "evaluation"), arguments.rows, arguments.length)
        self.batches = rows.split(BATCH)
        self.states = [last_states(self.base, batch) for batch in self.batches]

    def plan(self, bits: int, group: int, settings: list[str]) -> KVCachePlan:
        """The cache with these settings."""
        made = make_kv_plan(self.shape, self.sink_map, self.recipe.replace([
            f"kv_cache.key_bits={bits}", f"kv_cache.value_bits={bits}", f"kv_cache.group_size={group}",
            *(f"kv_cache.{one}" for one in settings)]))
        assert made is not None
        return made

    def measured(self, plan: KVCachePlan) -> dict[str, list[float]]:
        """Divergence and added loss of every row."""
        forget_bases(self.other)
        prepare(self.other, bases=cache_bases(Decoder.of(self.base), plan, calibration_of(self.recipe, None),
                                              self.tokenizer, "cpu", torch.float32))
        found = compare_side_by_side(self.base, self.states, [(self.other, plan)], self.batches)[0]
        return {"kl": found.kl, "added": [loss - before for loss, before in
                                          zip(found.other_loss, found.baseline_loss, strict=True)]}


def plans(bench: Bench, bits: int, group: int, only: list[str]) -> dict[str, KVCachePlan]:
    """Name -> plan of every line; controls and unprotected twins of the first and of the best."""
    found = {name: bench.plan(bits, group, settings) for name, settings in SETTINGS.items()
             if not only or name in only}
    for name in ("plain", "hadamard", "covariance, cut", "covariance, cut, together"):
        if name in found:
            control = make_kv_control(found[name])
            assert control is not None
            found[f"{name}: control"] = control
            found[f"{name}: no token exact"] = bench.plan(bits, group, [*SETTINGS[name], "exact=none"])
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown; differences are to the plain cache of the same bits and groups, paired by rows."""
    made = ["| bits | group | cache | bytes | bits per number | KL | of plain | less than plain, 95 % interval "
            "| loss added, 95 % interval |",
            "|---:|---:|---|---:|---:|---:|---:|---|---|"]
    plain = {(line["bits"], line["group"]): line for line in lines if line["cache"] == "plain"}
    for line in sorted(lines, key=lambda one: (one["bits"], one["group"])):
        mean = sum(line["kl"]) / len(line["kl"])
        base = plain.get((line["bits"], line["group"]))
        of, gain, ones = "", "", [1.0] * len(line["kl"])
        if base is not None and base is not line:
            difference, low, high = paired_difference("kl", (base["kl"], ones), (line["kl"], ones), 2000, 0)
            of, gain = f"{mean / (sum(base['kl']) / len(ones)):.2f}", f"{difference:.4f}, {low:.4f} to {high:.4f}"
        added, low, high = paired_difference("kl", (line["added"], ones), ([0.0] * len(ones), ones), 2000, 0)
        made.append(f"| {line['bits']} | {line['group']} | {line['cache']} | {line['bytes']:,} | "
                    f"{line['bits_per_number']:.2f} | {mean:.5f} | {of} | {gain} | "
                    f"{added:.4f}, {low:.4f} to {high:.4f} |")
    return "\n".join(made)


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = parser_of_lines(__doc__, "held-out text; default: the packaged one")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--groups", type=int, nargs="+", default=[32])
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--scale-bits", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(SETTINGS)}")
    arguments = parser.parse_args()
    lines = kept_lines(arguments.lines)
    known = {(line["bits"], line["group"], line["cache"]) for line in lines}
    bench = Bench(arguments)
    for bits in arguments.bits:
        for group in arguments.groups:
            for name, plan in plans(bench, bits, group, arguments.only).items():
                if (bits, group, name) in known:
                    continue
                lines.append({"bits": bits, "group": group, "cache": name, "bytes": plan.bytes,
                              "bits_per_number": plan.bits_per_value, **bench.measured(plan)})
                keep_line(arguments.lines, lines[-1])
    print(table(lines))


if __name__ == "__main__":
    main()
