"""Sink fidelity: a destroyed sink is flagged, an 8-bit model is not; checks against plain references."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model
from planter import Plant, plant
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkquant.artifacts import SinkFidelity, SinkToken
from sinkquant.artifacts.report import Fidelity, Row
from sinkquant.diagnose import sink_fidelity
from sinkquant.diagnose.fidelity import SinkComparison, position_divergence
from sinkquant.diagnose.fidelity_checks import bernoulli_divergence, massive_entries, overlap_and_ratio
from sinkquant.diagnose.survey import WalkSettings, survey
from sinkquant.errors import RequestError
from sinkquant.evaluate.states import last_states
from sinkquant.evaluate.verdict import gate_failures
from sinkquant.models import Decoder
from sinkquant.recipe import Gate

SINK = SinkToken(token_id=1, text="<s>", position=0, kind="bos", attention=0.6, heads=0.6, share=0.01, massive=True)


@pytest.fixture(scope="module")
def original() -> PreTrainedModel:
    return plant(tiny_model("llama", max_position_embeddings=64), Plant(1, None, frozenset({0, 1, 2, 3}), 20, 0))


def rounded(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """Round to nearest, symmetric, one scale per output channel, of every linear of the blocks."""
    other = copy.deepcopy(model)
    for linear in Decoder.of(other).linears.values():
        scale = linear.weight.data.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        linear.weight.data = (linear.weight.data / scale.clamp(min=1e-12)).round() * scale
    return other


@pytest.fixture(scope="module")
def pairs(original: PreTrainedModel, text_file: Path) -> dict[str, SinkFidelity]:
    """The planted model against itself, and against itself with the sink destroyed."""
    broken = copy.deepcopy(original)
    broken.model.layers[0].mlp.down_proj.weight.data[20] = 0
    return {name: sink_fidelity(original, model, tiny_tokenizer(), [SINK], text=str(text_file))
            for name, model in (("kept", original), ("broken", broken))}


def test_eight_bits_keep_the_sinks(original: PreTrainedModel, text_file: Path) -> None:
    found = sink_fidelity(original, rounded(original, 8), tiny_tokenizer(), [SINK], text=str(text_file))
    assert found.verdict == "kept", found.sentence
    assert [check.name for check in found.checks if check.kept is not True] == ["kl_elsewhere"]
    assert found.check("massive_overlap").value == 1
    assert found.check("head_divergence").value < 1e-3
    assert [min(layer) > 0.3 for layer in found.mass] == [False, True, True]


def test_the_model_itself_is_at_every_ideal(pairs: dict[str, SinkFidelity]) -> None:
    found = pairs["kept"]
    assert found.verdict == "kept"
    for check in found.checks:
        assert check.value == pytest.approx(check.ideal, abs=1e-9), check.name
        assert check.null >= 0


def test_a_destroyed_sink_is_flagged(pairs: dict[str, SinkFidelity]) -> None:
    """What very coarse rounding does: the one weight that writes the massive activation becomes 0."""
    found = pairs["broken"]
    assert found.verdict == "destroyed"
    assert "give them" in found.sentence
    assert {"sink_rate", "head_divergence", "massive_overlap", "massive_ratio", "no_op_heads", "kl_sinks"} & {
        check.name for check in found.checks if check.kept is False} >= {
        "sink_rate", "head_divergence", "massive_overlap", "massive_ratio", "no_op_heads"}
    assert found.check("massive_overlap").value == 0
    assert found.check("sink_rate").value == pytest.approx(-2 / 3)


def test_a_head_that_lost_its_sink_changes_the_verdict(original: PreTrainedModel, text_file: Path) -> None:
    other = copy.deepcopy(original)
    other.model.layers[2].self_attn.q_proj.weight.data[:16] = 0
    found = sink_fidelity(original, other, tiny_tokenizer(), [SINK], text=str(text_file))
    assert found.verdict == "changed"
    assert found.heads[2][0] > 0.5
    assert max(found.heads[2][1:]) < 0.05


def test_a_model_without_sinks_has_nothing_to_keep(text_file: Path, tiny: PreTrainedModel) -> None:
    found = sink_fidelity(tiny, tiny, tiny_tokenizer(), [], text=str(text_file))
    assert found.verdict == "no sinks"
    assert found.check("massive_overlap").value is None
    assert found.check("massive_overlap").kept is None


def test_models_of_other_shapes_are_refused(original: PreTrainedModel, text_file: Path) -> None:
    with pytest.raises(RequestError, match="differ in width, depth, heads or vocabulary"):
        sink_fidelity(original, tiny_model("llama", num_hidden_layers=2), tiny_tokenizer(), [SINK])
    with pytest.raises(RequestError, match="differ in width, depth, heads or vocabulary"):
        sink_fidelity(original, tiny_model("llama", num_attention_heads=2, num_key_value_heads=1), tiny_tokenizer(),
                      [SINK])


def test_position_divergence_against_float64(original: PreTrainedModel) -> None:
    rows = torch.randint(8, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    other = rounded(original, 3)
    with torch.no_grad():
        p, q = (torch.log_softmax(model(rows, use_cache=False).logits.double(), -1) for model in (original, other))
    found = position_divergence(original, last_states(original, rows), other, last_states(other, rows))
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-6)


def test_the_original_is_looked_at_once(original: PreTrainedModel, text_file: Path) -> None:
    """What it shows is kept for the next model, and no figure depends on the models before."""
    comparison = SinkComparison(original, tiny_tokenizer(), [SINK], text=str(text_file))
    coarse, fine = rounded(original, 3), rounded(original, 8)
    passes: list[int] = []
    handle = original.model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))
    comparison.compare(coarse)
    first = len(passes)
    found = comparison.compare(fine)
    handle.remove()
    assert first > 0
    assert len(passes) == first
    assert found == sink_fidelity(original, fine, tiny_tokenizer(), [SINK], text=str(text_file))


def test_bernoulli_divergence() -> None:
    found = bernoulli_divergence(torch.tensor([0.5, 0.9, 0.2]), torch.tensor([0.5, 0.5, 1.0]))
    assert found[0] == 0
    assert float(found[1]) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)
    assert torch.isfinite(found).all()


def test_overlap_counts_the_lost_and_the_new() -> None:
    before = {(0, 1, True): 100.0, (1, 1, True): 400.0, (2, 7, False): 9.0}
    assert overlap_and_ratio(before, before, 50) == (1.0, 1.0)
    assert overlap_and_ratio({(2, 7, False): 9.0}, before, 50) is None
    after = {(0, 1, True): 60.0, (1, 1, True): 100.0, (2, 7, False): 90.0}
    assert overlap_and_ratio(before, after, 50) == (pytest.approx(1 / 3), pytest.approx((0.6 + 0.25) / 2))


def test_massive_entries_are_the_planted_channel(original: PreTrainedModel) -> None:
    rows = torch.randint(8, 128, (3, 40), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 1
    marked = rows == 1
    found = survey(Decoder.of(original), rows, marked, WalkSettings(), ranks=False)
    big = {key for key, value in massive_entries(found).items() if value > 50}
    assert {(channel, on_sink) for _, channel, on_sink in big} == {(20, True)}
    assert massive_entries(found, torch.tensor([1])).keys() <= massive_entries(found).keys()


@pytest.mark.parametrize(("gate", "words"), [
    (Gate(sinks="kept"), "asks for 'kept'"), (Gate(sinks="changed"), "the sinks are destroyed"),
    (Gate(max_head_divergence=0.01), "gate.max_head_divergence"),
    (Gate(min_massive_overlap=0.5), "gate.min_massive_overlap")])
def test_the_gate_reads_the_comparison(pairs: dict[str, SinkFidelity], gate: Gate, words: str) -> None:
    rows = [Row(name="sink_aware", path="out", weight_bytes=1, bits_per_weight=4.0, tasks={})]

    def failures(name: str) -> list[str]:
        return gate_failures(rows, {}, Fidelity(sink_rate={}, massive_peak={}, massive_ratio={},
                                               comparisons={"sink_aware": pairs[name]}), gate)

    assert failures("kept") == []
    (failure,) = failures("broken")
    assert words in failure
    (missing,) = gate_failures(rows, {}, None, gate)
    assert "was not measured" in missing


def hybrid(*kinds: str) -> PreTrainedModel:
    config = AutoConfig.for_model("lfm2", **FAMILIES["qwen3"] | {"num_hidden_layers": len(kinds),
                                                                 "layer_types": list(kinds)})
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_hybrid_is_compared_where_it_attends(text_file: Path) -> None:
    """Blocks without attention have no place among the attentions, so that those that stay are counted apart."""
    model, shorter = hybrid("conv", "full_attention", "conv", "full_attention"), hybrid("conv", "full_attention",
                                                                                       "full_attention")
    whole = model.state_dict()
    for name in shorter.state_dict():
        source = name.replace("layers.2.", "layers.3.")
        shorter.get_parameter(name).data.copy_(whole[source])
    comparison = SinkComparison(model, tiny_tokenizer(), [SINK], text=str(text_file), rows=2)
    found = comparison.compare(shorter, kept=[0, 1, 3])
    assert found.check("head_divergence").value is not None
