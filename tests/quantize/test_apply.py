"""A plan is carried out as it says, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.models import Decoder
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize, state_of, to_integers
from sinkquant.recipe import Recipe

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def small(text_file: Path) -> list[str]:
    return ["weights.group_size=32", "calibration.rows=4", "calibration.length=16", f"calibration.text={text_file}"]


def planned(model: PreTrainedModel, assignments: list[str], **found: Any) -> Plan:
    decoder = Decoder.of(model)
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder, **found), Recipe().replace(assignments))


def test_rounding_is_done_as_planned_and_nothing_else_changes(model: PreTrainedModel, tiny: PreTrainedModel) -> None:
    plan = planned(model, ["weights.method=rtn", "weights.group_size=32", f"weights.ignore=[{DOWN}]"])
    assert quantize(model, plan) is model
    before = dict(tiny.named_parameters())
    for name, parameter in model.named_parameters():
        decision = plan.modules.get(name.removesuffix(".weight"))
        if decision is None or decision.bits == 16:
            assert torch.equal(parameter, before[name]), name
        else:
            assert torch.equal(parameter, to_integers(4, 32).quantize(before[name]).dequantized()), name
    assert set(state_of(model).weights) == set(plan.modules) - {DOWN}
    assert all(0 < loss < 0.1 for loss in state_of(model).losses.values())


def test_gptq_is_never_rounding_in_disguise(model: PreTrainedModel, tiny: PreTrainedModel, small: list[str]) -> None:
    quantize(model, planned(model, small), tiny_tokenizer())
    before = dict(tiny.named_parameters())
    for name, weight in state_of(model).weights.items():
        rounded = to_integers(4, 32).quantize(before[f"{name}.weight"])
        assert (weight.codes != rounded.codes).float().mean() > 0.005, name


def test_what_sinks_weigh_changes_the_result_and_two_runs_do_not_differ(small: list[str]) -> None:
    def codes(*more: str) -> torch.Tensor:
        model = tiny_model("llama")
        quantize(model, planned(model, [*small, *more]), tiny_tokenizer())
        return torch.cat([weight.codes.flatten() for weight in state_of(model).weights.values()])

    first = codes()
    assert torch.equal(first, codes())
    assert not torch.equal(first, codes("protect.sink_weight=1"))


def test_methods_may_be_mixed_inside_a_fused_group(model: PreTrainedModel, tiny: PreTrainedModel,
                                                   small: list[str]) -> None:
    name = "model.layers.0.self_attn.q_proj"
    plan = planned(model, [*small, f"weights.overrides=[{{pattern: {name}, bits: 4, method: rtn}}]",
                           "weights.scale_search=false"])
    quantize(model, plan, tiny_tokenizer())
    rounded = to_integers(4, 32, scale_search=False).quantize(dict(tiny.named_parameters())[f"{name}.weight"])
    assert torch.equal(state_of(model).weights[name].codes, rounded.codes)
    assert plan.modules[name.replace("q_proj", "k_proj")].method == "gptq"


def test_gptq_without_a_tokenizer_is_refused(model: PreTrainedModel, small: list[str]) -> None:
    with pytest.raises(RequestError, match="hand over the tokenizer"):
        quantize(model, planned(model, small))


@pytest.mark.parametrize(("text", "message"), [(" \n", "is empty"), ("w9 w10 w11", "shorter than one row")])
def test_a_calibration_text_that_holds_no_row_is_refused(model: PreTrainedModel, small: list[str], tmp_path: Path,
                                                         text: str, message: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(RequestError, match=message):
        quantize(model, planned(model, [*small, f"calibration.text={tmp_path / 't.txt'}"]), tiny_tokenizer())
    with pytest.raises(RequestError, match="cannot read the calibration text"):
        quantize(model, planned(model, [*small, f"calibration.text={tmp_path / 'none.txt'}"]), tiny_tokenizer())


def test_a_model_is_quantized_once(model: PreTrainedModel) -> None:
    plan = planned(model, ["weights.method=rtn", "weights.group_size=32"])
    quantize(model, plan)
    with pytest.raises(RequestError, match="quantized already"):
        quantize(model, plan)
    with pytest.raises(RequestError, match="was not quantized by sinkquant"):
        state_of(tiny_model("llama"))


@pytest.mark.parametrize(("family", "change", "message"), [
    ("llama", {"num_hidden_layers": 4}, "another model"), ("llama", {"num_hidden_layers": 2}, "no nn.Linear of this"),
    ("llama", {"hidden_size": 128}, "another size"), ("opt", {}, "another model"), ("gpt2", {}, "another model")])
def test_a_plan_for_another_model_is_refused(model: PreTrainedModel, family: str, change: dict[str, Any],
                                             message: str) -> None:
    plan = planned(model, ["weights.method=rtn", "weights.group_size=32"])
    other = tiny_model(family, **change)
    before = {name: parameter.clone() for name, parameter in other.named_parameters()}
    with pytest.raises(RequestError, match=message):
        quantize(other, plan)
    assert all(torch.equal(parameter, before[name]) for name, parameter in other.named_parameters())


@pytest.mark.parametrize(("name", "update", "message"), [
    (DOWN, {"group_size": 48}, "group size 48 does not divide the 128"), (DOWN, {"group_size": 64}, "another size"),
    ("model.layers.0.mlp.up_proj", {"bits": 8, "bytes": 8736}, "fused by engines")])
def test_a_plan_that_was_edited_into_nonsense_is_refused(model: PreTrainedModel, name: str, update: dict[str, int],
                                                         message: str) -> None:
    plan = planned(model, ["weights.method=rtn", "weights.group_size=32"])
    plan.modules[name] = plan.modules[name].model_copy(update=update)
    with pytest.raises(RequestError, match=message):
        quantize(model, plan)


def test_weights_that_are_not_finite_are_refused(model: PreTrainedModel) -> None:
    plan = planned(model, ["weights.method=rtn", "weights.group_size=32"])
    model.get_parameter(f"{DOWN}.weight").data[3, 4] = float("nan")
    with pytest.raises(RequestError, match=f"{DOWN}.weight holds NaN or Inf"):
        quantize(model, plan)


def test_activations_that_overflow_are_an_error_and_not_a_fall_back(model: PreTrainedModel, small: list[str]) -> None:
    plan = planned(model, small)
    model.get_parameter(f"{DOWN}.weight").data.fill_(3e38)
    for leaf in ("up_proj", "gate_proj"):
        model.get_parameter(f"{DOWN}.weight".replace("down_proj", leaf)).data *= 1e3
    with pytest.raises(SinkquantError, match="not finite"):
        quantize(model, plan, tiny_tokenizer())


def test_float16_models_with_large_weights_stay_finite(small: list[str]) -> None:
    model = tiny_model("llama", dtype=torch.float16)
    model.get_parameter(f"{DOWN}.weight").data[0, :8] = torch.tensor([65504.0, -65504.0] * 4).half()
    quantize(model, planned(model, ["weights.method=rtn", "weights.group_size=32"]))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("more", [[], ["weights.tune=1"], ["weights.distill=1"]])
def test_the_model_holds_what_is_packed_whatever_was_computed_in(model: PreTrainedModel, small: list[str],
                                                                 more: list[str]) -> None:
    quantize(model, planned(model, [*small, *more]), tiny_tokenizer(), dtype="bfloat16")
    for name, packed in state_of(model).weights.items():
        assert torch.equal(model.get_parameter(f"{name}.weight"), packed.dequantized()), name


@pytest.mark.parametrize(("assignments", "asked"), [
    (["weights.rotate=full", "weights.method=rtn"], {"device": "gpu"}),
    (["weights.rotate=full"], {}), (["weights.lm_head=8", "weights.embeddings=8"], {}),
    (["weights.method=rtn", "weights.rotate=full", "kv_cache={rotate: covariance, exact: none}"], {})])
def test_what_is_refused_leaves_the_model_as_it_was(model: PreTrainedModel, small: list[str], assignments: list[str],
                                                    asked: dict[str, str]) -> None:
    """No tokenizer where rows are needed, or no such device: nothing is rotated or rounded before that is found."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RequestError, match=r"tokenizer|no device 'gpu'"):
        quantize(model, planned(model, [*small, *assignments]), **asked)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("assignments", [
    ["weights.rotate=full"], ["weights.lm_head=8", "weights.embeddings=8"],
    ["weights.method=rtn", "weights.rotate=full", "kv_cache={rotate: covariance, exact: none}"]])
def test_too_little_text_leaves_the_model_as_it_was(model: PreTrainedModel, small: list[str], assignments: list[str],
                                                    tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("w9 w10 w11")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = planned(model, [*small, *assignments])
    short = plan.model_copy(update={"calibration": plan.calibration.model_copy(update={
        "text": str(tmp_path / "t.txt")})})
    with pytest.raises(RequestError, match="shorter than one row"):
        quantize(model, short, tiny_tokenizer())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    quantize(model, plan, tiny_tokenizer())


def test_a_model_that_was_left_half_done_is_refused(model: PreTrainedModel) -> None:
    plan = planned(model, ["weights.method=rtn", "weights.group_size=32"])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, plan, progress=stop)
    with pytest.raises(RequestError, match="quantized already, if only in part"):
        quantize(model, plan)
    with pytest.raises(RequestError, match="was not quantized"):
        state_of(model)


def test_a_dtype_is_taken_by_name_or_as_it_is(model: PreTrainedModel, small: list[str]) -> None:
    plan, again = planned(model, small), tiny_model("llama")
    with pytest.raises(RequestError, match="'float31' is no dtype"):
        quantize(model, plan, tiny_tokenizer(), dtype="float31")
    quantize(model, plan, tiny_tokenizer(), dtype=torch.float64)
    quantize(again, plan, tiny_tokenizer(), dtype="float64")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_a_model_that_is_not_in_memory_is_refused(model: PreTrainedModel, small: list[str]) -> None:
    plan = planned(model, [*small, "weights.method=rtn"])
    with pytest.raises(RequestError, match="is not in memory"):
        quantize(model.to("meta"), plan)
