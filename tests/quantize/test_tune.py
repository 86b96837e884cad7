"""Block-wise tuning: it lowers the block's error, stays on the grid, and is the same in every run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.models import Decoder, read_text, token_rows
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize, state_of
from sinkquant.recipe import Recipe


def tuned(text: Path, family: str, iterations: int, method: str = "rtn",
          dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model of the family at 2 bits with so many iterations."""
    model = tiny_model(family, dtype=dtype)
    recipe = Recipe().replace([
        f"calibration.text={text}", "calibration.rows=8", "calibration.length=48", "weights.bits=2",
        "weights.group_size=32", f"weights.method={method}", f"weights.tune={iterations}"])
    if family == "mixtral":  # tuning does not reach packed experts, and says so
        recipe = recipe.replace(["weights.ignore=['*.experts.*']"])
    decoder = Decoder.of(model)
    return quantize(model, make_plan(decoder.shape(""), sink_map_of(decoder), recipe), tiny_tokenizer())


def block_error(model: PreTrainedModel, family: str, text: Path) -> float:
    """Relative squared error of what all blocks give together, on the calibration rows, in float64."""
    rows = token_rows(tiny_tokenizer(), read_text(str(text), "calibration"), 8, 48)
    with torch.no_grad():
        wanted, given = (one.base_model(rows, output_hidden_states=True, use_cache=False).hidden_states[-2].double()
                         for one in (tiny_model(family), model))
    return float(((given - wanted).square().mean(-1) / wanted.square().mean(-1)).mean())


@pytest.mark.parametrize(("family", "method"), [("llama", "rtn"), ("llama", "gptq"), ("gemma2", "rtn"), ("opt", "rtn"),
                                                ("mixtral", "gptaq"), ("phi3", "rtn")])
def test_tuning_brings_the_blocks_nearer_to_the_unquantized_ones(family: str, method: str, text_file: Path) -> None:
    plain, better = (block_error(tuned(text_file, family, n, method), family, text_file) for n in (0, 40))
    assert better < 0.97 * plain


def test_the_model_holds_what_its_packed_weights_give(text_file: Path) -> None:
    model = tuned(text_file, "llama", 10, dtype=torch.bfloat16)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, packed in state_of(model).weights.items():
        assert packed.codes.min() >= -2
        assert packed.codes.max() <= 1
        assert packed.scale.dtype == torch.bfloat16
        assert torch.equal(model.get_submodule(name).weight.data, packed.dequantized(torch.bfloat16))


def test_two_runs_give_the_same_codes(text_file: Path) -> None:
    one, two = (state_of(tuned(text_file, "llama", 10)).weights for _ in range(2))
    assert all(torch.equal(one[name].codes, two[name].codes) for name in one)
    assert all(torch.equal(one[name].scale, two[name].scale) for name in one)
