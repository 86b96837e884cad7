"""vLLM on CPU runs what sinkquant writes: checkpoints of the bundled model, beside plain transformers in float32.

Not a part of the default tests: `make engines` sets vLLM up in an environment of its own and runs it. The noise of an
engine is the distance of the unquantized model, in the same run and dtype.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from server import asked
from transformers import AutoModelForCausalLM

from sinkquant.formats import load, quantize_to
from sinkquant.models import Decoder, load_tokenizer, open_model, resolve
from sinkquant.models.inputs import inputs_left_alone
from sinkquant.policy import make_plan
from sinkquant.policy.headers import nothing_found
from sinkquant.recipe import Recipe
from sinkquant.resources import demo_text

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SCORES = Path(__file__).with_name("vllm_scores.py")
NEAREST = ("weights.method=rtn", "weights.smooth=none", "kv_cache=null", "protect.channels=none")
RUN = {"w4a16-sink": "bfloat16", "head-in-4-bits": "bfloat16", "w8a8-sink": "float32", "fp8-sink": "float32"}
"""Checkpoint -> dtype in which vLLM computes; its kernel for 4 bits has no float32."""
MADE_BY = {"head-in-4-bits": ("w4a16-sink", "weights.lm_head=4")}
"""Checkpoint that has no name among the recipes -> its recipe and what is set there."""
REFUSED = ("w3a16-sink", "w8a16-sink-rtn")
"""Recipes that `engine: vllm-cpu` refuses."""
PORT = 18_474


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    """Four rows of the packaged evaluation text."""
    text, tokenizer = demo_text("evaluation").read_text(encoding="utf-8"), load_tokenizer(resolve("demo"))
    return [tokenizer(text[start:start + 1400])["input_ids"][:196] for start in range(0, 6000, 1500)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipe -> its checkpoint of the bundled model, rounded to nearest: what is checked is how it is read."""
    place, source, found = tmp_path_factory.mktemp("vllm"), resolve("demo"), {}
    shape = Decoder.of(open_model(source)).shape("demo")
    for name in (*RUN, *REFUSED):
        recipe_name, *more = MADE_BY.get(name, (name,))
        recipe = Recipe.load(recipe_name).replace([*NEAREST, *more])
        found[name] = place / name
        quantize_to(found[name], open_model(source), make_plan(shape, nothing_found(shape), recipe),
                    load_tokenizer(source))
    return found


@pytest.fixture(scope="module")
def scored(folders: dict[str, Path], rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name -> what vLLM gives; the unquantized model under its dtypes."""
    place = tmp_path_factory.mktemp("scores")
    (place / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    asked = [f"{dtype}={dtype}={resolve('demo')}" for dtype in dict.fromkeys(RUN.values())]
    asked += [f"{name}={RUN.get(name, 'bfloat16')}={folder}" for name, folder in folders.items()]
    subprocess.run([str(PYTHON), str(SCORES), str(place / "rows.json"), str(place / "out.json"), *asked], check=True)
    found: dict[str, Any] = json.loads((place / "out.json").read_text(encoding="utf-8"))
    return found


def expected(folder: Path, rows: list[list[int]], alone: bool = False) -> list[list[float]]:
    """Log-probabilities of plain transformers, float32. alone: inputs are not rounded."""
    if alone:
        model, _ = load(folder, dtype=torch.float32)
        with inputs_left_alone(model):
            return log_probabilities(model, rows)
    return log_probabilities(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), rows)


@torch.no_grad()
def log_probabilities(model: Any, rows: list[list[int]]) -> list[list[float]]:
    found = []
    for row in rows:
        logits = model(torch.tensor([row])).logits[0].log_softmax(-1)
        found.append(logits[torch.arange(len(row) - 1), row[1:]].tolist())
    return found


def distance(one: list[list[float]], other: list[list[float]]) -> float:
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("name", RUN)
def test_the_same_log_probabilities(name: str, folders: dict[str, Path], scored: dict[str, Any],
                                    rows: list[list[int]]) -> None:
    source, mine = resolve("demo"), scored[name]
    assert "error" not in mine, mine
    noise = distance(scored[RUN[name]]["logprobs"], expected(source, rows))
    off = distance(mine["logprobs"], expected(folders[name], rows))
    print(f"{name}: {off:.2e}, noise {noise:.2e}, {mine['kernels']}, {mine['seconds']:.0f} s")
    if "float32" in RUN[name]:  # inputs are rounded: one that falls to the other side moves all after it
        alone = distance(expected(folders[name], rows, alone=True), expected(folders[name], rows))
        print(f"{name}: {alone:.2e} where inputs are left alone")
        assert off < alone
    else:
        assert off < 2 * noise


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_table_says_it_does_not_run_it_does_not(name: str, scored: dict[str, Any]) -> None:
    print(f"{name}: {scored[name].get('error')}")
    assert "error" in scored[name]


def test_the_server_of_the_guide_answers(folders: dict[str, Path]) -> None:
    folder = folders["w4a16-sink"]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "bfloat16",
               "--max-model-len", "256", "--enforce-eager", "--port", str(PORT)]
    with subprocess.Popen(command, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            answer = asked(f"http://127.0.0.1:{PORT}/v1/completions", {
                "model": str(folder), "prompt": "The attention sink", "max_tokens": 8, "temperature": 0}, server)
        finally:
            server.terminate()
    assert answer["usage"]["completion_tokens"] > 0
    print(f"vLLM's server: {answer['choices'][0]['text']!r}")
