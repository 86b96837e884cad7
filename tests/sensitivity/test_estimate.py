"""The cheap estimate: against autograd over the whole model, and against forward passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_mixture, tiny_model
from sinkmaps import BOS, STOP, sink_map_of
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import PreTrainedModel

from sinkquant import Recipe, find_sensitivity
from sinkquant.artifacts import Calibration, Sensitivity, UnitSensitivity
from sinkquant.models import Decoder, Walk, token_rows
from sinkquant.models.backward import steps_back
from sinkquant.quantize.statistics import TokenWeights
from sinkquant.schemes.codecs.grid import to_integers
from sinkquant.sensitivity import sink_places

SMALL = ["weights.group_size=32", "weights.method=rtn", "weights.scale_search=false", "sensitivity.rows=6",
         "sensitivity.length=24", "sensitivity.batch_size=6"]
DOWN = "model.layers.1.mlp.down_proj"


def small(text: Path, *assignments: str) -> Recipe:
    return Recipe().replace([f"calibration.text={text}", *SMALL, *assignments])


def sharp(model: PreTrainedModel) -> PreTrainedModel:
    """A random model predicts next to nothing; one with larger logits has a loss to lose."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return sharp(tiny_model("llama", num_hidden_layers=2))


@pytest.fixture(scope="module")
def measured(model: PreTrainedModel, text: Path) -> Sensitivity:
    recipe = small(text, "sensitivity.rows=32", "sensitivity.measure_rows=6", "sensitivity.measure_length=16",
                   "sensitivity.bits=[2,4]")
    return find_sensitivity(model, tiny_tokenizer(), sink_map_of(Decoder.of(model), tokens=(BOS, STOP)), recipe)


def test_terms_are_those_of_the_whole_models_gradient(model: PreTrainedModel, text: Path) -> None:
    decoder = Decoder.of(model)
    sink_map = sink_map_of(decoder, tokens=(BOS, STOP))
    found = find_sensitivity(model, tiny_tokenizer(), sink_map, small(text, "sensitivity.bits=[3]"))
    rows = token_rows(tiny_tokenizer(), text.read_text(), 6, 24)
    error = to_integers(3, 32, scale_search=False).quantize(decoder.weight(DOWN)).dequantized() - decoder.weight(DOWN)
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.retain_grad()
        seen.extend((args[0], output))

    handle = decoder.linears[DOWN].register_forward_hook(keep)
    logits = model(rows, use_cache=False).logits.float().flatten(0, 1)
    handle.remove()
    labels = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert seen[1].grad is not None
    pulled = seen[1].grad.double() * (seen[0].detach().double() @ error.double().T)
    score, sinks = pulled.sum(-1), sink_places(rows, sink_map)
    assert 1 < float(sinks.sum(1).double().mean()) == found.sink_positions
    (loss,) = next(unit for unit in found.units if unit.modules == [DOWN]).losses
    through = (score * sinks).sum(1).square().sum() / 2 / rows.numel()
    others = (score * ~sinks).square().sum() / 2 / rows.numel()
    assert loss.predicted.sinks == pytest.approx(float(through), rel=1e-3)
    assert loss.predicted.others == pytest.approx(loss.shared * float(others), rel=1e-3)
    assert len({loss.shared for unit in found.units for loss in unit.losses}) == 1
    assert loss.shared != 1
    assert loss.diagonal == pytest.approx(float(pulled.square().sum()) / 2 / rows.numel(), rel=1e-3)


def test_fewer_bits_cost_more_and_predicted_terms_add_up(measured: Sensitivity) -> None:
    assert [unit.modules[0].rpartition(".")[2] for unit in measured.units[:4]] == [
        "q_proj", "o_proj", "gate_proj", "down_proj"]
    for unit in measured.units:
        assert unit.placed
        for loss in unit.losses:
            assert loss.predicted.total == pytest.approx(loss.predicted.sinks + loss.predicted.others)
            assert loss.measured is not None
            assert loss.terms == loss.measured
            assert min(loss.measured.sinks, loss.measured.others, loss.measured.total) > 0
        assert unit.losses[0].predicted.total > unit.losses[1].predicted.total
        assert unit.losses[0].terms.total > unit.losses[1].terms.total


def test_predicted_losses_rank_like_measured_ones_and_have_their_size(measured: Sensitivity) -> None:
    ranking = measured.ranking
    assert ranking is not None
    assert ranking.pairs == 16
    for term in (ranking.total, ranking.sinks, ranking.others):
        assert term is not None
        assert term > 0.9
    assert ranking.ratio is not None
    assert 0.5 < ranking.ratio < 2


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_weights_that_are_stored_otherwise_are_measured_like_any_other(family: str, text: Path) -> None:
    """Experts and Conv1D: what was predicted ranks like what was measured, and the weights are left as they were."""
    model = sharp(tiny_model(family, n_layer=1) if family == "gpt2" else tiny_mixture(
        family, num_hidden_layers=1, num_experts=4, intermediate_size=64, moe_intermediate_size=32))
    decoder = Decoder.of(model)
    before = {name: decoder.weight(name).clone() for name in decoder.shape("").linears if name in decoder.experts or
              name in decoder.linears}
    recipe = small(text, "sensitivity.bits=[2,4]", "sensitivity.rows=32", "sensitivity.measure_rows=6",
                   "sensitivity.measure_length=16")
    found = find_sensitivity(model, tiny_tokenizer(), sink_map_of(decoder), recipe)
    assert all(torch.equal(weight, decoder.weight(name)) for name, weight in before.items())
    assert found.ranking is not None
    assert found.ranking.total is not None
    assert found.ranking.total > 0.8
    for unit in found.units:
        for loss in unit.losses:
            assert loss.measured is not None
            assert 0.3 < loss.predicted.total / loss.measured.total < 3, unit.modules[0]


def test_gptq_candidates_lose_less_than_rounding_and_both_may_be_tried_at_once(text: Path) -> None:
    model = sharp(tiny_model("llama", num_hidden_layers=1))

    def units(*assignments: str) -> list[UnitSensitivity]:
        return find_sensitivity(model, tiny_tokenizer(), sink_map_of(Decoder.of(model)),
                                small(text, "sensitivity.bits=[3]", "sensitivity.rows=32", *assignments)).units

    gptq, rtn = units("weights.method=gptq"), units("weights.method=rtn")
    totals = [sum(unit.losses[0].predicted.total for unit in found) for found in (gptq, rtn)]
    assert totals[0] < totals[1]
    both = units("weights.method=gptq", "sensitivity.methods=[rtn, gptq]")
    # Rounding is compared on the rows that GPTQ does not see.
    assert [unit.losses[1] for unit in both] == [one.losses[0] for one in gptq]
    assert sum(unit.losses[0].predicted.total for unit in both) > totals[0]
    for unit in both:
        best = unit.loss(unit.losses[0].form)
        assert best is min(unit.losses, key=lambda loss: loss.predicted.total)
        assert [unit.loss(loss.form, loss.method) for loss in unit.losses] == unit.losses


def test_a_replay_in_the_walk_back_is_seen_by_the_statistics_that_weigh_by_attention(tiny) -> None:
    rows = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(text=None, rows=2, length=12, bos="auto", batch_size=2, sinks=[], damping=0.01,
                              act_order=True, statistics="attention")
    forward, back = (TokenWeights(rows, calibration) for _ in range(2))
    seen = {}
    for step in Walk(Decoder.of(tiny), rows, 2).steps():
        forward.enter(step)
        seen[step.index] = forward.weights
        step.run()
    for one in steps_back(Walk(Decoder.of(tiny), rows, 2)):
        back.enter(one.step)
        torch.testing.assert_close(back.weights, seen[one.step.index])
    assert back.weights.max() == 1 > back.weights.min()
