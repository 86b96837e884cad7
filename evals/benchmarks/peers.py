"""Quantize a model with a peer, on rows that are tokenized already, so that its checkpoint can be measured beside ours.

Runs in an environment of the peer's own (`race.py --environments` makes them); what is not sinkquant itself needs
nothing of sinkquant:

    python evals/benchmarks/methods.py MODEL --rows rows.safetensors
    peer-venv/bin/python evals/benchmarks/peers.py MODEL rows.safetensors OUT --tool llmcompressor --bits 3
    python evals/benchmarks/methods.py MODEL --bits 3 --checkpoint llm-compressor:3=OUT

Every tool writes a checkpoint that `methods.py` and `race.py` read, and `made.json` beside it: processor and wall
seconds of quantizing and writing, peak memory in bytes, and, where the checkpoint holds dense weights on the tool's
grid, the bytes that the tool's own storage of the blocks' linears takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Model = Any
Rounded = tuple[torch.Tensor, int]
"""A weight on its grid, and the bytes of it."""


def main() -> None:
    """Write one checkpoint, and `made.json` beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", help="safetensors with an int64 tensor 'calibration' [rows, length]")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tool", choices=list(TOOLS), required=True)
    parser.add_argument("--method", default="gptq", help="llmcompressor: gptq, awq or rtn")
    parser.add_argument("--scheme", help="llmcompressor, auto-round: a preset such as NVFP4A16, instead of "
                        "integers of --bits")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--observer", default="mse", help="llmcompressor: mse or minmax")
    parser.add_argument("--iterations", type=int, default=200, help="auto-round; 0: rounding to nearest")
    parser.add_argument("--batch-size", type=int, default=8, help="auto-round: rows of an iteration")
    parser.add_argument("--samples", type=int, help="calibrate on the first of the rows only")
    parser.add_argument("--file", type=Path, help="llama.cpp: the unquantized GGUF file")
    parser.add_argument("--type", default="Q4_0", help="llama.cpp: what llama-quantize calls it")
    parser.add_argument("--imatrix", type=Path, help="llama.cpp: of `quantize-model imatrix`")
    parser.add_argument("--recipe", default="w4a16-sink", help="sinkquant")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="sinkquant: more of the recipe")
    parser.add_argument("--sink-map", type=Path, help="sinkquant: of this model, made before")
    parser.add_argument("--text", default="null", help="sinkquant: what the rows were taken from")
    parser.add_argument("--sensitivity", type=Path, help="sinkquant: of this model, or where they are to be kept; for "
                        "a budget that is solved for")
    arguments = parser.parse_args()
    rows = load_file(arguments.rows)["calibration"][:arguments.samples]
    partial = arguments.output.with_name(f"{arguments.output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arguments.target, arguments.output = arguments.output, partial
    made = TOOLS[arguments.tool](arguments, rows)
    made["memory"] = _peak()
    (partial / "made.json").write_text(json.dumps(made), encoding="utf-8")
    partial.rename(arguments.target)
    print(made)


def _peak() -> int:
    """Bytes that this program held at most. Linux: ru_maxrss would also count what its parent held when it started it.

    Raises:
        OSError: there is no such file, which is where Linux says it.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _timed(work: Callable[[], int | None]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    blocks = work()
    found: dict[str, float] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return found if blocks is None else found | {"blocks": blocks}


def _opened(arguments: argparse.Namespace) -> Model:
    return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)


def _llmcompressor(arguments: argparse.Namespace, rows: torch.Tensor) -> dict[str, float]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():  # AWQ pins memory, which torch refuses without an accelerator
        IntermediatesCache.pin_memory = lambda *_: None
    model = _opened(arguments)
    if arguments.scheme:
        wanted: dict[str, Any] = {"targets": ["Linear"], "scheme": arguments.scheme}
    else:
        # AWQ is made for zero points; without them it leaves more.
        weights = QuantizationArgs(num_bits=arguments.bits, type="int", symmetric=arguments.method != "awq",
                                   strategy="group", group_size=arguments.group_size, observer=arguments.observer)
        wanted = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
    wanted["ignore"] = ["lm_head"]
    recipe = {"gptq": lambda: GPTQModifier(**wanted), "rtn": lambda: QuantizationModifier(**wanted),
              "awq": lambda: [AWQModifier(duo_scaling=True), QuantizationModifier(**wanted)]}[arguments.method]()
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})

    def work() -> None:
        oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=rows.shape[1],
                num_calibration_samples=len(rows), shuffle_calibration_samples=False)
        model.save_pretrained(arguments.output, save_compressed=True)

    made = _timed(work)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)
    return made


def _auto_round(arguments: argparse.Namespace, rows: torch.Tensor) -> dict[str, float]:
    from auto_round import AutoRound

    form: dict[str, Any] = {"bits": arguments.bits, "sym": True, "group_size": arguments.group_size}
    size, per_group, inputs = arguments.group_size, 2, False
    if arguments.scheme:
        name = arguments.scheme.removesuffix("A16")
        form, size, per_group, inputs = {"scheme": name}, 16 if name == "NVFP4" else 32, 1, name == arguments.scheme
        if not inputs:
            form["act_bits"] = 16
    tool = AutoRound(_opened(arguments), AutoTokenizer.from_pretrained(arguments.model), **form,
                     iters=arguments.iterations, seqlen=rows.shape[1], nsamples=len(rows),
                     batch_size=arguments.batch_size, dataset=[{"input_ids": row[None]} for row in rows],
                     device_map="cpu", amp=False)

    def work() -> int | None:
        tool.quantize_and_save(str(arguments.output), format="llm_compressor" if inputs else "fake")
        (folder,) = (path.parent for path in arguments.output.rglob("config.json"))
        if not inputs:  # dense weights on their grids: a plain model once its config no longer speaks of a format
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            config.pop("quantization_config", None)
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if folder != arguments.output:
            for path in folder.iterdir():
                path.rename(arguments.output / path.name)
        return None if inputs else sum(_plain_bytes(module.weight, arguments.bits, size, per_group)
                                       for _, module in _linears(_opened(arguments)))

    return _timed(work)


def _plain_bytes(weight: torch.Tensor, bits: int, group: int, per_group: int = 2) -> int:
    """Codes without gaps, and what every group stores."""
    return (weight.numel() * bits + 7) // 8 + weight.numel() // group * per_group


def _linears(model: Model) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            yield name, module


def _rounding(rounded: Callable[[argparse.Namespace, torch.Tensor], Rounded]
              ) -> Callable[[argparse.Namespace, torch.Tensor], dict[str, float]]:
    """A tool that takes one weight after the other and no text."""
    def run(arguments: argparse.Namespace, _: torch.Tensor) -> dict[str, float]:
        model = _opened(arguments)

        def work() -> int:
            total = 0
            for _, linear in _linears(model):
                weight, size = rounded(arguments, linear.weight.data)
                linear.weight.data = weight.to(torch.float32)
                total += size
            return total

        made = _timed(work)
        model.save_pretrained(arguments.output)
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)
        return made

    return run


def _hqq(arguments: argparse.Namespace, weight: torch.Tensor) -> Rounded:
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(weight, nbits=arguments.bits, group_size=arguments.group_size, axis=1,
                                     channel_wise=True, optimize=True, device="cpu", compute_dtype=torch.float32)
    # A 16-bit scale and a 16-bit zero point a group; codes as if 3 bits were stored without gaps.
    return Quantizer.dequantize(codes, meta), _plain_bytes(weight, arguments.bits, arguments.group_size, 4)


def _bitsandbytes(arguments: argparse.Namespace, weight: torch.Tensor) -> Rounded:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.contiguous(), blocksize=arguments.group_size, quant_type="nf4")
    return dequantize_4bit(codes, state), codes.nbytes + state.absmax.nbytes


def _quanto(arguments: argparse.Namespace, weight: torch.Tensor) -> Rounded:
    from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

    kind = {2: qint2, 4: qint4}[arguments.bits]
    scale, shift = MaxOptimizer()(weight, kind, 0, arguments.group_size)
    packed = quantize_weight(weight, qtype=kind, axis=0, scale=scale, shift=shift, group_size=arguments.group_size)
    return packed.dequantize(), _plain_bytes(weight, arguments.bits, arguments.group_size, 4)


def _torchao(arguments: argparse.Namespace, weight: torch.Tensor) -> Rounded:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    quantize_(linear, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{arguments.bits}"),
                                           granularity=PerGroup(arguments.group_size),
                                           mapping_type=MappingType.ASYMMETRIC))
    return linear.weight.dequantize(), _plain_bytes(weight, arguments.bits, arguments.group_size, 3)


def _llama_cpp(arguments: argparse.Namespace, _: torch.Tensor) -> dict[str, float]:
    from gguf import GGUFReader, LlamaFileType

    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "engines"))
    from llama_cpp import Library  # type: ignore[import-not-found]

    sums = {tensor.name: tensor.data for tensor in GGUFReader(arguments.imatrix).tensors} if arguments.imatrix else {}
    weights = {name.removesuffix(".in_sum2"): data / sums[name.removesuffix(".in_sum2") + ".counts"]
               for name, data in sums.items() if name.endswith(".in_sum2")}
    library, kind = Library(), LlamaFileType[f"MOSTLY_{arguments.type}"]
    return _timed(lambda: library.quantize(arguments.file, arguments.output / "model.gguf", int(kind), weights))


def _sinkquant(arguments: argparse.Namespace, rows: torch.Tensor) -> dict[str, float]:
    from sinkquant.artifacts import SinkMap
    from sinkquant.formats import quantize_to
    from sinkquant.models import Decoder, load_tokenizer, open_model
    from sinkquant.policy import make_plan
    from sinkquant.recipe import Recipe
    from sinkquant.sensitivity import find_sensitivity

    recipe = Recipe.load(arguments.recipe).replace(
        [f"calibration.text={arguments.text}", f"calibration.rows={len(rows)}",
         f"calibration.length={rows.shape[1]}", *arguments.set])
    model, sink_map = open_model(arguments.model), SinkMap.load(arguments.sink_map)
    target = arguments.output / "model"

    def work() -> None:
        tokenizer = load_tokenizer(arguments.model)
        costs = (find_sensitivity(model, tokenizer, sink_map, recipe, arguments.sensitivity)
                 if recipe.needs_sensitivities else None)
        plan = make_plan(Decoder.of(model).shape(sink_map.model.name), sink_map, recipe, costs)
        print(f"predicted: {plan.predicted}", flush=True)
        quantize_to(target, model, plan, tokenizer)

    made = _timed(work)
    for path in target.iterdir():
        path.rename(arguments.output / path.name)
    target.rmdir()
    return made


TOOLS: dict[str, Callable[[argparse.Namespace, torch.Tensor], dict[str, float]]] = {
    "llmcompressor": _llmcompressor, "auto-round": _auto_round, "hqq": _rounding(_hqq),
    "bitsandbytes": _rounding(_bitsandbytes), "quanto": _rounding(_quanto), "torchao": _rounding(_torchao),
    "llama.cpp": _llama_cpp, "sinkquant": _sinkquant}


if __name__ == "__main__":
    main()
