"""What rounded activations cost, and what it is worth to keep the sinks out of their ranges: mean KL divergence from
the unquantized model and perplexity on held-out rows, with paired bootstrap intervals.

    python evals/benchmarks/activations.py MODEL [--text FILE] [--heldout FILE] [--rows 32] [--set KEY=VALUE ...]
                                           [--weights 16 8 4] [--inputs int8 int6 int4]
                                           [--scales all exact dynamic exclude token token-exact block block-exact ...]
                                           [--transforms none full block online online-inner] [--lines FILE.jsonl]
                                           [--tasks NAME ... --task-folder FOLDER --limit 100]

Weights: 16 as they are (with the scales that calibration finds for 8), 8 with one scale per channel, fewer in groups of
64. Scales: "all" one stored scale per linear that reaches every token (the control), "dynamic" a scale per token where
the sinks would set the range, "exclude" a stored scale that leaves `<bos>` out, whose keys and values come from the
unquantized model, "token" a scale per token everywhere. Inputs in nvfp4 and mxfp4 have scales of their own: "block";
4-bit weights are then in the same format, by GPTQ. Of mxfp4 also "block-down", whose powers of two are rounded down
(OCP's rule), and "block-fit", whose are so large that nothing is clipped. "exact", "token-exact" and "block-exact":
the inputs of the detected sinks are not rounded at all and reach no range, which no engine can do: the most that
protecting them can be worth. Scales that inputs do not have are passed over. "smooth, ..." is the same after
SmoothQuant, "searched, ..." after the same with a strength for every place. int6 and int4 are simulated; "none": inputs
of 16 bits under the weights that such inputs would take; fp8 takes weights of 8 bits, which become FP8 as well, by
rounding to nearest.

Transforms, of random signs and a Hadamard matrix: "full" the residual stream and every head as a whole, "block" that in
blocks of the inputs' format, both folded into the weights; "online" the inputs of every linear in such blocks, as
compressed-tensors' `transform_config` would have it done while the model runs, which plain transformers does not do;
"online-inner" that for down projections alone, after "block".
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
from compressed_tensors.quantization.utils import helpers
from measure import Lines, held_out_texts, sink_map_of, table
from task_scores import add_options, task_scores
from transformers import PreTrainedModel

from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, resolve
from sinkquant.policy import make_plan
from sinkquant.quantize.transforms import Rotate
from sinkquant.quantize.transforms.hadamard import Rotation
from sinkquant.recipe import Recipe
from sinkquant.schemes import input_format
from sinkquant.sinks import SinkSelector

SCALES = {"all": ["activations.scale=tensor", "activations.sinks=all"],
          "dynamic": ["activations.scale=tensor", "activations.sinks=dynamic"],
          "exclude": ["activations.scale=tensor", "activations.sinks=exclude",
                      "kv_cache={key_bits: 16, value_bits: 16, group_size: 128, window: 512, prefix: bos}"],
          "token": ["activations.scale=token"]}
BLOCKS = {"block": ["activations.scale=group", "activations.sinks=all"]}
BLOCKS["smooth, block"] = [*BLOCKS["block"], "weights.smooth=smoothquant"]
BLOCKS["searched, block"] = [*BLOCKS["block"], "weights.smooth=searched"]
SCALES |= {f"smooth, {name}": [*asked, "weights.smooth=smoothquant"] for name, asked in SCALES.items()}
EXACT = {"exact": SCALES["all"], "token-exact": SCALES["token"], "block-exact": BLOCKS["block"]}
BLOCKS |= dict.fromkeys(("block-exact", "block-down", "block-fit"), BLOCKS["block"])
SCALES |= BLOCKS | EXACT | {"none": ["activations.format=16-bit"]}
POWERS = {"block-down": lambda largest, num_bits=4: 125 + largest.log2().floor(),
          "block-fit": lambda largest, num_bits=4: 127 + (largest / 6).log2().ceil()}
"""What MXFP4's scales might be instead, as exponents: compressed-tensors rounds up from a mantissa of 1.75 on."""
TRANSFORMS: dict[str, Callable[..., None] | None] = {"none": None}


def folded(model: PreTrainedModel, size: int | None, whole: bool) -> None:
    """Rotate the residual stream and every head, as a whole or in blocks of `size`."""
    module = import_module("sinkquant.quantize.transforms.rotate")
    mixing = Rotation if whole else lambda _, *rest: Rotation(size or 0, *rest)
    with mock.patch.object(module, "Rotation", mixing):
        Rotate("full").apply(Decoder.of(model))


def online(model: PreTrainedModel, size: int | None, inner: bool) -> None:
    """Mix the inputs of linears in blocks of `size` whenever the model runs, and the columns of their weights."""
    assert size is not None
    if inner:
        folded(model, size, whole=False)
    mixed = Rotation(size, 0)
    matrix = mixed.apply(torch.eye(size, dtype=torch.float64))

    def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return ((args[0].unflatten(-1, (-1, size)) @ matrix.to(args[0].dtype)).flatten(-2), *args[1:])

    decoder = Decoder.of(model)
    for name, linear in decoder.linears.items():
        if not inner or name.endswith("down_proj"):
            weight = decoder.weight(name)
            decoder.put(name, mixed.apply(weight.double()).to(weight.dtype))
            linear.register_forward_pre_hook(hook)


TRANSFORMS |= {"full": partial(folded, whole=True), "block": partial(folded, whole=False),
               "online": partial(online, inner=False), "online-inner": partial(online, inner=True)}


def main() -> None:
    """Print the table as Markdown, line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--heldout", nargs="*", default=[], metavar="NAME=FILE", help="default: the packaged text")
    parser.add_argument("--sink-map", type=Path, help="of this model, made before")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--weights", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--inputs", nargs="+", default=["int8", "int6", "int4"])
    parser.add_argument("--scales", nargs="+", default=list(SCALES)[:4], choices=list(SCALES))
    parser.add_argument("--transforms", nargs="+", default=["none"], choices=list(TRANSFORMS))
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=Path, help="keep what was measured here (measure.py)")
    add_options(parser)
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer, base = load_tokenizer(folder), load_model(folder, torch.float32)
    recipe = Recipe().replace([f"calibration.text={arguments.text or 'null'}", "detect.super_weights=false",
                               *arguments.settings])
    sink_map = sink_map_of(arguments, base, tokenizer, recipe)
    texts = held_out_texts(arguments.heldout, tokenizer, arguments.rows,
                           min(arguments.length, Decoder.of(base).max_length))
    tasks = task_scores(arguments, tokenizer)
    lines, shape = Lines(arguments.lines), Decoder.of(open_model(folder)).shape(arguments.model)
    for bits, inputs, scale, transform in itertools.product(arguments.weights, arguments.inputs, arguments.scales,
                                                            arguments.transforms):
        size = input_format(inputs).group_size
        if scale != "none" and (size is None) == (scale in BLOCKS):
            continue
        labels = {"weights": str(bits), "inputs": inputs, "scales": scale}
        before = TRANSFORMS[transform]
        if before is not None:
            labels["transform"] = transform
        weights = ["weights.bits=8", "weights.group_size=-1"] if bits >= 8 else [
            f"weights.bits={bits}", "weights.group_size=64"]
        if size is not None:
            weights = [f"weights.format={inputs}", f"weights.group_size={size}", "weights.bits=4"]
        if bits == 16 or inputs == "fp8":
            weights += ["weights.method=rtn", f"weights.scale_search={bits != 16}"]
        plan = make_plan(shape, sink_map, recipe.replace(
            [*weights, f"activations.format={inputs}", *SCALES[scale]]))
        if scale in EXACT:
            plan.calibration.ranges = "exclude"
        with mock.patch.object(helpers, "generate_mx_scales", POWERS.get(scale, helpers.generate_mx_scales)):
            lines.measure(labels, folder, base, plan, tokenizer, texts, keep_weights=bits == 16,
                          exact=SinkSelector.of(sink_map.tokens) if scale in EXACT else None,
                          before=None if before is None else partial(before, size=size), tasks=tasks)
    print(table(lines.lines, ["weights", "inputs", "text"], arguments.seed))


if __name__ == "__main__":
    main()
