"""Large models from disk to disk: peak memory, time and resume, on shapes of known models with random weights.

    python evals/benchmarks/large.py make llama-1b FOLDER       # random bf16 weights in shards, and a tokenizer
    python evals/benchmarks/large.py run FOLDER OUT --method rtn|gptq [--rows 32] [--skip-detect] [--search]
    python evals/benchmarks/large.py copy FOLDER OUT            # what copying the files costs
    python evals/benchmarks/large.py resume FOLDER OUT --set weights.method=rtn    # killed three times: the same bytes?

`run` prints one JSON line: seconds and the peak of resident memory per stage, above the interpreter with torch
imported. Random weights have no sinks and no quality to measure; what is measured is the walk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

BASE = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
LLAMA = {"vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
         "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16"}
SHAPES = {
    "llama-tiny": LLAMA | {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
                           "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-1b": LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
                         "tie_word_embeddings": True},
    "llama-8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                         "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    "moe-1b": LLAMA | {"model_type": "qwen3_moe", "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 3072,
                       "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4,
                       "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
                       "tie_word_embeddings": True},
    "moe-wide": LLAMA | {"model_type": "qwen3_moe", "vocab_size": 8192, "hidden_size": 2048, "intermediate_size": 2048,
                         "moe_intermediate_size": 2048, "num_experts": 32, "num_experts_per_tok": 4,
                         "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
                         "tie_word_embeddings": True}}
"""Of Llama where no other family is named. "moe-1b" has 0.81 billion weights of experts and 0.08 billion others,
"moe-wide" two layers of 0.40 billion weights of experts each."""
SHARD = 1 << 30
POOL = (1 << 24) + 3
"""Random values that weights are made of, one tensor after the other; odd, so that rows differ."""


def make(shape: str, folder: Path) -> None:
    """Write a model of that shape, a shard at a time, with the demo model's tokenizer."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from sinkquant.models import resolve

    config = AutoConfig.for_model(**{"model_type": "llama"} | SHAPES[shape])
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    folder.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("demo")).save_pretrained(folder)
    # A pool that is drawn once: sixteen billion normal numbers would take longer than what is to be measured.
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map, filled = {}, 0

    def flush() -> None:
        save_file(shards[-1], folder / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
        shards[-1] = dict.fromkeys(shards[-1], torch.empty(0))

    for name, parameter in model.named_parameters():
        if filled + 2 * parameter.numel() > SHARD and shards[-1]:
            flush()
            shards.append({})
            filled = 0
        count = parameter.numel()
        values = torch.ones(count, dtype=torch.bfloat16) if parameter.dim() == 1 else pool.repeat(count // POOL + 1)
        shards[-1][name] = values[:count].reshape(parameter.shape).clone()
        filled += 2 * parameter.numel()
        weight_map[name] = f"model-{len(shards):05d}.safetensors"
    flush()
    index = {"metadata": {"total_size": sum(2 * p.numel() for p in model.parameters())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(folder: Path, out: Path, method: str, rows: int, length: int, skip_detect: bool, search: bool,
        more: list[str]) -> dict[str, float | str]:
    """Detect, plan, quantize to disk. Seconds and peak bytes above the interpreter after every stage; a line for every
    block on the way. Without detection the plan is made from the headers, and no token is weighed."""
    import sinkquant as sq
    from sinkquant.formats import quantize_to
    from sinkquant.models import Decoder, load_tokenizer, open_model
    from sinkquant.policy import plan_from_shapes
    from sinkquant.predict import predict

    begun = time.monotonic()

    def progress(done: int, total: int, label: str) -> None:
        print(json.dumps({"at": label, "done": done, "of": total, "seconds": time.monotonic() - begun,
                          "processor_seconds": time.process_time(), "peak_bytes": _peak()}), flush=True)

    found: dict[str, float | str] = {"model": folder.name, "method": method, "threads": torch.get_num_threads(),
                                     "imports_peak_bytes": _peak()}
    recipe = sq.Recipe.load("w4a16-sink").replace(
        [f"weights.method={method}", f"calibration.rows={rows}", f"calibration.length={length}",
         f"weights.scale_search={search}", "evaluate.skip=true", *more])
    tokenizer, sink_map = load_tokenizer(folder), None
    decoder = Decoder.of(open_model(folder))
    found |= {f"predicted_{stage}_peak_bytes": size + _peak() for stage, size in
              predict(decoder, recipe).peak_bytes.items()}
    if skip_detect:
        recipe = recipe.replace(["protect.tokens=false"])
        plan, _ = plan_from_shapes(decoder.shape(folder.name), recipe)
        assert plan is not None
    else:
        start = time.process_time()
        sink_map = sq.detect(open_model(folder), tokenizer, recipe=recipe, name=folder.name, progress=progress)
        found |= {"detect_processor_seconds": time.process_time() - start, "detect_peak_bytes": _peak()}
        plan = sq.plan(open_model(folder), sink_map, recipe)
    start, processor = time.monotonic(), time.process_time()
    quantize_to(out, open_model(folder), plan, tokenizer, sink_map, recipe, progress=progress)
    found |= {"quantize_seconds": time.monotonic() - start, "peak_bytes": _peak(),
              "quantize_processor_seconds": time.process_time() - processor, "written_bytes": plan.weight_bytes}
    return found


def resume(folder: Path, out: Path, kills: int, recipe: list[str]) -> dict[str, object]:
    """A whole run that nobody disturbs, and one that is killed at random moments and resumed: the same bytes?

    The first kill is during detection, the others are while blocks are quantized.
    """
    command = [sys.executable, "-m", "sinkquant.cli", "run", "w4a16-sink", "-m", str(folder), "--resume",
               *[word for setting in ["evaluate.skip=true", *recipe] for word in ("--set", setting)]]
    subprocess.run([*command, "-o", str(out / "whole")], check=True, stdout=subprocess.DEVNULL)
    chance, killed_at = random.Random(0), []
    work = out / "killed.partial"
    for kill in range(kills):
        awaited = work / "manifest.json" if kill == 0 else work / "model.partial" / "blocks.json"
        process = subprocess.Popen([*command, "-o", str(out / "killed")], stdout=subprocess.DEVNULL)
        while not awaited.is_file():
            time.sleep(0.1)
        time.sleep(chance.uniform(1, 20))
        process.send_signal(signal.SIGKILL)
        process.wait()
        state = work / "model.partial" / "blocks.json"
        killed_at.append(f"after block {json.loads(state.read_text())['done']}" if state.is_file() else (
            "while quantizing" if (work / "sinkmap.json").is_file() else "while detecting"))
    subprocess.run([*command, "-o", str(out / "killed")], check=True, stdout=subprocess.DEVNULL)
    same = {path.name: _digest(path) == _digest(out / "killed" / path.relative_to(out / "whole"))
            for path in sorted((out / "whole").rglob("*")) if path.is_file() and path.name != "run.log"}
    return {"killed": killed_at, "files": len(same), "differ": [name for name, alike in same.items() if not alike]}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - BASE


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["make", "run", "copy", "resume"])
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("--method", choices=["rtn", "gptq"], default="rtn")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--skip-detect", action="store_true", help="plan from the headers alone")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="run, resume: settings of the recipe")
    parser.add_argument("--search", action="store_true", help="search the scales: less loss, much slower")
    given = parser.parse_args()
    if given.action == "make":
        make(given.source, given.target)
    elif given.action == "copy":
        start = time.monotonic()
        shutil.copytree(given.source, given.target)
        print(json.dumps({"copy_seconds": time.monotonic() - start}))
    elif given.action == "resume":
        print(json.dumps(resume(Path(given.source), given.target, given.kills, given.set)))
    else:
        print(json.dumps(run(Path(given.source), given.target, given.method, given.rows, given.length,
                             given.skip_detect, given.search, given.set)))


if __name__ == "__main__":
    main()
