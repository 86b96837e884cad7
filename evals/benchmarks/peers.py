"""Quantize a model with a peer, on rows that are tokenized already, so that `methods.py` can measure its checkpoint.

Runs in an environment of the peer's own (`pip install llmcompressor==0.14.0.1` or `auto-round==0.16.1`, and torch);
needs nothing of sinkquant:

    python evals/benchmarks/methods.py MODEL --rows rows.safetensors
    peer-venv/bin/python evals/benchmarks/peers.py MODEL rows.safetensors OUT --tool llmcompressor --bits 3
    python evals/benchmarks/methods.py MODEL --bits 3 --checkpoint llm-compressor:3=OUT
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Write one checkpoint, and `seconds.json` beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", help="safetensors with an int64 tensor 'calibration' [rows, length]")
    parser.add_argument("output")
    parser.add_argument("--tool", choices=["llmcompressor", "auto-round"], required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--observer", default="mse", help="llmcompressor: mse or minmax")
    parser.add_argument("--iterations", type=int, default=200, help="auto-round")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    rows = load_file(arguments.rows)["calibration"]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    start, cpu = time.perf_counter(), time.process_time()
    run = _llmcompressor if arguments.tool == "llmcompressor" else _auto_round
    run(model, rows, arguments)
    seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    (Path(arguments.output) / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    print(seconds)


def _llmcompressor(model: Any, rows: torch.Tensor, arguments: argparse.Namespace) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = QuantizationArgs(num_bits=arguments.bits, type="int", symmetric=True, strategy="group",
                               group_size=arguments.group_size, observer=arguments.observer)
    recipe = GPTQModifier(config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
                          ignore=["lm_head"])
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=rows.shape[1],
            num_calibration_samples=len(rows), shuffle_calibration_samples=False)
    model.save_pretrained(arguments.output, save_compressed=True)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)


def _auto_round(model: Any, rows: torch.Tensor, arguments: argparse.Namespace) -> None:
    from auto_round import AutoRound

    tool = AutoRound(model, AutoTokenizer.from_pretrained(arguments.model), bits=arguments.bits, sym=True,
                     group_size=arguments.group_size, iters=arguments.iterations, seqlen=rows.shape[1],
                     nsamples=len(rows), dataset=[{"input_ids": row[None]} for row in rows],
                     device_map="cpu", amp=False)
    tool.quantize_and_save(arguments.output, format="fake")
    # Dense weights on their grids, in a folder below: a plain model once its config no longer speaks of a format.
    (folder,) = (path.parent for path in Path(arguments.output).rglob("config.json"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in folder.iterdir():
        path.rename(Path(arguments.output) / path.name)


if __name__ == "__main__":
    main()
