"""Decode speed and resident weights: bf16, plain compressed-tensors, bitsandbytes NF4, and sinkquant's packed weights.

    python evals/benchmarks/decode.py [--shape llama-1b] [--bits 4] [--group 64] [--threads 2] [--prompt 32]
                                      [--tokens 16] [--work FOLDER] [--output FILE.json] [ROW ...]

Makes a model of that shape with random weights, rounds it to `--bits` (a plan without sinks: kernels are measured) and
runs every row in a process of its own, one after the other: load, a prompt, then greedy steps with a cache. Random
weights are as fast as trained ones. "weights" counts the bytes of parameters and buffers that the model holds after its
first steps, "USS" the memory that the process alone has then, above the interpreter with its imports, and "load peak"
the most that was resident until the model was loaded, pages of mapped files included. Tokens per second are those of
the median step; processor seconds per token are what other work on the machine distorts least. `sinkquant-head8` and
`sinkquant-head4` round the embedding and the output head to 8 and 4 bits as well. `--shape moe-1b` is a mixture, whose
experts count as linears.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

ROWS = ("bf16", "compressed-tensors", "bitsandbytes-nf4", "sinkquant", "sinkquant-head8", "sinkquant-head4")

HEAD_BITS = {"sinkquant": 16, "sinkquant-head8": 8, "sinkquant-head4": 4}


def prepare(shape: str, work: Path, bits: int, group: int) -> tuple[Path, Path]:
    """The folder of the random model and of its checkpoint, made where they are not there yet."""
    import sinkquant as sq
    from sinkquant.formats import quantize_to
    from sinkquant.models import Decoder, load_tokenizer, open_model
    from sinkquant.policy import plan_from_shapes

    dense, packed = work / shape, work / f"{shape}-w{bits}g{group}"
    if not dense.is_dir():
        large = Path(__file__).with_name("large.py")
        subprocess.run([sys.executable, large, "make", shape, dense], check=True)
    if not packed.is_dir():
        recipe = sq.Recipe().replace([f"weights.bits={bits}", f"weights.group_size={group}", "weights.method=rtn",
                                      "weights.scale_search=false", "protect.tokens=false"])
        plan, missing = plan_from_shapes(Decoder.of(open_model(dense)).shape(shape), recipe)
        assert plan is not None, missing
        quantize_to(packed, open_model(dense), plan, load_tokenizer(dense), recipe=recipe)
    return dense, packed


def opened(row: str, dense: Path, packed: Path) -> Any:
    """The model of a row."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if row == "bf16":
        return AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    if row == "compressed-tensors":
        return AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    if row == "bitsandbytes-nf4":
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                      bnb_4bit_compute_dtype=torch.bfloat16)
        return AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16, quantization_config=settings)
    import sinkquant as sq

    return sq.load(packed, packed=True, head_bits=HEAD_BITS[row])[0]


@torch.no_grad()
def measure(row: str, dense: Path, packed: Path, prompt: int, tokens: int) -> dict[str, Any]:
    """Load a row's model and decode greedily."""
    import sinkquant  # noqa: F401  # its imports count as the interpreter's
    from sinkquant.inference import KernelLinear

    process = psutil.Process()
    before, peak = process.memory_full_info().uss, _peak()
    start = time.perf_counter()
    model = opened(row, dense, packed).eval()
    found: dict[str, Any] = {"row": row, "load_seconds": time.perf_counter() - start,
                             "load_peak_bytes": _peak() - peak}
    ids = torch.randint(3, 100, (1, prompt), generator=torch.Generator().manual_seed(0))
    model(ids[:, :1], use_cache=False)  # what is unpacked or packed anew at the first pass is no part of the prompt
    start = time.perf_counter()
    out = model(ids, use_cache=True)
    found["prompt_seconds"] = time.perf_counter() - start
    steps, used = [], time.process_time()
    for _ in range(tokens):
        chosen = out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        out = model(chosen, past_key_values=out.past_key_values, use_cache=True)
        steps.append(time.perf_counter() - start)
    found |= {"tokens_per_second": 1 / statistics.median(steps), "fastest_step_seconds": min(steps),
              "processor_seconds_per_token": (time.process_time() - used) / tokens,
              "uss_bytes": process.memory_full_info().uss - before, "load": os.getloadavg()[0]}
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    states = sum(_state_bytes(module) for module in model.modules())
    found["weight_bytes"] = sum(tensors.values()) + states
    linears = [module for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear | KernelLinear) and ".layers." in name]
    fused = [parameter for parameter in model.parameters() if parameter.dim() == 3]
    found["linear_bytes"] = sum(t.nbytes for module in linears for t in (*module.parameters(), *module.buffers()))
    found["linear_bytes"] += states + sum(parameter.nbytes for parameter in fused)
    return found


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _state_bytes(module: Any) -> int:
    """What bitsandbytes keeps beside a 4-bit weight."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return state.absmax.nbytes if state is not None else 0


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; ratios are to bf16."""
    base = next((row for row in rows if row["row"] == "bf16"), rows[0])
    lines = ["| | tokens/s | of bf16 | processor s/token | of bf16 | prompt, s | linears, MB | of bf16 "
             "| all weights, MB | of bf16 | USS, MB | load peak, MB |", "|---|" + "---:|" * 11]
    for row in rows:
        speed, work = row["tokens_per_second"], row["processor_seconds_per_token"]
        lines.append(
            f"| {row['row']} | {speed:.2f} | {speed / base['tokens_per_second']:.2f} | {work:.3f} "
            f"| {work / base['processor_seconds_per_token']:.2f} | {row['prompt_seconds']:.2f} "
            f"| {row['linear_bytes'] / 1e6:,.0f} | {row['linear_bytes'] / base['linear_bytes']:.3f} "
            f"| {row['weight_bytes'] / 1e6:,.0f} | {row['weight_bytes'] / base['weight_bytes']:.3f} "
            f"| {row['uss_bytes'] / 1e6:,.0f} | {row['load_peak_bytes'] / 1e6:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--shape", default="llama-1b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--work", type=Path, help="where the models are kept; a temporary folder without it")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if unknown := sorted(set(given.rows) - set(ROWS)):
        parser.error(f"there is no row {unknown[0]!r}; the rows are {', '.join(ROWS)}")
    if given.one:
        dense, packed = given.one
        print(json.dumps(measure(given.rows[0], dense, packed, given.prompt, given.tokens)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        folders = prepare(given.shape, work, given.bits, given.group)
        rows = []
        for row in given.rows:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, row, "--threads", str(given.threads), "--prompt",
                 str(given.prompt), "--tokens", str(given.tokens), "--one", *map(str, folders)],
                check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": str(given.threads)})
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(row, f"{rows[-1]['tokens_per_second']:.2f} tokens/s", file=sys.stderr, flush=True)
    print(table(rows))
    if given.output:
        given.output.write_text(json.dumps({
            "shape": given.shape, "bits": given.bits, "group": given.group, "threads": given.threads,
            "prompt": given.prompt, "tokens": given.tokens, "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine(), "rows": rows},
            indent=1) + "\n")


if __name__ == "__main__":
    main()
