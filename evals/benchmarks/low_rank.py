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

from collections.abc import Callable, Mapping
from functools import partial

import torch
from measure import Baseline, Line, Lines, carry_out, held_out_texts, parser_of_recipe, sink_map_of, table
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.artifacts.sizes import checkpoint_bytes
from sinkquant.models import Decoder, load_model, load_tokenizer, open_model, resolve
from sinkquant.models.hooks import hooked
from sinkquant.policy import make_plan
from sinkquant.quantize.factor import damped_hessian
from sinkquant.quantize.hessian import Hessian
from sinkquant.quantize.rows import text_rows
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe

DAMPING = 0.01
"""Of the mean of the diagonal, as GPTQ's."""


def main() -> None:
    """Measure what is not there yet, and print the table as Markdown."""
    parser = parser_of_recipe(__doc__, "w4a16-sink")
    parser.add_argument("--ranks", type=int, nargs="+", default=[5])
    parser.add_argument("--beside", nargs="*", default=[], metavar="KEY=VALUE", help="a recipe of about the same bytes")
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer, base = load_tokenizer(folder), load_model(folder, torch.float32)
    texts = held_out_texts(arguments.text, tokenizer, arguments.held_out, min(512, Decoder.of(base).max_length))
    recipe = Recipe.load(arguments.recipe).replace(arguments.set)
    sink_map = sink_map_of(arguments, base, tokenizer, recipe)
    shape = Decoder.of(open_model(folder)).shape(arguments.model)
    lines, baseline = Lines(arguments.lines), Baseline(base)

    def keep(name: str, size: int, made: Callable[[], PreTrainedModel]) -> None:
        wanted = {text: {"weights": name} | ({"text": text} if text else {}) for text in texts}
        if all(map(lines.has, wanted.values())):
            return
        model = made()
        for text, labels in wanted.items():
            if not lines.has(labels):
                lines.add(Line.of(labels, baseline.compare(model, texts[text]), size=size))

    plan = make_plan(shape, sink_map, recipe)
    model, _ = carry_out(folder, base, plan, tokenizer)
    size = checkpoint_bytes(shape, plan.formats)
    keep("plain", size, lambda: model)
    plain = {name: model.get_submodule(name).weight.data for name in plan.modules}
    factors = _factors(base, plan, plain, text_rows(Decoder.of(base), plan.calibration, tokenizer))

    def repaired(rank: int) -> PreTrainedModel:
        for name, (left, right) in factors.items():
            repair = left[:, :rank].bfloat16().float() @ right[:rank].bfloat16().float()
            model.get_submodule(name).weight.data = plain[name] + repair
        return model

    for rank in arguments.ranks:
        more = sum(2 * (left[:, :rank].numel() + right[:rank].numel()) for left, right in factors.values())
        keep(f"repair of rank {rank}", size + more, partial(repaired, rank))
    if arguments.beside:
        other = make_plan(shape, sink_map, recipe.replace(arguments.beside))
        keep(", ".join(arguments.beside), checkpoint_bytes(shape, other.formats),
             lambda: carry_out(folder, base, other, tokenizer)[0])
    print(table(lines.lines, ["text"], recipe.seed))


@torch.no_grad()
def _factors(base: PreTrainedModel, plan: Plan, plain: Mapping[str, torch.Tensor],
             rows: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Linear -> A and B of full rank, float32: of a lower one, their first columns and rows.

    Args:
        plain: the quantized weights. rows: int64 [rows, length].
    """
    seen = {name: Hessian(weight.shape[1], weight.device) for name, weight in plain.items()}

    def watch(name: str, weights: torch.Tensor, _: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        seen[name].add(args[0].flatten(0, -2), weights)

    for row, weights in zip(rows, TokenWeights(rows, plan.calibration).weights, strict=True):
        with hooked([base.get_submodule(name).register_forward_pre_hook(partial(watch, name, weights))
                     for name in plain]):
            base(row[None])
    found = {}
    for name, weight in plain.items():
        root = torch.linalg.cholesky(damped_hessian(seen[name].mean(), DAMPING, name)[0])
        error = base.get_submodule(name).weight.data - weight
        left, values, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
        found[name] = (left * values).float(), torch.linalg.solve_triangular(root.T, right.T, upper=True).T.float()
    return found


if __name__ == "__main__":
    main()
