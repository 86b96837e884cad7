"""What the caller has set of torch changes nothing that is computed here, and is theirs again afterwards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import tiny_model
from small_runs import small_recipe
from tiny_tokenizer import tiny_tokenizer

import sinkquant as sq
from sinkquant.models.numerics import own_numerics


@contextlib.contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "bfloat16": lambda: default(torch.bfloat16), "float64": lambda: default(torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "inference": torch.inference_mode}


def test_the_callers_settings_are_back_afterwards_also_after_an_error() -> None:
    @own_numerics()
    def fails() -> None:
        assert torch.zeros(1).dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_inference_mode_enabled()
        raise KeyError

    with default(torch.bfloat16), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyError):
            fails()
        assert torch.zeros(1).dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()


@pytest.fixture(scope="module")
def made(text_file: Path) -> Callable[[], tuple[str, str, list[torch.Tensor]]]:
    """What a whole job makes of a model: sinks, sensitivities, weights by rounding and by GPTQ."""
    recipe = small_recipe(text_file, "detect.super_weights=false", "detect.long_rows=0", "sensitivity.bits=[3]",
                          "sensitivity.rows=2", "sensitivity.length=32")
    tokenizer, model = tiny_tokenizer(), tiny_model("llama", num_hidden_layers=2)

    def make() -> tuple[str, str, list[torch.Tensor]]:
        sinks = sq.detect(model, tokenizer, recipe=recipe, name="tiny")
        weights: list[torch.Tensor] = []
        for method in ("rtn", "gptq"):
            asked = recipe.replace([f"weights.method={method}"])
            plan = sq.plan(model, sinks, asked)
            with torch.inference_mode(False):  # weights that are made in it are refused
                mine = copy.deepcopy(model)
            weights += sq.quantize(mine, plan, tokenizer).parameters()
        return sinks.to_json(), sq.find_sensitivity(model, tokenizer, sinks, recipe).to_json(), weights

    return make


@pytest.fixture(scope="module")
def expected(made: Callable[[], tuple[str, str, list[torch.Tensor]]]) -> tuple[str, str, list[torch.Tensor]]:
    return made()


@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_depends_on_what_the_caller_has_set(
        setting: str, made: Callable[[], tuple[str, str, list[torch.Tensor]]],
        expected: tuple[str, str, list[torch.Tensor]]) -> None:
    with SETTINGS[setting]():
        sinks, sensitivities, weights = made()
    assert (sinks, sensitivities) == expected[:2]
    assert all(torch.equal(one, other) for one, other in zip(weights, expected[2], strict=True))


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = copy.deepcopy(tiny_model("llama"))
    with pytest.raises(sq.RequestError, match="loaded under"):
        sq.detect(model, tiny_tokenizer())
