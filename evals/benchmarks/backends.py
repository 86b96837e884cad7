"""Every backend's checkpoint beside its sink-unaware control of the same size: bytes on disk, mean KL divergence and
perplexity on held-out rows with paired intervals, and the speed of greedy decoding.

    python evals/benchmarks/backends.py MODEL [--formats nf4 "quanto-int4" ...] [--held-out 32] [--set KEY=VALUE ...]
                                        [--lines FILE.jsonl]

Checkpoints are written as a run writes them, read back with `sinkquant.load` to be measured in float32, and read back
with the backend's own loader in bfloat16 to be timed: tokens per second of processor time, with the threads that torch
was given. compressed-tensors unpacks its weights before the first token; a gptq checkpoint is read by sinkquant, as
gptqmodel is not needed here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Baseline, Line, Lines, table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sinkquant.artifacts import Plan
from sinkquant.detect import detect
from sinkquant.formats import load_dense, save
from sinkquant.models import Decoder, load_model, load_tokenizer, read_text, resolve, token_rows
from sinkquant.policy import make_control, make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

PROMPT, TOKENS, ROUNDS = 64, 33, 2
FORMATS = {
    "gptq-w4": ("w4a16-sink", []), "rtn-w4": ("w4a16-sink-rtn", []),
    "gptq-format-w4": ("gptq-w4-sink", []), "nf4": ("nf4-sink", []),
    "nf4-double": ("nf4-sink", ["weights.double_quantization=true"]),
    "fp4": ("nf4-sink", ["weights.format=fp4"]), "llm.int8": ("int8-bnb-sink", []),
    "quanto-int2": ("quanto-w4-sink", ["weights.bits=2"]), "quanto-int4": ("quanto-w4-sink", []),
    "quanto-int8": ("quanto-w4-sink", ["weights.bits=8", "weights.group_size=-1", "protect.bits=16"]),
    "quanto-float8": ("quanto-w4-sink", ["weights.format=float8", "weights.bits=8", "weights.group_size=-1",
                                         "protect.bits=16"])}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--held-out", type=int, default=32, help="held-out rows")
    parser.add_argument("--text", help="held-out text; default: the packaged one")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of every recipe")
    parser.add_argument("--lines", type=Path, help="keep what was measured here (measure.py)")
    arguments = parser.parse_args()
    folder, lines = resolve(arguments.model), Lines(arguments.lines)
    base, tokenizer = Baseline(load_model(folder, torch.float32)), load_tokenizer(folder)
    common = ["detect.super_weights=false", "kv_cache=null", *arguments.set]
    sink_map = detect(base.model, tokenizer, recipe=Recipe().replace(common), name=arguments.model)
    held_out = token_rows(tokenizer, read_text(arguments.text, "evaluation"), arguments.held_out,
                          min(512, Decoder.of(base.model).max_length))
    shape = Decoder.of(load_model(folder)).shape(arguments.model)
    labels = {"backend": "none", "format": "bfloat16", "row": "unquantized"}
    if not lines.has(labels):
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        lines.add(Line.of(labels, base.compare(base.model, held_out), size=size,
                          speed=decode_speed(lambda: load_model(folder), held_out)))
    for name in arguments.formats:
        packaged, assigned = FORMATS[name]
        recipe = Recipe.load(packaged).replace([*assigned, *common])
        aware = make_plan(shape, sink_map, recipe)
        for row, plan in (("control", make_control(shape, sink_map, recipe, aware)), ("sink-aware", aware)):
            labels = {"backend": recipe.backend, "format": name, "row": row}
            if not lines.has(labels):
                lines.add(measured(labels, folder, plan, base, tokenizer, held_out))
    print(table(lines.lines, ["format"]))


def measured(labels: dict[str, str], folder: Path, plan: Plan, base: Baseline, tokenizer: PreTrainedTokenizerBase,
             held_out: torch.Tensor) -> Line:
    """Write a plan's checkpoint, measure it and forget it."""
    with tempfile.TemporaryDirectory() as place:
        start = time.process_time()
        out = save(quantize(load_model(folder), plan, tokenizer), tokenizer, Path(place) / "model")
        seconds = time.process_time() - start
        found = base.compare(load_dense(out, torch.float32), held_out)
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        return Line.of(labels, found, seconds, size, decode_speed(lambda: own_loader(out, plan.backend), held_out))


def own_loader(folder: Path, backend: str) -> Any:
    """The checkpoint as the backend itself gives it."""
    if backend == "quanto":
        from optimum.quanto import QuantizedModelForCausalLM

        return QuantizedModelForCausalLM.from_pretrained(folder)
    if backend == "gptq":
        return load_dense(folder, torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def decode_speed(load: Callable[[], Any], rows: torch.Tensor) -> float:
    """Tokens per second of processor time: the best of several rounds of greedy decoding after a short prompt, one
    sequence, the prompt's own time taken off."""
    model, prompt = load(), rows[:1, :PROMPT]

    def seconds(tokens: int) -> float:
        start = time.process_time()
        with torch.no_grad():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
                           do_sample=False, pad_token_id=0)
        return time.process_time() - start

    seconds(2)  # unpacking
    return (TOKENS - 1) / (min(seconds(TOKENS) for _ in range(ROUNDS)) - min(seconds(1) for _ in range(ROUNDS)))


if __name__ == "__main__":
    main()
