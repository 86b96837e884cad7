"""What detection shows of experts, token by token against the fused weights themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import tiny_mixture, tiny_model
from sinkmaps import sink_map_of

from sinkquant import Recipe
from sinkquant.artifacts.sinkmap import ExpertStatistics, SuperExpert
from sinkquant.detect.experts import ExpertRecorder, super_experts
from sinkquant.models import Decoder, Walk
from sinkquant.policy import make_plan

EXPERTS = "model.layers.1.mlp.experts"


def seen_outputs(states: torch.Tensor, experts: torch.nn.Module, index: int) -> torch.Tensor:
    gate, other = (states @ experts.gate_up_proj[index].detach().T).chunk(2, dim=1)
    return (F.silu(gate) * other) @ experts.down_proj[index].detach().T


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_counts_and_largest_inputs_are_those_of_the_routed_tokens(family: str) -> None:
    model = tiny_mixture(family)
    rows = torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(3))
    sinks = torch.zeros_like(rows, dtype=torch.bool)
    sinks[:, 0] = True
    decoder = Decoder.of(model)
    recorder = ExpertRecorder(decoder)
    for step in Walk(decoder, rows, 4).steps():
        with recorder.watching(step):
            step.run()
    found = recorder.summary(sinks)
    assert list(found) == ["model.layers.0.mlp.experts", EXPERTS]
    seen: list[torch.Tensor] = []
    mlp = model.get_submodule("model.layers.1.mlp")
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(rows, use_cache=False)
    handle.remove()
    chosen = F.linear(seen[0], mlp.gate.weight).topk(2, dim=-1).indices
    experts = found[EXPERTS]
    for index in range(16):
        mine = (chosen == index).any(1)
        assert experts.tokens[index] == int(mine.sum())
        assert experts.sink_tokens[index] == int((mine & sinks.flatten()).sum())
        for wanted, up, down in ((mine, experts.input_max, experts.down_input_max),
                                 (mine & ~sinks.flatten(), experts.input_max_without_sinks,
                                  experts.down_input_max_without_sinks)):
            states = seen[0][wanted]
            gate, other = (states @ mlp.experts.gate_up_proj[index].detach().T).chunk(2, dim=1)
            read = F.silu(gate) * other
            assert up[index] == pytest.approx(float(states.abs().max()) if wanted.any() else 0.0, rel=1e-5)
            assert down[index] == pytest.approx(float(read.abs().max()) if wanted.any() else 0.0, rel=1e-4)
        given = seen_outputs(seen[0][mine], mlp.experts, index)
        assert experts.output_max[index] == pytest.approx(float(given.abs().max()) if mine.any() else 0.0, rel=1e-4)


def test_experts_that_cannot_be_told_apart_are_counted() -> None:
    model = tiny_model("gpt_oss")
    rows = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(3))
    recorder = ExpertRecorder(Decoder.of(model))
    for step in Walk(recorder.decoder, rows, 2).steps():
        with recorder.watching(step):
            step.run()
    for layer in recorder.summary(torch.zeros_like(rows, dtype=torch.bool)).values():
        assert sum(layer.tokens) == 2 * rows.numel()
        assert layer.sink_tokens == [0] * 4
        assert max(layer.input_max) > 0
        assert layer.down_input_max == []
    assert len(recorder.layers) == 3


def layer(outputs: list[float]) -> ExpertStatistics:
    nothing = [0.0] * len(outputs)
    return ExpertStatistics(tokens=[9] * len(outputs), sink_tokens=[0] * len(outputs), input_max=nothing,
                            input_max_without_sinks=nothing, down_input_max=nothing,
                            down_input_max_without_sinks=nothing, output_max=outputs)


def test_a_super_expert_is_far_over_all_others_where_massive_activations_are_born() -> None:
    ordinary = [1.0 + index / 500 for index in range(299)]
    experts = {f"model.layers.{index}.mlp.experts": layer([*ordinary, last])
               for index, last in enumerate((900.0, 70.0))}

    def found(born: set[int]) -> list[tuple[str, int]]:
        return [(one.experts, one.expert) for one in super_experts(experts, lambda name: int(name.split(".")[2]), born)]

    assert found({0}) == [("model.layers.0.mlp.experts", 299)]
    assert found({1}) == []  # less than a tenth of the largest
    assert found(set()) == []
    (one,) = super_experts(experts, lambda name: int(name.split(".")[2]), {0})
    assert (one.output, one.null) == (900.0, 70.0)


def test_pruning_spares_super_experts_unless_told() -> None:
    decoder = Decoder.of(tiny_mixture("qwen3_moe"))
    shape = decoder.shape("tiny")
    sink_map = sink_map_of(decoder).model_copy(update={"super_experts": [
        SuperExpert(experts=EXPERTS, expert=3, output=900.0, null=2.0)]})
    recipe = Recipe().replace(["prune.method=magnitude", "weights.ignore=['*']"])
    mine = [f"{EXPERTS}.3.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
    for massive in (False, True):
        plan = make_plan(shape, sink_map, recipe.changed(prune={"massive": massive}))
        assert [plan.modules[name].prune is not None for name in mine] == [massive] * 3
        assert plan.modules[f"{EXPERTS}.4.down_proj"].prune is not None
        assert any(f"expert 3 of {EXPERTS} make the massive activations" in note for note in plan.notes) != massive
