"""What a number takes in several KV caches at several lengths: codes, scales, zeros, windows, exact tokens counted.

    python evals/benchmarks/kv_bits.py MODEL --sink-map MAP [--lengths 1024 4096 8192] [--bits 2] [--caches NAME ...]

Nothing is computed: the caches are planned, and `cache_bytes` counts what they will hold to the byte. The caches are
those of `kv_caches.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kv_caches import Caches

from sinkquant.artifacts import SinkMap
from sinkquant.models import load_model, load_tokenizer, resolve


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sink-map", required=True, help="of this model, made before")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--caches", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path(), help="where sensitivities and rotations are kept")
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    caches = Caches(load_model(folder), load_tokenizer(folder), SinkMap.load(arguments.sink_map), arguments.bits,
                    arguments.folder)
    found = [caches.named(length, arguments.caches) for length in arguments.lengths]
    print("| cache | " + " | ".join(f"{length:,}" for length in arguments.lengths) + " |")
    print("|---|" + "---:|" * len(arguments.lengths))
    for name in found[0]:
        print(f"| {name} | " + " | ".join(f"{named[name][1]:.2f}" for named in found) + " |")


if __name__ == "__main__":
    main()
