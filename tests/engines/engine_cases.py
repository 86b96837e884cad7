"""The checkpoints that engines are asked to load: every packaged recipe's of the bundled model, some of a real one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sinkquant import detect, run
from sinkquant.artifacts import Plan, SinkMap
from sinkquant.models import Decoder, load_tokenizer, open_model, resolve
from sinkquant.policy.headers import nothing_found
from sinkquant.recipe import Recipe, recipe_names
from sinkquant.resources import demo_text

BUNDLED = "demo"
FEW = ("evaluate.skip=true", "calibration.rows=8", "calibration.length=128", "sensitivity.rows=4",
       "sensitivity.length=128", "sensitivity.batch_size=4")
"""What is checked is how codes are read, not how well they were chosen."""
FEWER = ("weights.method=rtn", "weights.scale_search=false", "calibration.rows=4", "calibration.length=64")
"""Of a real model."""
SHORTER = {"w2-distill-sink": ("weights.distill=2",)}
VARIANTS = {"w4a16-sink, head of 4 bits": ("weights.lm_head=4",),
            "w8a8-sink, for vllm-cpu": ("engine=vllm-cpu",),
            "w8a8-static-sink, for vllm-cpu": ("engine=vllm-cpu",),
            "w4a8-sink, for vllm-cpu": ("engine=vllm-cpu", "weights.group_size=-1")}
"""Name, of which the recipe's is the first word -> what is set there."""
REAL_VLLM = ("w4a16-sink", "w8a8-sink, for vllm-cpu", "fp8-sink")
REAL_GGUF = ("gguf-iq4-sink", "gguf-q4-sink", "gguf-q4-sink, zero points")
MIXED = "weights.overrides=[{pattern: '*.2.*', bits: 8}, {pattern: '*.3.*', bits: 5}]"
GGUF_VARIANTS = {"gguf-iq4-sink, mixed": (MIXED,), "gguf-q4-sink, mixed": (MIXED,),
                 "gguf-q4-sink, zero points": ("weights.symmetric=false", MIXED),
                 "gguf-q4-sink, ends in Q8_0": ("weights.ends=q8_0",)}


@dataclass(frozen=True)
class Case:
    """A checkpoint: of which model, by which recipe, and what is set in it."""

    model: str
    name: str
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{Path(self.model).name}: {self.name}"

    @property
    def recipe(self) -> Recipe:
        """As it is carried out."""
        name = self.name.partition(",")[0]
        few = FEW if self.model == BUNDLED else FEW + FEWER
        return Recipe.load(name).replace([*few, *SHORTER.get(name, ()), *self.settings])


def _is_gguf(name: str) -> bool:
    return Recipe.load(name).backend == "gguf"


def of_vllm() -> list[Case]:
    """Every packaged recipe of other files than GGUF's, and what an engine asks for in another form."""
    return [*(Case(BUNDLED, name) for name in recipe_names() if not _is_gguf(name)),
            *(Case(BUNDLED, name, settings) for name, settings in VARIANTS.items())]


def of_gguf() -> list[Case]:
    """Every packaged recipe of GGUF files, and their other kinds of blocks."""
    return [*(Case(BUNDLED, name) for name in recipe_names() if _is_gguf(name)),
            *(Case(BUNDLED, name, settings) for name, settings in GGUF_VARIANTS.items())]


def of_real_model(folder: str, gguf: bool) -> list[Case]:
    """Some of a model that is not packaged."""
    names, variants = (REAL_GGUF, GGUF_VARIANTS) if gguf else (REAL_VLLM, VARIANTS)
    return [Case(folder, name, variants.get(name, ())) for name in names]


class Checkpoints:
    """Checkpoints in a folder, each made when it is asked for first."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.maps: dict[str, SinkMap] = {}

    def __call__(self, case: Case) -> Path:
        """The folder of a case's checkpoint.

        Raises:
            RequestError: the recipe cannot be carried out on that model.
        """
        out = self.place / "".join(letter if letter.isalnum() else "-" for letter in str(case))
        if not out.is_dir():
            run(case.recipe, case.model, out, sink_map=self.sink_map(case.model))
        return out / "model"

    def plan(self, case: Case) -> Plan:
        """What was carried out."""
        return Plan.load(self(case).parent / "plan.json")

    def sink_map(self, model: str) -> SinkMap:
        """Of the bundled model; a real one's sinks are not looked for here, since that takes minutes."""
        if model not in self.maps:
            folder = resolve(model)
            opened = open_model(folder)
            self.maps[model] = (detect(opened, load_tokenizer(folder), name=model) if model == BUNDLED else
                                nothing_found(Decoder.of(opened).shape(model)))
        return self.maps[model]


@cache
def rows_of(model: str) -> list[list[int]]:
    """Four rows of the packaged evaluation text."""
    text, tokenizer = demo_text("evaluation").read_text(encoding="utf-8"), load_tokenizer(resolve(model))
    return [tokenizer(text[start:start + 1400])["input_ids"][:196] for start in range(0, 6000, 1500)]


@torch.no_grad()
def scores_of(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """log-probabilities float32 [tokens, vocabulary] of every row."""
    return [model(torch.tensor([row])).logits[0].float().log_softmax(-1) for row in rows]


def scored_tokens(scores: list[torch.Tensor], rows: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of the rows' own tokens but the first, one after the other."""
    return torch.cat([one[torch.arange(len(row) - 1), row[1:]] for one, row in zip(scores, rows, strict=True)])


def below_best(model: Any, rows: list[list[int]], continued: list[list[int]]) -> list[float]:
    """How far, in nats, a token of every continuation lies below the best one of `model` at most, given all before it;
    0 where the continuation is that of the model itself."""
    found = []
    for row, new in zip(rows, continued, strict=True):
        (scores,) = scores_of(model, [[*row, *new]])
        here = scores[len(row) - 1:-1]
        found.append(float((here.amax(-1) - here[torch.arange(len(new)), new]).max()))
    return found
