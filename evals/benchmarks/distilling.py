"""What end-to-end tuning may be made of: its loss, its rows, what moves, and blocks tuned by themselves or in pairs.

    python evals/benchmarks/distilling.py MODEL --sink-map map.json --lines FILE.jsonl [--text NAME=FILE ...]
                                          [--recipe w3a16-sink] [--set calibration.rows=16 ...] [--steps 24]
                                          [--only scales codes ...] [--held-out 12]

The recipe is carried out once. Every candidate starts from its codes and scales and takes `--steps` steps of four rows,
of the whole model or of each of its parts, so that all have the same bytes and see as many tokens. Seconds are those of
tuning alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from measure import Baseline, Line, Lines, held_out_texts, parser_of_recipe, sink_map_of, table
from torch import nn
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.models import Decoder, Walk, as_stored, load_model, load_tokenizer, open_model, resolve, weight_matrix
from sinkquant.models.hooks import evaluating, learning
from sinkquant.policy import make_plan
from sinkquant.quantize.apply import quantized_blocks
from sinkquant.quantize.block import with_codes
from sinkquant.quantize.end_to_end import TuningStart, teacher_targets
from sinkquant.quantize.refine import Objective, TeacherDivergence, TeacherTargets, refine
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe
from sinkquant.schemes.codecs.packed import PackedWeight


@dataclass(frozen=True)
class Softened(TeacherDivergence):
    """Both predictions at a temperature (Hinton et al. 1503.02531), and tokens that weigh more.

    weights: float32 [rows, length].
    """

    temperature: float = 1.0
    weights: torch.Tensor | None = None

    def _backward(self, part: torch.Tensor) -> None:
        wanted = torch.softmax(self._wanted(part) / self.temperature, -1)
        logits = self._given(part)
        away = torch.softmax(logits.detach().float() / self.temperature, -1).sub_(wanted)
        if self.weights is not None:
            away *= self.weights[part, :, None]
        logits.backward(away.to(logits.dtype))


@dataclass
class Part:
    """What some consecutive blocks give, from what the quantized blocks before them do: the mean over tokens of their
    squared error over the square of what the unquantized model gives there.

    inputs, target: [rows, length, hidden_size]. arguments: what the model hands each of the blocks.
    """

    blocks: list[nn.Module]
    arguments: list[dict[str, object]]
    linears: Mapping[str, nn.Module]
    inputs: torch.Tensor
    target: torch.Tensor

    @property
    def rows(self) -> int:
        return len(self.inputs)

    def put(self, name: str, packed: PackedWeight) -> None:
        weight_matrix(self.linears[name]).copy_(packed.dequantized(torch.float32))

    def given(self, hidden: torch.Tensor) -> torch.Tensor:
        for block, arguments in zip(self.blocks, self.arguments, strict=True):
            result = block(hidden, **arguments)
            hidden = result[0] if isinstance(result, tuple) else result
        return hidden

    def gradients(self, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        self._error(chosen).mean().backward()
        found = {}
        for name, linear in self.linears.items():
            weight = linear.get_parameter("weight")
            if weight.grad is not None:
                found[name] = as_stored(linear, weight.grad)
            weight.grad = None
        return found

    @torch.no_grad()
    def loss(self) -> float:
        return sum(float(self._error(chosen).sum()) for chosen in torch.arange(self.rows).split(4)) / self.rows

    def _error(self, chosen: torch.Tensor) -> torch.Tensor:
        wanted = self.target[chosen]
        return ((self.given(self.inputs[chosen]) - wanted).square().mean(-1) / wanted.square().mean(-1)).mean(1)


class Tuning:
    """A model, quantized once, and all that starts from there."""

    def __init__(self, model: PreTrainedModel, plan: Plan, more: Plan, tokenizer: object, steps: int) -> None:
        self.model, self.plan, self.steps, self.decoder = model, plan, steps, Decoder.of(model)
        self.teacher = self._taught(plan, tokenizer)
        self.wider = self._taught(more, tokenizer)
        walk = Walk(self.decoder, self.teacher.rows, plan.calibration.batch_size)
        self.wanted = [step.run() for step in walk.steps()]
        self.arguments = walk.arguments
        self.starts: dict[str, TuningStart] = {}
        for block in quantized_blocks(self.decoder, plan, tokenizer, "cpu", torch.float32):
            codes = with_codes(block.weights)
            self.starts |= {name: TuningStart(codes[name], offsets) for name, offsets in block.offsets.items()}

    def candidates(self) -> dict[str, Iterator[None]]:
        """Name -> what tunes the model as it is called; nothing is done before it is run."""
        weights = TokenWeights(self.teacher.rows, self.plan.calibration).weights
        return {
            "before": iter(()),
            "scales": self._whole(),
            "scales, temperature 2": self._whole(temperature=2.0),
            "scales, temperature 0.5": self._whole(temperature=0.5),
            "scales, sinks weigh as in the Hessians": self._whole(weights=weights),
            "scales, twice as many rows": self._whole(self.wider),
            "codes": self._whole(codes=True),
            "scales, block by block": self._parts(1),
            "scales, two blocks at a time": self._parts(2),
            "codes, block by block": self._parts(1, codes=True),
            "codes, two blocks at a time": self._parts(2, codes=True),
        }

    def _taught(self, plan: Plan, tokenizer: object) -> TeacherTargets:
        found = teacher_targets(self.decoder, plan, tokenizer, "cpu", torch.float32)
        assert found is not None
        return found

    def _whole(self, teacher: TeacherTargets | None = None, codes: bool = False, temperature: float = 1.0,
               weights: torch.Tensor | None = None) -> Iterator[None]:
        linears = {name: self.decoder.linears[name] for name in self.starts}
        objective = Softened(self.decoder, linears, teacher or self.teacher, "cpu", torch.float32, temperature, weights)
        self._refine(objective, linears, codes)
        yield

    def _parts(self, size: int, codes: bool = False) -> Iterator[None]:
        self.reset()
        count = len(self.decoder.blocks)
        hidden = self._first()
        for start in range(0, count, size):
            places = range(start, min(start + size, count))
            names = tuple(f"{self.decoder.block_names[place]}." for place in places)
            linears = {name: self.decoder.linears[name] for name in self.starts if name.startswith(names)}
            part = Part([self.decoder.blocks[place] for place in places], [self.arguments[place] for place in places],
                        linears, hidden, self.wanted[places[-1]])
            self._refine(part, linears, codes)
            with torch.no_grad():
                hidden = torch.cat([part.given(rows) for rows in hidden.split(4)])
        yield

    def _refine(self, objective: Objective, linears: Mapping[str, nn.Module], codes: bool) -> None:
        tuned = {name: (self.starts[name] if codes else replace(self.starts[name], offsets=None)).on("cpu")
                 for name in linears}
        weights = [linear.get_parameter("weight") for linear in linears.values()]
        with evaluating(self.model), learning(self.model, weights), torch.enable_grad():
            found = refine(tuned, objective, self.steps, self.plan.seed)
        print(f"  {found.before:.5f} -> {found.after:.5f}{'' if found.better else ', not kept'}", flush=True)

    def reset(self) -> None:
        """As it was quantized."""
        for name, start in self.starts.items():
            self.decoder.put(name, start.packed.dequantized(torch.float32))

    def _first(self) -> torch.Tensor:
        """What the first block is given."""
        for step in Walk(self.decoder, self.teacher.rows, self.plan.calibration.batch_size).steps():
            return step.walk.hidden.clone()
        raise AssertionError("a model without blocks")


def main() -> None:
    """Measure what is not there yet, and print the table as Markdown."""
    parser = parser_of_recipe(__doc__, "w3a16-sink")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--only", nargs="*", help="candidates, by name")
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    tokenizer, base = load_tokenizer(folder), load_model(folder, torch.float32)
    texts = held_out_texts(arguments.text, tokenizer, arguments.held_out, min(512, Decoder.of(base).max_length))
    recipe = Recipe.load(arguments.recipe).replace(
        [*arguments.set, f"weights.distill={arguments.steps}", "weights.distill_codes=true"])
    sink_map = sink_map_of(arguments, base, tokenizer, recipe)
    shape = Decoder.of(open_model(folder)).shape(arguments.model)
    lines, baseline = Lines(arguments.lines), Baseline(base)
    plan, wider = (make_plan(shape, sink_map, recipe.replace([f"calibration.rows={times * recipe.calibration.rows}"]))
                   for times in (1, 2))
    tuning = Tuning(load_model(folder, torch.float32), plan, wider, tokenizer, arguments.steps)
    bits = {"bits": str(recipe.weights.bits), "steps": str(arguments.steps)}
    for name, candidate in tuning.candidates().items():
        wanted = {text: bits | {"tuned": name} | ({"text": text} if text else {}) for text in texts}
        if (arguments.only and name not in arguments.only) or all(map(lines.has, wanted.values())):
            continue
        print(name, flush=True)
        tuning.reset()
        start = time.process_time()
        for _ in candidate:
            pass
        seconds = time.process_time() - start
        for text, labels in wanted.items():
            lines.add(Line.of(labels, baseline.compare(tuning.model, texts[text]), seconds))
    print(table(lines.lines, ["text", "bits", "steps"], recipe.seed))


if __name__ == "__main__":
    main()
