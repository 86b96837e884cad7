"""What the benchmarks share: carrying out a plan, measuring it, and tables of what was measured.

    python evals/benchmarks/measure.py LINES.jsonl [...] [--same bits method] [--only bits=3 ...]

prints the lines that a benchmark kept with `--lines FILE` as a Markdown table. A line that is kept already is not
measured again: a benchmark that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from task_scores import Scores
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import KVCachePlan, Plan, SinkMap
from sinkquant.detect import detect
from sinkquant.evaluate import Divergence, paired_difference
from sinkquant.evaluate.divergence import BATCH_ROWS, compare_side_by_side
from sinkquant.evaluate.states import last_states
from sinkquant.models import load_model, read_text, token_rows
from sinkquant.models.inputs import share_switch
from sinkquant.quantize import quantize
from sinkquant.quantize.bases import prepare_cache
from sinkquant.recipe import Recipe
from sinkquant.schemes import scheme_of
from sinkquant.sinks import SinkSelector

RESAMPLES = 2000
EXTRA = {"size": ("bytes", ",d"), "blocks": ("bytes of the blocks", ",d"), "speed": ("tokens per CPU s", ".0f"),
         "seconds": ("CPU s", ".0f"), "memory": ("peak MB", ".0f")}
"""Field of a line that not every table has -> its column and how its values are written."""


@dataclass(frozen=True)
class Line:
    """One quantized model on the held-out rows.

    Attributes:
        labels: column of the table -> what was measured.
        kl, loss, unquantized: nats per token, a number per row: KL divergence, cross-entropy of this and of the
            unquantized model.
        seconds: processor time of making it. size: bytes of its checkpoint. blocks: those of the blocks' tensors alone.
            speed: tokens decoded per second of processor time. memory: at its peak while it was made, in MB. scores:
            task -> a number per document. Null where nobody asks.
    """

    labels: dict[str, str]
    kl: list[float]
    loss: list[float]
    unquantized: list[float]
    seconds: float | None = None
    size: int | None = None
    speed: float | None = None
    blocks: int | None = None
    memory: float | None = None
    scores: dict[str, list[float]] | None = None

    @classmethod
    def of(cls, labels: dict[str, str], found: Divergence, seconds: float | None = None,
           size: int | None = None, speed: float | None = None, blocks: int | None = None,
           memory: float | None = None, scores: dict[str, list[float]] | None = None) -> Line:
        """A line of what was found, rounded as it is kept."""
        kl, loss, unquantized = ([float(f"{value:.6g}") for value in values]
                                 for values in (found.kl, found.other_loss, found.baseline_loss))
        return cls(labels, kl, loss, unquantized, None if seconds is None else round(seconds, 1), size,
                   None if speed is None else round(speed, 1), blocks, memory, scores)


def parser_of_lines(about: str | None, text: str) -> argparse.ArgumentParser:
    """For a benchmark of one model that goes on with lines that it kept. about: its docstring; text: what `--text` is.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lines", type=Path, required=True, help="one JSON object per line; gone on with")
    parser.add_argument("--sink-map", help="of this model, made before")
    parser.add_argument("--text", help=text)
    return parser


def parser_of_recipe(about: str | None, recipe: str) -> argparse.ArgumentParser:
    """For a benchmark of one recipe on one model and held-out texts. about: its docstring; recipe: the default."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sink-map", type=Path, help="of this model, made before")
    parser.add_argument("--recipe", default=recipe)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="held-out texts; default: packaged")
    parser.add_argument("--held-out", type=int, default=12, help="rows of every text")
    parser.add_argument("--lines", type=Path, help="keep what was measured here")
    return parser


def sink_map_of(arguments: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                recipe: Recipe) -> SinkMap:
    """The file that `--sink-map` names, or what detection finds in the model."""
    if arguments.sink_map:
        return SinkMap.load(arguments.sink_map)
    return detect(model, tokenizer, recipe=recipe, name=arguments.model)


def carry_out(folder: Path, base: PreTrainedModel, plan: Plan, tokenizer: PreTrainedTokenizerBase,
              keep_weights: bool = False, exact: SinkSelector | None = None,
              before: Callable[[PreTrainedModel], None] | None = None) -> tuple[PreTrainedModel, float]:
    """The model of a folder quantized as a plan says, with the exact prefix of its cache and its rotations, and the
    processor time of quantizing.

    Args:
        before: done to the model before all that.
        keep_weights: put the unquantized weights back, so that only the inputs of linears are rounded.
        exact: tokens whose inputs are never rounded, which no checkpoint can say: what that would be worth.
    """
    # Formats that transformers runs in one dtype alone are made in the checkpoint's own, and compared in float32.
    bound = any(scheme_of(form).dtypes for form in plan.formats.values())
    model = load_model(folder, "auto" if bound else torch.float32)
    if exact is not None:
        leave_exact(model, exact)
    if before is not None:
        before(model)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()} if keep_weights else {}
    start = time.process_time()
    model = quantize(model, plan, tokenizer).float()
    seconds = time.process_time() - start
    if keep_weights:
        model.load_state_dict(kept)
    return prepare_cache(model, base, plan, tokenizer), seconds


def leave_exact(model: PreTrainedModel, tokens: SinkSelector) -> None:
    """Let the inputs of some tokens through unrounded, while the model is quantized and whenever it runs."""
    switch = share_switch(model)
    switch.begun_with_prefix = tokens.mask  # type: ignore[assignment,method-assign]

    def name_them(_: torch.nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        switch.exact = tokens.mask(named["input_ids"] if "input_ids" in named else args[0])

    model.register_forward_pre_hook(name_them, with_kwargs=True)


def forget_bases(model: PreTrainedModel) -> None:
    """Make room for other matrices of a KV cache: those found with sinks exact are others than those found without."""
    for hook in model._forward_pre_hooks.values():
        if hasattr(hook, "bases"):
            hook.bases = None


def kept_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines, none where it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def keep_line(path: Path, line: Mapping[str, Any]) -> None:
    """Put a JSON object at the end of a file of lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class Baseline:
    """The unquantized model, with which all others are compared: it runs over every batch once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._states: dict[bytes, torch.Tensor] = {}

    def compare(self, other: PreTrainedModel, rows: torch.Tensor, kv: KVCachePlan | None = None) -> Divergence:
        """As `sinkquant.evaluate.compare_rows`."""
        batches = rows.split(BATCH_ROWS)
        states = [self._last_states(batch) for batch in batches]
        return compare_side_by_side(self.model, states, [(other, kv)], batches)[0]

    def _last_states(self, batch: torch.Tensor) -> torch.Tensor:
        key = batch.numpy().tobytes()
        if key not in self._states:
            self._states[key] = last_states(self.model, batch)
        return self._states[key]


class Lines:
    """What was measured so far, in a file where one is given."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines = read([path]) if path is not None and path.exists() else []
        self.baseline: Baseline | None = None

    def has(self, labels: dict[str, str], tasks: Sequence[str] = ()) -> bool:
        """Whether there is such a line, and a score of it in each of some tasks."""
        found = self.of(labels)
        return found is not None and set(tasks) <= set(found.scores or ())

    def of(self, labels: dict[str, str]) -> Line | None:
        """The line of these labels with all scores that were kept of it."""
        return next(iter(united(line for line in self.lines if line.labels == labels)), None)

    def missing(self, wanted: Collection[dict[str, str]], tasks: Sequence[str]) -> list[str]:
        """Those of some tasks in which a line of these labels has no score."""
        return [name for name in tasks if not all(self.has(labels, [name]) for labels in wanted)]

    def add(self, line: Line) -> None:
        """Keep a line."""
        self.lines.append(line)
        if self.path is not None:
            keep_line(self.path, asdict(line))

    def measure(self, labels: dict[str, str], folder: Path, base: PreTrainedModel, plan: Plan,
                tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, torch.Tensor], size: int | None = None,
                keep_weights: bool = False, exact: SinkSelector | None = None,
                before: Callable[[PreTrainedModel], None] | None = None,
                tasks: Scores | None = None) -> None:
        """Carry out a plan and keep what comes of it on every text, unless there are such lines.

        Args:
            base: the same in all calls.
            rows: name of a text -> its rows (`held_out_texts`).
            tasks: what scores a model, beside every text. A line that lacks some of them gets another line with those.
        """
        wanted = {name: labels | ({"text": name} if name else {}) for name in rows}
        names = tasks.names if tasks else ()
        if all(self.has(one, names) for one in wanted.values()):
            return
        self.baseline = self.baseline or Baseline(base)
        model, seconds = carry_out(folder, base, plan, tokenizer, keep_weights, exact, before)
        missing = self.missing(wanted.values(), names)
        scores = tasks(model, plan.kv_cache, missing) if tasks and missing else None
        for name, one in wanted.items():
            known = self.of(one)
            if known is None:
                found = self.baseline.compare(model, rows[name], plan.kv_cache)
                self.add(Line.of(one, found, seconds, size, scores=scores))
            elif not self.has(one, names):
                self.add(replace(known, scores=scores))


def united(lines: Iterable[Line]) -> list[Line]:
    """Lines of the same labels as one, the first, with the scores of all."""
    found: dict[tuple[tuple[str, str], ...], Line] = {}
    for line in lines:
        first = found.setdefault(tuple(line.labels.items()), line)
        if line.scores and first is not line:
            found[tuple(line.labels.items())] = replace(first, scores={**(first.scores or {}), **line.scores})
    return list(found.values())


def held_out_texts(named: Sequence[str], tokenizer: PreTrainedTokenizerBase, count: int,
                   length: int) -> dict[str, torch.Tensor]:
    """Rows that models are compared on, by the name of their text: int64 [count, length] each.

    Args:
        named: "NAME=FILE" each, where FILE may be left out for the packaged text; a file alone has no name, and nothing
            at all is the packaged text.
    """
    texts = [one.partition("=") if "=" in one else ("", "=", one) for one in named] or [("", "=", "")]
    return {name: token_rows(tokenizer, read_text(file or None, "evaluation", tokenizer), count, length)
            for name, _, file in texts}


def read(paths: Iterable[Path]) -> list[Line]:
    """The lines of some files."""
    return [Line(**json.loads(text)) for path in paths for text in path.read_text(encoding="utf-8").splitlines()]


def table(lines: Sequence[Line], same: Sequence[str], seed: int = 0) -> str:
    """Markdown. Every line is compared with the first that has the same labels in the columns `same`, row by row."""
    if not lines:
        return "Nothing was measured."
    shown = [name for name in EXTRA if any(getattr(line, name) is not None for line in lines)]
    tasks = list(dict.fromkeys(task for line in lines for task in line.scores or ()))
    names = list(dict.fromkeys(name for line in lines for name in line.labels))
    head = [*names, "KL, nats", "95 % interval", "less than the first of its kind", "95 % interval", "perplexity",
            "more than unquantized, 95 % interval", *(EXTRA[name][0] for name in shown), *tasks]
    rows = [head, ["---"] * len(names) + ["---:"] * (len(head) - len(names))]
    first: dict[tuple[str, ...], Line] = {}
    for line in lines:
        known = first.setdefault(tuple(line.labels.get(name, "") for name in same), line)
        rows.append([line.labels.get(name, "") for name in names] + _cells(line, known, shown, seed)
                    + [_score(task, (line.scores or {}).get(task)) for task in tasks])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _score(task: str, values: list[float] | None) -> str:
    """Mean and standard error of a task: in percent, or in nats where its name says so."""
    if not values:
        return ""
    found = torch.tensor(shown(task, values), dtype=torch.float64)
    return f"{found.mean():.3g} ± {found.std() / len(values) ** 0.5:.2g}"


def shown(task: str, values: Sequence[float]) -> list[float]:
    """The numbers of a task's documents as tables have them: in percent, or in nats where its name says so."""
    return list(values) if task.endswith(", nats") else [100 * value for value in values]


def bounds(mine: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the difference of two means, paired by row or document."""
    ones = [1.0] * len(mine)
    return paired_difference("mean", (list(mine), ones), (list(other), ones), RESAMPLES, 0)[1:]


def task_cell(task: str, mine: Sequence[float] | None, other: Sequence[float] | None) -> str:
    """Percent, or nats; and the interval of the difference from the model that this one is compared with."""
    return beside(shown(task, mine), shown(task, other) if other else None) if mine else ""


def beside(mine: Sequence[float], other: Sequence[float] | None) -> str:
    """The mean; and the interval of its difference from another's, paired by row or document."""
    mean = f"{sum(mine) / len(mine):.3g}"
    return mean if other is None else "{} ({:+.3g} to {:+.3g})".format(mean, *bounds(mine, other))


def _cells(line: Line, first: Line, shown: list[str], seed: int) -> list[str]:
    ones, zeros = [1.0] * len(line.kl), [0.0] * len(line.kl)
    kl, low, high = paired_difference("kl", (line.kl, ones), (zeros, ones), RESAMPLES, seed)
    less, least, most = paired_difference("kl", (first.kl, ones), (line.kl, ones), RESAMPLES, seed)
    loss, before = ([-value for value in values] for values in (line.loss, line.unquantized))
    more, fewest, greatest = paired_difference("perplexity", (loss, ones), (before, ones), RESAMPLES, seed)
    perplexity = torch.tensor(line.loss, dtype=torch.float64).mean().exp()
    gain = ["", ""] if line is first else [f"{less:.5f} ({less / (kl + less):.0%})", f"{least:.5f} to {most:.5f}"]
    extra = ((getattr(line, name), EXTRA[name][1]) for name in shown)
    return [f"{kl:.5f}", f"{low:.5f} to {high:.5f}", *gain, f"{perplexity:.3f}",
            f"{more:+.3f}, {fewest:+.3f} to {greatest:+.3f}",
            *("" if value is None else format(value, form) for value, form in extra)]


def main() -> None:
    """Print a table of lines that were kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--same", nargs="*", default=["bits"], help="columns of the lines that are compared")
    parser.add_argument("--only", nargs="*", default=[], metavar="COLUMN=VALUE")
    parser.add_argument("--sort", nargs="*", default=[], help="columns to sort by; numbers from the largest down")
    arguments = parser.parse_args()
    wanted = dict(one.split("=", 1) for one in arguments.only)
    lines = [line for line in read(arguments.files) if all(line.labels.get(k) == v for k, v in wanted.items())]
    for name in reversed(arguments.sort):
        order = {value: at for at, value in enumerate(dict.fromkeys(line.labels.get(name, "") for line in lines))}
        lines.sort(key=lambda line: (-float(value) if (value := line.labels.get(name, "")).isdigit() else order[value]))
    print(table(lines, arguments.same))


if __name__ == "__main__":
    main()
