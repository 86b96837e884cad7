"""What computing with packed weights costs in divergence, and what an embedding and a head in 8 or 4 bits cost on top.

    python evals/benchmarks/packed_loss.py [MODEL] [--bits 4] [--group 64] [--rows 32] [--length 256]

Rounds MODEL ("demo" by default) and compares its checkpoint with it on held-out rows: dense, packed, and packed with
`head_bits` 8 and 4. KL divergence from the unquantized model in nats per token, and the paired difference to the dense
checkpoint with its 95 % interval.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import sinkquant as sq
from sinkquant.evaluate.divergence import compare_rows
from sinkquant.evaluate.statistics import paired_difference
from sinkquant.formats import quantize_to
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, read_text, resolve, token_rows
from sinkquant.policy import plan_from_shapes

ROWS: dict[str, dict[str, Any]] = {
    "dense": {}, "packed": {"packed": True}, "packed, head_bits=8": {"packed": True, "head_bits": 8},
    "packed, head_bits=4": {"packed": True, "head_bits": 4}}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    folder = resolve(given.model)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    recipe = sq.Recipe().replace([f"weights.bits={given.bits}", f"weights.group_size={given.group}",
                                  "weights.method=rtn", "protect.tokens=false"])
    rows = token_rows(tokenizer, read_text(None, "evaluation"), given.rows, given.length, "auto",
                      Decoder.of(model).vocabulary, "evaluation text")
    plan, missing = plan_from_shapes(Decoder.of(open_model(folder)).shape(given.model), recipe)
    assert plan is not None, missing
    print("| | KL, nats per token | difference to dense, 95 % interval | weights of bfloat16 |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        quantize_to(out, open_model(folder), plan, tokenizer, recipe=recipe)
        found: dict[str, list[float]] = {}
        for name, settings in ROWS.items():
            other = sq.load(out, **settings)[0]
            found[name] = compare_rows(model, other, rows).kl
            ones = [1.0] * len(rows)
            difference, low, high = paired_difference("kl", (found[name], ones), (found["dense"], ones), 2000, 0)
            share = f"{(packing := sq.packing(other)).bytes / packing.bfloat16_bytes:.3f}" if settings else "1"
            mean = sum(found[name]) / len(rows)
            print(f"| {name} | {mean:.6f} | {difference:.2g}, {low:.2g} to {high:.2g} | {share} |", flush=True)


if __name__ == "__main__":
    main()
