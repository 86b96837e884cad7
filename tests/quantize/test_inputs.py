"""Rounded inputs: numerics against float64, what ranges and Hessians see, and what FP8 weights become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from planter import Plant, plant
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.errors import SinkquantError
from sinkquant.models import Decoder, Walk, read_text, token_rows
from sinkquant.models.inputs import InputSwitch, RoundedInputs, input_args, round_inputs, switch_of
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize, state_of
from sinkquant.quantize.hessian import collect
from sinkquant.quantize.inputs import in_front
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe
from sinkquant.schemes.codecs.fp8 import FP8Grid
from sinkquant.schemes.codecs.grid import Nearest

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
STATIC = ["activations.format=int8", "activations.scale=tensor"]
EXACT = ["activations.sinks=exclude", "kv_cache={key_bits: 16, value_bits: 16, prefix: bos}"]


def planned(model: PreTrainedModel, text: Path, *assignments: str, **found: Any) -> Plan:
    decoder = Decoder.of(model)
    recipe = Recipe().replace(["weights.bits=8", "weights.group_size=-1", "weights.method=rtn", "calibration.rows=4",
                               "calibration.length=16", f"calibration.text={text}", *assignments])
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder, **found), recipe)


def calibration_rows(text: Path) -> torch.Tensor:
    return token_rows(tiny_tokenizer(), read_text(text, "calibration"), 4, 16)


@given(seed=st.integers(0, 10**6), form=st.sampled_from(["int8", "int6", "int4"]), size=st.floats(-6, 6))
def test_every_token_is_rounded_to_its_own_grid(seed: int, form: str, size: float) -> None:
    given_ = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10**size
    found = RoundedInputs(input_args(form, "token"), InputSwitch()).rounded(given_.float())
    bits = int(form.removeprefix("int"))
    exact = given_.float().double().numpy()
    step = np.abs(exact).max(-1, keepdims=True) / ((2**bits - 1) / 2)
    expected = np.clip(np.round(exact / step), -(2**(bits - 1)), 2**(bits - 1) - 1) * step
    # A value half-way between two codes may fall to either in float32.
    assert (np.abs(found.double().numpy() - expected) <= 1e-4 * step + step * (
        np.abs(exact / step % 1 - 0.5) < 1e-4)).all()


def test_a_stored_scale_reaches_the_largest_input_of_calibration(text_file: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    reference = tiny_model("llama", dtype=torch.bfloat16).float()
    reference.get_submodule(Q).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        reference(calibration_rows(text_file))
    quantize(model, planned(model, text_file, *STATIC), tiny_tokenizer())
    scale = state_of(model).input_scales[Q]
    assert scale.dtype == torch.bfloat16
    assert float(scale) == pytest.approx(float(seen[0].abs().max()) / 127.5, rel=2**-8)
    assert set(state_of(model).input_scales) == set(Decoder.of(model).linears)


def test_ranges_leave_an_exact_prefix_out_and_it_is_let_through(text_file: Path) -> None:
    def quantized(*assignments: str) -> tuple[PreTrainedModel, float]:
        model = plant(tiny_model("llama"), Plant(1, None, frozenset({0, 1}), 7, 1, peak=60.0))
        quantize(model, planned(model, text_file, *STATIC, *assignments), tiny_tokenizer())
        return model, float(state_of(model).input_scales[DOWN])

    original = plant(tiny_model("llama"), Plant(1, None, frozenset({0, 1}), 7, 1, peak=60.0))
    reached, sink = 0.0, 0.0
    for step in Walk(Decoder.of(original), calibration_rows(text_file), 4).steps():
        if step.index == 1:
            seen: list[torch.Tensor] = []
            handle = original.get_submodule(DOWN).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(
                args[0]))
            step.run()
            handle.remove()
            sink, reached = float(seen[0][:, 0].abs().max()), float(seen[0][:, 1:].abs().max())
    assert sink > 3 * reached
    assert quantized("activations.sinks=all")[1] == pytest.approx(sink / 127.5, rel=0.03)
    model, scale = quantized(*EXACT)
    assert scale == pytest.approx(reached / 127.5, rel=0.03)
    rows = calibration_rows(text_file)
    with torch.no_grad():
        expected = original(rows).logits

        def error() -> float:
            walk = Walk(Decoder.of(model), rows, 4)
            last = [step.run() for step in walk.steps()][-1]
            return float((model.lm_head(model.model.norm(last)) - expected)[:, 1:].abs().max())

        exact = error()
        switch = switch_of(model)
        assert switch is not None
        switch.prefix = ()
        assert error() > 5 * exact  # a clipped sink is another sink


def test_hessians_are_of_rounded_inputs(text_file: Path) -> None:
    model, rows = tiny_model("llama"), calibration_rows(text_file)
    decoder = Decoder.of(model)
    plan = planned(model, text_file)
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(Q).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(rows)
    handle.remove()
    round_inputs(model, decoder.linears, {Q: input_args("int4", "token")}, {})
    exact = seen[0].flatten(0, 1).numpy()  # float32: the largest input lies half-way between two codes
    step = np.abs(exact).max(-1, keepdims=True) / np.float32(7.5)
    rounded = np.clip(np.round(exact / step), -8, 7).astype(np.float64) * step
    for step_ in Walk(decoder, rows, 4).steps():
        if step_.index == 0:
            weights = TokenWeights(rows, plan.calibration.model_copy(update={"statistics": "all", "sinks": []}))
            hessian = collect(step_, {Q: decoder.linears[Q]}, weights)[Q].mean()
    np.testing.assert_allclose(hessian.numpy(), rounded.T @ rounded / len(rounded), rtol=1e-3, atol=1e-5)


def test_the_gradient_passes_over_the_rounding() -> None:
    linear = torch.nn.Linear(8, 4)
    linear.register_forward_pre_hook(RoundedInputs(input_args("int4", "token"), InputSwitch()))
    given_ = torch.randn(2, 3, 8, requires_grad=True)
    linear(given_).sum().backward()
    torch.testing.assert_close(given_.grad, linear.weight.sum(0).expand(2, 3, 8))


def test_tuning_works_on_what_an_engine_computes(text_file: Path) -> None:
    model = tiny_model("llama")
    plan = planned(model, text_file, *STATIC, "weights.bits=4", "weights.group_size=32", "weights.method=gptq",
                   "weights.tune=3")
    quantize(model, plan, tiny_tokenizer())
    assert all(0 < loss < 0.1 for loss in state_of(model).losses.values())


def test_tokens_in_front_of_every_row_stand_there_in_calibration(text_file: Path) -> None:
    rows = calibration_rows(text_file)
    plan = planned(tiny_model("llama"), text_file, *STATIC, *EXACT)
    assert in_front(rows, plan, 256) is rows
    assert plan.kv_cache is not None
    front = plan.kv_cache.model_copy(update={"prefix": [9, 1], "front": [9]})
    there = in_front(rows, plan.model_copy(update={"kv_cache": front}), 16)
    assert there.shape == (4, 16)
    assert torch.equal(there[:, 1:], rows[:, :15])
    assert (there[:, 0] == 9).all()
    switch = InputSwitch(prefix=(9, 1))
    for begun in (there, rows):  # with what stands in front of it, and without
        flags = switch.begun_with_prefix(begun)
        assert flags is not None
        assert flags.sum(1).tolist() == [int(begun[0, 0] == 9) + 1] * 4


def test_a_linear_that_no_token_reaches_has_no_range(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    plan = planned(model, text_file, *STATIC)
    monkeypatch.setattr("sinkquant.models.inputs.InputRanges.add", lambda *_: None)
    with pytest.raises(SinkquantError, match=r"no calibration token reached .*activations.scale=token"):
        quantize(model, plan, tiny_tokenizer())


def test_fp8_takes_the_nearest_number_and_the_search_is_no_worse() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 6)[:, None]
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[grid.isfinite()]
    for dtype in (torch.bfloat16, torch.float16):
        plain, searched = (Nearest(FP8Grid(dtype), search).quantize(weight) for search in (False, True))
        for packed in (plain, searched):
            scaled = weight.double() / packed.scale.double()
            best = (grid - scaled[..., None]).abs().amin(-1)
            found = (packed.codes.double() - scaled).abs()
            assert ((found - best) <= 1e-6 * scaled.abs() + 1e-9).all()
        errors = [(packed.dequantized() - weight).square().sum(1) for packed in (plain, searched)]
        assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
        assert (errors[1] < errors[0]).any()
