"""Importance matrices: sums and counts beside a plain forward pass in float64, llama.cpp's names and file; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from commands import call, one_sentence, settings
from families import tiny_mixture, tiny_model
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from sinkmaps import STOP, sink_map_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sinkquant.artifacts import SinkMap
from sinkquant.cli import models
from sinkquant.errors import RequestError
from sinkquant.imatrix import imatrix
from sinkquant.imatrix.file import EXPERTS, tensor_names
from sinkquant.models import Decoder, open_model, read_text, token_rows
from sinkquant.policy import make_plan
from sinkquant.policy.calibration import sink_selectors
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "gemma2": "gemma2", "phi3": "phi3", "gpt2": "gpt2",
                 "gpt_neox": "gptneox", "mixtral": "llama", "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe",
                 "olmoe": "olmoe", "deepseek_v3": "deepseek2"}
"""Family -> what llama.cpp calls it."""
DENSE = ("llama", "gemma2", "phi3", "gpt2", "gpt_neox")
MIXED = ("mixtral", "qwen2_moe", "deepseek_v3")


def recipe_of(text: Path, *more: str) -> Recipe:
    return Recipe().replace([f"calibration.text={text}", "calibration.rows=6", "calibration.length=24",
                             "calibration.batch_size=4", "calibration.min_expert_tokens=16", *more])


def rows_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> torch.Tensor:
    text = read_text(recipe.calibration.text, "calibration", tokenizer)
    return token_rows(tokenizer, text, 6, 24, "auto", Decoder.of(model).vocabulary)


def map_of(model: PreTrainedModel) -> SinkMap:
    return sink_map_of(Decoder.of(model), tokens=(STOP,))


def token_weights(rows: torch.Tensor, model: PreTrainedModel, recipe: Recipe) -> torch.Tensor:
    """float64 [tokens]: a full stop weighs what its selector says."""
    (stop,) = sink_selectors(map_of(model), recipe)
    weights = torch.ones(rows.shape, dtype=torch.float64)
    weights[rows == stop.token_id] = stop.weight
    assert 1 < stop.weight < 16
    assert 0 < (rows == stop.token_id).sum() < rows.numel()
    return weights.flatten()


def in_file(path: Path) -> dict[str, numpy.ndarray[Any, Any]]:
    return {one.name: one.data for one in GGUFReader(path).tensors}


def mean_square(inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (inputs.double().square() * weights[:, None]).sum(0) / weights.sum()


@pytest.mark.parametrize("family", DENSE + MIXED)
def test_sums_and_counts_are_those_of_a_plain_pass(family: str, text_file: Path, tokenizer: PreTrainedTokenizerFast,
                                                   tmp_path: Path) -> None:
    model = tiny_model(family) if family in DENSE else tiny_mixture(family)
    recipe, decoder = recipe_of(text_file), Decoder.of(model)
    rows = rows_of(model, tokenizer, recipe)
    weights = token_weights(rows, model, recipe)
    seen: dict[str, Any] = {}
    owners = {part.owner: part.module for part in decoder.experts.values()}
    for name, module in (decoder.linears | owners).items():
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.update({name: [*args, *kwargs.values()]}), with_kwargs=True)
    imatrix(model, tokenizer, tmp_path / "i.gguf", map_of(model), recipe)
    found = in_file(tmp_path / "i.gguf")
    with torch.no_grad():
        model(rows, use_cache=False)
    names = tensor_names(decoder)
    assert len(found) == 2 * (len(set(names.values())) + 3 * len(owners))
    for name, tensor in names.items():
        expected = mean_square(seen[name][0].flatten(0, -2), weights) * rows.numel()
        assert numpy.allclose(found[f"{tensor}.in_sum2"], expected[None], rtol=1e-4), tensor
        assert found[f"{tensor}.counts"].tolist() == [[rows.numel()]]
    for owner, module in owners.items():
        states, chosen = seen[owner][0].flatten(0, -2).double(), seen[owner][1].reshape(rows.numel(), -1)
        fused = {name: parameter.detach().double() for name, parameter in module.named_parameters()}
        block, few = decoder.block_of(owner), 0
        for expert in range(16):
            mine = (chosen == expert).any(1)
            everyone = int(mine.sum()) < 16  # then the layer's tokens stand for its own
            few += everyone
            mine = mine | everyone
            gate, up = (states[mine] @ fused["gate_up_proj"][expert].T).chunk(2, dim=1)
            read = {"up": states[mine], "down": gate / (1 + torch.exp(-gate)) * up}
            for role, shorts in EXPERTS.items():
                for short in shorts:
                    assert found[f"blk.{block}.{short}.weight.counts"][expert].item() == mine.sum()
                    expected = mean_square(read[role], weights[mine]) * mine.sum()
                    assert numpy.allclose(found[f"blk.{block}.{short}.weight.in_sum2"][expert], expected, rtol=1e-4)
        assert 0 < few < 16


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(family: str) -> None:
    model = tiny_model(family) if family in DENSE or family == "qwen3" else tiny_mixture(family)
    decoder = Decoder.of(model)
    (known,) = [one for one, name in MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family]]
    theirs = get_tensor_name_map(known, len(decoder.blocks))
    for name, mine in tensor_names(decoder).items():
        assert mine == theirs.get_name(f"{name}.weight", (".weight",)), name
    for part in decoder.experts.values():  # stacked under the names that the package's converter gives them
        stacked = {"up": ("experts.gate_proj", "experts.up_proj"), "down": ("experts.down_proj",)}[part.role]
        block = decoder.block_of(part.owner)
        assert [theirs.get_name(f"model.layers.{block}.mlp.{one}") for one in stacked] == [
            f"blk.{block}.{short}" for short in EXPERTS[part.role]]


def test_the_file_is_what_llama_quantize_reads(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    done = call("imatrix", tiny_folder, "-o", out, *settings(text_file, "calibration.rows=4", "calibration.length=16",
                                                            "protect.tokens=false"))
    assert done.code == 0, done.err
    assert "llama-quantize --imatrix" in done.out
    assert "protect.tokens=false" not in done.out  # that is what was asked
    reader = GGUFReader(out)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {"general.type": "imatrix", "imatrix.datasets": [str(text_file)], "imatrix.chunk_count": 4,
                      "imatrix.chunk_size": 16}
    assert [one.name for one in reader.tensors][:2] == ["blk.0.attn_k.weight.in_sum2", "blk.0.attn_k.weight.counts"]
    assert {one.tensor_type.name for one in reader.tensors} == {"F32"}
    again = tmp_path / "again.gguf"
    call("imatrix", tiny_folder, "-o", again, *settings(text_file, "calibration.rows=4", "calibration.length=16",
                                                       "protect.tokens=false"))
    assert again.read_bytes() == out.read_bytes()
    weighed = call("imatrix", tiny_folder, "-o", again, *settings(text_file, "calibration.rows=4",
                                                                 "calibration.length=16"))
    assert "below 4 bits" in weighed.out, weighed.err


@pytest.mark.parametrize(("family", "message"), [
    ("opt", r"llama.cpp's name for model\.decoder\.layers\.0\..* of OPTForCausalLM is not known here"),
    ("gpt_oss", "the experts of .* cannot be told apart")])
def test_models_that_are_refused(family: str, message: str, tokenizer: PreTrainedTokenizerFast,
                                 tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        imatrix(tiny_model(family), tokenizer, tmp_path / "i.gguf", recipe=Recipe())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", ["all", "attention"])
def test_no_sinks_are_looked_for_where_the_statistics_know_none(
        policy: str, tiny_folder: Path, text_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_sinks", None)
    recipe = recipe_of(text_file, f"protect.statistics={policy}")
    imatrix(open_model(tiny_folder), tokenizer, tmp_path / "a.gguf", recipe=recipe)
    done = call("imatrix", tiny_folder, "-o", tmp_path / "b.gguf", *settings(
        text_file, "calibration.rows=6", "calibration.length=24", "calibration.batch_size=4",
        "calibration.min_expert_tokens=16", f"protect.statistics={policy}"))
    assert done.code == 0, done.err
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_what_is_missing_is_said_before_anything_is_computed(tiny_folder: Path, text_file: Path, tmp_path: Path,
                                                             tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = recipe_of(text_file, "weights.method=rtn")
    with pytest.raises(RequestError, match="needs a sink map; run detect, or set"):
        imatrix(open_model(tiny_folder), tokenizer, tmp_path / "i.gguf", recipe=recipe)
    model = tiny_model("llama")
    plan_map = map_of(model)
    quantize(model, make_plan(Decoder.of(model).shape("tiny"), plan_map, recipe.replace(["weights.group_size=32"])))
    with pytest.raises(RequestError, match="this model is quantized"):
        imatrix(model, tokenizer, tmp_path / "i.gguf", plan_map, recipe)
    other = tiny_model("llama", num_hidden_layers=2)
    with pytest.raises(RequestError, match="sink map is of another model"):
        imatrix(other, tokenizer, tmp_path / "i.gguf", plan_map, recipe)
    for place, said in ((tmp_path / "none" / "i.gguf", "there is no folder"), (tmp_path, "is a folder")):
        assert said in one_sentence(call("imatrix", tiny_folder, "-o", place))
