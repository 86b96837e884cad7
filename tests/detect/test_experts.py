"""What detection shows of experts, token by token against the fused weights themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import tiny_mixture, tiny_model

from sinkquant.detect.experts import ExpertRecorder
from sinkquant.models import Decoder, Walk

EXPERTS = "model.layers.1.mlp.experts"


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
