"""Does a repair of low rank in 16 bits win over spending its bytes in another way?

    python evals/benchmarks/low_rank.py MODEL --sink-map map.json --lines FILE.jsonl [--text NAME=FILE ...]
                                        [--recipe w4a16-sink] [--set weights.bits=3 ...] [--ranks 5]
                                        [--beside weights.group_size=32 ...]

Every linear of the blocks becomes Q + A B: A [rows, rank] and B [rank, columns], in bfloat16, are the best repair of
Q's error for its inputs, from the singular values of (W - Q) S with S S^T the second moment of the unquantized model's
inputs over the calibration tokens, sinks weighed as in the plan (LQER, Zhang et al. 2402.02446, with the whole moment
in place of its diagonal). `--beside` changes the recipe instead. Bytes are those of the checkpoint and of A and B.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from measure import Baseline, Line, Lines, carry_out, held_out_texts, sink_map_of, table
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.artifacts.sizes import checkpoint_bytes
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, read_text, resolve, token_rows
from sinkquant.policy import make_plan
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe

DAMPING = 0.01
"""Of the mean of the diagonal, as GPTQ's."""


def main() -> None:
    """Measure what is not there yet, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sink-map", type=Path, help="of this model, made before")
    parser.add_argument("--recipe", default="w4a16-sink")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    parser.add_argument("--ranks", type=int, nargs="+", default=[5])
    parser.add_argument("--beside", nargs="*", default=[], metavar="KEY=VALUE", help="a recipe of about the same bytes")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="held-out texts; default: packaged")
    parser.add_argument("--held-out", type=int, default=12, help="rows of every text")
    parser.add_argument("--lines", type=Path, help="keep what was measured here")
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer, base = load_tokenizer(folder), load_model(folder, torch.float32)
    texts = held_out_texts(arguments.text, tokenizer, arguments.held_out, min(512, Decoder.of(base).max_length))
    recipe = Recipe.load(arguments.recipe).replace(arguments.set)
    sink_map = sink_map_of(arguments, base, tokenizer, recipe)
    shape = Decoder.of(open_model(folder)).shape(arguments.model)
    lines, baseline = Lines(arguments.lines), Baseline(base)

    def keep(model: PreTrainedModel, name: str, size: int) -> None:
        for text, rows in texts.items():
            lines.add(Line.of({"weights": name} | ({"text": text} if text else {}), baseline.compare(model, rows),
                              size=size))

    plan = make_plan(shape, sink_map, recipe)
    model, _ = carry_out(folder, base, plan, tokenizer)
    size = checkpoint_bytes(shape, plan.formats)
    keep(model, "plain", size)
    asked = plan.calibration
    rows = token_rows(tokenizer, read_text(asked.text, "calibration", tokenizer), asked.rows, asked.length, asked.bos)
    errors = {name: base.get_submodule(name).weight - model.get_submodule(name).weight for name in plan.modules}
    factors = _factors(errors, _moments(base, plan, rows))
    for rank in arguments.ranks:
        more = 0
        for name, error in errors.items():
            left, right = (part.bfloat16().float() for part in factors[name](rank))
            module = model.get_submodule(name)
            module.weight.data = base.get_submodule(name).weight.data - error + left @ right
            more += 2 * (left.numel() + right.numel())
        keep(model, f"repair of rank {rank}", size + more)
    if arguments.beside:
        other = make_plan(shape, sink_map, recipe.replace(arguments.beside))
        keep(carry_out(folder, base, other, tokenizer)[0], ", ".join(arguments.beside),
             checkpoint_bytes(shape, other.formats))
    print(table(lines.lines, ["text"], recipe.seed))


@torch.no_grad()
def _moments(model: PreTrainedModel, plan: Plan, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The second moment of what every linear reads, float32 [columns, columns]."""
    weights, found = TokenWeights(rows, plan.calibration).weights, dict[str, torch.Tensor]()
    root = torch.empty(0)

    def watch(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
            scaled = args[0].flatten(0, -2) * root
            found[name] = found.get(name, 0) + scaled.T @ scaled

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in plan.modules]
    for row, weight in zip(rows, weights, strict=True):
        root = weight.sqrt()[:, None]
        model(row[None])
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def _factors(errors: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]
             ) -> dict[str, Callable[[int], tuple[torch.Tensor, torch.Tensor]]]:
    """Linear -> rank -> A and B."""
    def of(error: torch.Tensor, moment: torch.Tensor) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
        damped = moment.double() + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        root = torch.linalg.cholesky(damped)
        left, values, right = torch.linalg.svd(error.double() @ root, full_matrices=False)

        def cut(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
            inputs = torch.linalg.solve_triangular(root.T, right[:rank].T, upper=True).T
            return (left[:, :rank] * values[:rank]).float(), inputs.float()

        return cut

    return {name: of(errors[name], moments[name]) for name in errors}


if __name__ == "__main__":
    main()
