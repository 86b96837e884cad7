"""Experts: what each of them reads, against a float64 reference; counts; the rule for experts that saw few tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import tiny_mixture
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import PreTrainedModel

from sinkquant.artifacts import Calibration, Plan
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, Walk, read_text, token_rows
from sinkquant.policy import make_plan
from sinkquant.quantize import GPTQ, experts, quantize, state_of
from sinkquant.quantize.experts import record
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.recipe import Recipe

EXPERTS = "model.layers.1.mlp.experts"


def calibration(**settings: object) -> Calibration:
    return Calibration.model_validate({
        "text": None, "rows": 6, "length": 24, "bos": "auto", "batch_size": 4, "sinks": [], "damping": 0.01,
        "act_order": True} | settings)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(3))


def reference(model: PreTrainedModel, rows: torch.Tensor, weights: torch.Tensor,
              everyone: bool = False) -> tuple[list[int], list[dict[str, torch.Tensor]]]:
    """Token counts and Hessians of the second block's experts, token by token in float64."""
    mlp = model.get_submodule("model.layers.1.mlp")
    seen: list[torch.Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(rows, use_cache=False)
    handle.remove()
    hidden = seen[0].flatten(0, 1)
    logits = F.linear(hidden, mlp.gate.weight)
    fused = {name: parameter.detach().double() for name, parameter in mlp.experts.named_parameters()}
    counts, sums = [0] * 16, [{"up": torch.zeros(64, 64, dtype=torch.float64),
                               "down": torch.zeros(32, 32, dtype=torch.float64)} for _ in range(16)]
    totals = [0.0] * 16
    for token, chosen, weight in zip(hidden.double(), logits.topk(2, dim=-1).indices.tolist(),
                                     weights.flatten().tolist(), strict=True):
        for expert in range(16) if everyone else chosen:
            gate, up = (fused["gate_up_proj"][expert] @ token).chunk(2)
            inner = gate / (1 + torch.exp(-gate)) * up
            for name, read in (("up", token), ("down", inner)):
                sums[expert][name] += weight * torch.outer(read, read)
            totals[expert] += weight
        for expert in chosen:
            counts[expert] += 1
    return counts, [{name: one / max(total, 1e-30) for name, one in each.items()}
                    for each, total in zip(sums, totals, strict=True)]


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize(("family", "implementation"), [
    ("qwen3_moe", "eager"), ("qwen3_moe", "grouped_mm"), ("qwen3_moe", "batched_mm"), ("mixtral", "grouped_mm")])
def test_counts_and_hessians_are_those_of_the_routed_tokens(family: str, implementation: str, everyone: bool,
                                                            rows: torch.Tensor) -> None:
    model = tiny_mixture(family)
    model.config._experts_implementation = implementation
    weights = TokenWeights(rows, calibration(statistics="boost", sinks=[
        {"token_id": None, "position": 0, "weight": 7.0}]))
    module = model.get_submodule(EXPERTS)
    for step in Walk(Decoder.of(model), rows, 4).steps():
        if step.index == 1:
            routed = record(step, {EXPERTS: module})[EXPERTS]
            found = [routed.hessians(i, weights, everyone, "cpu", torch.float32) for i in range(16)]
    counts, expected = reference(model, rows, weights.weights, everyone)
    assert routed.counts() == counts
    assert sum(counts) == 2 * rows.numel()
    for one, other in zip(found, expected, strict=True):
        for name in ("up", "down"):
            torch.testing.assert_close(one[name].mean(), other[name], rtol=2e-4, atol=1e-7)


def test_capped_sinks_are_capped_by_what_the_projection_reads(rows: torch.Tensor,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "TOKENS", 50)  # the mean is that of all tokens all the same
    model = tiny_mixture("qwen3_moe")
    weights = TokenWeights(rows, calibration(statistics="cap", sinks=[{"token_id": None, "position": 0}]))
    for step in Walk(Decoder.of(model), rows, 4).steps():
        if step.index == 1:
            routed = record(step, {EXPERTS: model.get_submodule(EXPERTS)})[EXPERTS]
    routed.hidden[::24] *= 100
    energy = routed.hidden.square().sum(1)
    sinks = torch.zeros(len(energy), dtype=torch.bool)
    sinks[::24] = True
    weight = torch.where(sinks, (energy.mean() / energy).clamp(max=1), torch.ones(1)).double()
    hidden = routed.hidden.double()
    expected = (hidden * weight[:, None]).T @ hidden / weight.sum()
    found = routed.hessians(0, weights, True, torch.device("cpu"), torch.float32)["up"].mean()
    assert (found - expected).norm() < 1e-5 * expected.norm()


def planned(model: PreTrainedModel, text: Path, *more: str) -> Plan:
    decoder = Decoder.of(model)
    recipe = Recipe().replace(["weights.group_size=32", "weights.descent=0", "weights.scale_search=false",
                               "calibration.rows=6", "calibration.length=24", f"calibration.text={text}", *more])
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder), recipe)


@pytest.mark.parametrize("least", [0, 10_000])
def test_an_expert_is_quantized_with_its_own_hessian_or_with_that_of_the_layer(least: int, text_file: Path) -> None:
    model = tiny_mixture("qwen3_moe", num_hidden_layers=1, layer_types=["full_attention"])
    plan = planned(model, text_file, f"calibration.min_expert_tokens={least}", "weights.ignore=['*self_attn*']",
                   "protect.tokens=false")
    original = {name: Decoder.of(model).weight(name).clone() for name in Decoder.of(model).experts}
    unharmed = tiny_mixture("qwen3_moe", num_hidden_layers=1, layer_types=["full_attention"])
    quantize(model, plan, tiny_tokenizer())
    state = state_of(model)
    assert list(state.tokens) == ["model.layers.0.mlp.experts"]
    counts = state.tokens["model.layers.0.mlp.experts"]
    assert sum(counts) == 2 * 6 * 24
    rows = token_rows(tiny_tokenizer(), read_text(str(text_file), "calibration"), 6, 24, "auto", 128)
    for step in Walk(Decoder.of(unharmed), rows, 8).steps():
        routed = record(step, {"x": unharmed.get_submodule("model.layers.0.mlp.experts")})["x"]
    assert routed.counts() == counts
    weights = TokenWeights(rows, plan.calibration)
    part = Decoder.of(model).experts
    busiest = max(range(16), key=lambda i: counts[i])
    for name in (f"model.layers.0.mlp.experts.{busiest}.{leaf}_proj" for leaf in ("gate", "up", "down")):
        hessian = routed.hessians(busiest, weights, least > 0, "cpu", torch.float32)[part[name].role].mean()
        method = GPTQ(4, 32, passes=0, scale_search=False, scale_dtype=torch.float32)
        expected = method.quantize(original[name], hessian)
        assert torch.equal(state.weights[name].codes, expected.codes)
        torch.testing.assert_close(Decoder.of(model).weight(name), expected.dequantized())


def test_routers_norms_and_what_is_ignored_stay_as_they_are(text_file: Path) -> None:
    model, before = tiny_mixture("qwen2_moe"), tiny_mixture("qwen2_moe").state_dict()
    plan = planned(model, text_file, "weights.method=rtn", "weights.ignore=['*layers.0.*experts*']")
    quantize(model, plan, tiny_tokenizer())
    for name, tensor in model.state_dict().items():
        packed = "proj" in name and "bias" not in name and "layers.0.mlp.experts" not in name
        assert torch.equal(tensor, before[name]) != packed, name


def test_gptaq_compares_with_what_the_unquantized_model_would_feed_the_expert(rows: torch.Tensor) -> None:
    handed: list[torch.Tensor] = []
    model = tiny_mixture("qwen3_moe")
    weights = TokenWeights(rows, calibration())
    for step in Walk(Decoder.of(model), rows, 4).steps():
        if step.index == 1:
            ideal = step.walk.hidden + 0.05 * torch.randn(step.walk.hidden.shape, generator=torch.manual_seed(0))
            module = model.get_submodule(EXPERTS)
            routed = record(step, {EXPERTS: module}, ideal)[EXPERTS]
            norm: nn.Module = model.get_submodule("model.layers.1")
            assert routed.ideal is not None
            handle = module.register_forward_pre_hook(lambda _, args: handed.append(args[0]))
            norm(ideal, **step.walk.arguments[1])
            handle.remove()
    torch.testing.assert_close(routed.ideal, handed[0], rtol=1e-5, atol=1e-6)
    tokens = torch.where((routed.chosen == 5).any(1))[0]
    cross = routed.hessians(5, weights, False, "cpu", torch.float32)["up"].cross()
    drift = (routed.ideal - routed.hidden)[tokens].double()
    torch.testing.assert_close(cross, drift.T @ routed.hidden[tokens].double() / len(tokens), rtol=1e-3, atol=1e-6)


def test_tuning_does_not_reach_packed_experts(text_file: Path) -> None:
    with pytest.raises(RequestError, match=r"weights\.tune does not reach packed experts"):
        planned(tiny_mixture("qwen3_moe"), text_file, "weights.tune=2")
    plan = planned(tiny_mixture("qwen3_moe"), text_file, "weights.tune=2", "weights.ignore=['*.experts.*']")
    assert plan.calibration.tune == 2
