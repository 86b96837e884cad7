"""Checkpoints that round inputs: the same logits in a process that knows transformers only, in ours, and from disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import digest, plain_logits, quantized, weight_bytes
from families import FAMILIES
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.formats import load, open_quantized, save
from sinkquant.formats.load import load_dense
from sinkquant.formats.simulated import SCALES
from sinkquant.models import Decoder

W8A8 = ("activations.format=int8",)
FP8 = ("activations.format=fp8",)
STATIC = ("activations.scale=tensor",)
KINDS = {"w8a8": ("gptq", 8, -1, W8A8), "w8a8-static": ("gptq", 8, -1, W8A8 + STATIC),
         "w4a8": ("rtn", 4, 32, W8A8), "w3a8-static": ("gptq", 3, 64, W8A8 + STATIC),
         "fp8": ("rtn", 8, -1, FP8), "fp8-static": ("rtn", 8, -1, FP8 + STATIC)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    family: str
    kind: str
    dtype: torch.dtype
    more: tuple[str, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)

    def made(self, text: Path) -> tuple[PreTrainedModel, Plan]:
        method, bits, group, settings = KINDS[self.kind]
        return quantized(text, self.family, method, bits, group, self.dtype, settings + self.more, **self.overrides)[:2]


# Experts in float32 are summed in an order that depends on where their weights lie in memory: 16 bits for these.
CASES = [Case("llama", kind, DTYPES[i % 3]) for i, kind in enumerate(KINDS)]
CASES += [Case(family, list(KINDS)[i % 6], DTYPES[1 + i % 2]) for i, family in enumerate(FAMILIES)
          if family not in ("gpt2", "llama")]
CASES += [
    # Several ways to round inputs at once, and linears whose inputs are left alone with their weights.
    Case("llama", "w8a8-static", torch.float32, ("weights.overrides=[{pattern: '*.o_proj', bits: 4, group_size: 32}, "
                                                 "{pattern: '*.2.*.down_proj', bits: 16}]",)),
    Case("opt", "w8a8", torch.float32, ("weights.method=gptaq",)),
    Case("llama", "w4a8", torch.float32, overrides={"tie_word_embeddings": True})]


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Result:
    expected: torch.Tensor
    plain: torch.Tensor
    plan: Plan
    folder: Path


@pytest.fixture(scope="module")
def results(rows: torch.Tensor, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    work = tmp_path_factory.mktemp("rounded")
    made = []
    for index, case in enumerate(CASES):
        model, plan = case.made(text_file)
        with torch.no_grad():
            logits = model(rows, use_cache=False).logits
        made.append((logits, plan, save(model, tiny_tokenizer(), work / str(index))))
    plain = plain_logits(rows, [folder for *_, folder in made], work)
    return [Result(logits, plain[i], plan, folder) for i, (logits, plan, folder) in enumerate(made)]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{c.family}-{c.kind}-{i}" for i, c in enumerate(CASES)])
def test_plain_transformers_ours_and_the_walk_round_alike(index: int, results: list[Result],
                                                          rows: torch.Tensor) -> None:
    found = results[index]
    assert torch.equal(found.plain, found.expected)
    assert found.plan.weight_bytes == weight_bytes(found.folder)
    with torch.no_grad():
        assert torch.equal(load_dense(found.folder)(rows, use_cache=False).logits, found.expected)
        opened = Decoder.of(open_quantized(found.folder))
        with opened.present([opened.model]):
            assert torch.equal(opened.model(rows, use_cache=False).logits, found.expected)


@pytest.mark.parametrize("index", range(0, len(CASES), 4))
def test_a_key_value_cache_changes_nothing(index: int, results: list[Result], rows: torch.Tensor) -> None:
    plain, ours = AutoModelForCausalLM.from_pretrained(results[index].folder), load_dense(results[index].folder)
    with torch.no_grad():
        logits = []
        for model in (plain, ours):
            first = model(rows[:, :16], use_cache=True)
            logits.append(model(rows[:, 16:], past_key_values=first.past_key_values).logits)
    assert torch.equal(*logits)


def test_what_is_stored_is_what_engines_read(results: list[Result]) -> None:
    by_kind = {case.kind: found for case, found in zip(CASES, results, strict=True) if case.family == "llama"}
    for kind, layout, codes in (("w8a8", "int-quantized", torch.int8), ("fp8", "float-quantized", torch.float8_e4m3fn)):
        config = json.loads((by_kind[kind].folder / "config.json").read_text())["quantization_config"]
        assert config["format"] == layout
        inputs = config["config_groups"]["group_0"]["input_activations"]
        assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (8, "token", True)
        tensors = load_file(by_kind[kind].folder / "model.safetensors")
        assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == codes
        assert not any(name.endswith("input_scale") for name in tensors)
        assert by_kind[kind].plan.loads_in == ["transformers", "vllm"]
    config = json.loads((by_kind["w8a8-static"].folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    tensors = load_file(by_kind["w8a8-static"].folder / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.input_scale"].shape == (1,)


def test_the_file_of_fp8_is_what_safetensors_would_write(results: list[Result], tmp_path: Path) -> None:
    file = next(found.folder for case, found in zip(CASES, results, strict=True)
                if case.kind == "fp8-static") / "model.safetensors"
    save_file(load_file(file), tmp_path / "again.safetensors", {"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("more", [(), STATIC])
@pytest.mark.parametrize("form", ["int6", "int4"])
def test_simulated_inputs_are_rounded_by_us_alone(form: str, more: tuple[str, ...], rows: torch.Tensor,
                                                  text_file: Path, tmp_path: Path) -> None:
    model, plan, _ = quantized(text_file, more=(f"activations.format={form}", *more))
    folder = save(model, tiny_tokenizer(), tmp_path / "out")
    plain = quantized(text_file)[0]
    assert "simulated" in plan.notes[0]
    assert all(d.inputs_in_words().endswith("simulated") for d in plan.modules.values())
    with torch.no_grad():
        expected = model(rows, use_cache=False).logits
        assert torch.equal(load(folder)[0](rows, use_cache=False).logits, expected)
        assert not torch.equal(expected, plain(rows, use_cache=False).logits)
    assert (folder / SCALES).is_file() == bool(more)
    weights = save(plain, tiny_tokenizer(), tmp_path / "weights") if not more else None
    if weights:  # the checkpoint is the weights' one
        same = ("model.safetensors", "config.json")
        assert [digest(folder)[name] for name in same] == [digest(weights)[name] for name in same]
    if more:
        shutil.rmtree(folder / "simulated")
        with pytest.raises(RequestError, match="lacks the scale of the simulated inputs"):
            load(folder)


def test_another_tools_checkpoint_rounds_inputs_without_our_file(results: list[Result], rows: torch.Tensor,
                                                                 tmp_path: Path) -> None:
    copy = Path(shutil.copytree(results[1].folder, tmp_path / "copy"))
    (copy / "sinkquant.json").unlink()
    with torch.no_grad():
        assert torch.equal(load(copy)[0](rows, use_cache=False).logits, results[1].expected)
