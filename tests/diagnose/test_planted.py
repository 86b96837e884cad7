"""Diagnostics of planted models, whose answers are known."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from planter import CONSTANT, Plant, plant
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.artifacts import SinkToken
from sinkquant.diagnose.bos import bos_variants, text_losses
from sinkquant.diagnose.dormant import dormant_heads, token_values
from sinkquant.diagnose.rates import context_lengths, first_position_mass, first_position_mass_by_length, sink_rates
from sinkquant.diagnose.rows import mark_sinks, random_rows, repeated_rows, swapped, with_bos
from sinkquant.diagnose.spread import changes, spread
from sinkquant.diagnose.survey import WalkSettings, survey
from sinkquant.models import Decoder

COMPUTE = WalkSettings()
ODD = 77
"""A token that switches the planted head on."""
BOS = SinkToken(token_id=1, text="<s>", position=None, kind="bos", attention=0.8, heads=0.5, share=0.02, massive=True)


@pytest.fixture(scope="module")
def planted() -> PreTrainedModel:
    """`<s>` is a sink of all heads after block 0."""
    return plant(tiny_model("llama"), Plant(1, None, frozenset({0, 1, 2, 3}), 20, 0))


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(8, 128, (12, 60), generator=torch.Generator().manual_seed(0))


def front(text: torch.Tensor) -> torch.Tensor:
    return with_bos(text, 1, [0])


def test_sink_rates_see_the_planted_heads_and_the_negative_control(planted: PreTrainedModel,
                                                                   text: torch.Tensor) -> None:
    decoder = Decoder.of(planted)
    natural = sink_rates(first_position_mass(decoder, front(text), COMPUTE), "natural", 61, 0)
    assert natural.layers == pytest.approx([0, 1, 1])
    assert natural.rates["0.3"].value == pytest.approx(2 / 3)
    assert natural.rates["0.3"].low <= natural.rates["0.3"].value <= natural.rates["0.3"].high
    scrambled = sink_rates(first_position_mass(decoder, random_rows(front(text), 0), COMPUTE), "random", 61, 0)
    assert scrambled.rates["0.3"].value == pytest.approx(2 / 3)
    repeated = sink_rates(first_position_mass(decoder, repeated_rows(front(text), 0), COMPUTE), "repeated", 61, 0)
    assert repeated.rates["0.3"].value == 0
    assert context_lengths(300) == [64, 128, 256, 300]
    assert context_lengths(64) == [64]


def test_first_position_mass_is_the_mean_of_the_attention_column(tiny: PreTrainedModel, text: torch.Tensor) -> None:
    rows = text[:2, :20]
    tiny.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            matrices = torch.stack(tiny(rows, output_attentions=True, use_cache=False).attentions).double()
    finally:
        tiny.set_attn_implementation("sdpa")
    found = first_position_mass(Decoder.of(tiny), rows, COMPUTE)
    torch.testing.assert_close(torch.stack(found), matrices[..., 0].mean(-1), rtol=1e-5, atol=1e-7)


def test_a_sink_keeps_a_change_from_spreading(planted: PreTrainedModel, text: torch.Tensor) -> None:
    decoder = Decoder.of(planted)
    for block in planted.model.layers[1:]:
        block.self_attn.o_proj.weight.data *= 100  # so that what attention carries can be seen
    try:
        with_sink = spread(decoder, front(text), 16, True, COMPUTE)
        without = spread(decoder, text, 15, False, COMPUTE)
    finally:
        for block in planted.model.layers[1:]:
            block.self_attn.o_proj.weight.data /= 100
    assert with_sink.strength.high < without.strength.low
    assert len(with_sink.changes) == 3
    assert len(with_sink.changes[0]) == len(with_sink.starts)


def test_changes_are_those_of_two_forward_passes(tiny: PreTrainedModel, text: torch.Tensor) -> None:
    found = changes(Decoder.of(tiny), text, 10, COMPUTE)
    other = swapped(text, 10, COMPUTE.seed)
    assert (text != other).sum(1).tolist() == [1] * len(text)
    with torch.no_grad():
        first, second = (tiny(table, use_cache=False, output_hidden_states=True).hidden_states
                         for table in (text, other))
    # The last hidden state of transformers is normed; the ones before are the blocks' outputs.
    for layer in range(2):
        expected = (second[layer + 1] - first[layer + 1]).double().norm(dim=-1) / first[layer + 1].double().norm(dim=-1)
        torch.testing.assert_close(found[layer], expected, rtol=1e-3, atol=1e-6)
    assert found[:, :, :10].max() < 1e-6  # causal
    assert found[:, :, 10].min() > 0.1


def test_bos_is_removed_moved_and_doubled(planted: PreTrainedModel, text: torch.Tensor) -> None:
    found = {variant.name: variant for variant in bos_variants(Decoder.of(planted), text, 1, COMPUTE)}
    assert found["once"].loss_increase.value == 0
    assert found["once"].sink_rate.value == pytest.approx(2 / 3)
    assert found["none"].sink_rate.value == 0
    assert found["none"].bos_attention is None
    assert found["moved"].sink_rate.value == 0
    assert found["once"].bos_attention > 0.5
    assert found["moved"].bos_attention > 0.5
    assert found["twice"].bos_attention == pytest.approx(found["once"].bos_attention / 2, rel=0.2)
    with torch.no_grad():
        logits = planted(front(text), use_cache=False).logits.double()
    loss = torch.nn.functional.cross_entropy(logits[:, 1:-1].transpose(1, 2), text[:, 1:])
    assert found["once"].loss.value == pytest.approx(float(loss), rel=1e-5)


def test_the_bos_of_every_layer_is_read_by_the_queries_that_see_it() -> None:
    """Behind a sliding window fewer do than in a full layer."""
    decoder = Decoder.of(tiny_model("gemma3_text"))
    text = torch.randint(8, 128, (2, 98), generator=torch.Generator().manual_seed(0))
    once = bos_variants(decoder, text, 1, COMPUTE)[0]
    mass = torch.cat(first_position_mass(decoder, front(text), COMPUTE), dim=1)
    assert once.bos_attention == pytest.approx(float(mass.mean()), rel=1e-5)
    assert once.sink_rate.value == pytest.approx(float((mass > 0.3).double().mean()))


@pytest.mark.parametrize("places", [[], [0], [3], [0, 0]])
def test_losses_of_the_text_only(places: list[int]) -> None:
    text = torch.arange(10, 16)[None]
    rows = with_bos(text, 1, places)
    # A loss that names its target: position t of `losses` belongs to the token t + 1.
    assert text_losses(rows[:, 1:].float(), places).tolist() == [[11, 12, 13, 14, 15]]


def test_a_head_that_is_off_but_for_one_token(text: torch.Tensor) -> None:
    model = plant(tiny_model("llama"), Plant(1, None, frozenset({2}), 20, 0))
    model.model.embed_tokens.weight.data[ODD, CONSTANT] = -0.5  # the planted query reads this channel
    for block in model.model.layers:
        block.self_attn.v_proj.weight.data[:, 20] = 0  # the sink's value holds next to nothing
    rows = front(text)
    generator = torch.Generator().manual_seed(1)
    for row in rows:
        row[torch.randint(8, 61, (2,), generator=generator)] = ODD
    found = survey(Decoder.of(model), rows, mark_sinks(rows, [BOS]), COMPUTE, ranks=False)
    heads = dormant_heads(found, tiny_tokenizer())
    assert sorted((head.layer, head.head) for head in heads) == [(1, 2), (2, 2)]
    for head in heads:
        assert head.value_drain < 0.3
        assert head.sink_score > 0.9
        (switch, *_) = head.switches
        assert (switch.relation, switch.text, switch.on_rate) == ("is", f"w{ODD}", 1.0)
        assert switch.count >= 20
        assert switch.value_norm > 3 * head.sink_value_norm
    values = token_values(found, tiny_tokenizer())
    assert [value.norm for value in values] == sorted(value.norm for value in values)
    assert [value.token_id for value in values if value.sink] == [1]
    found.sinks = torch.zeros_like(found.sinks)
    found.sinks[:, 5] = True  # a place, where another token stands in every row
    (place,) = [value for value in token_values(found, tiny_tokenizer()) if value.sink]
    assert (place.token_id, place.count) == (None, len(rows))


def test_a_head_that_follows_one_token(text: torch.Tensor) -> None:
    """The query after one token is off: the class is found from the pattern, which is written in by hand."""
    model = plant(tiny_model("llama"), Plant(1, None, frozenset({0, 1, 2, 3}), 20, 0))
    rows = front(text)
    found = survey(Decoder.of(model), rows, mark_sinks(rows, [BOS]), COMPUTE, ranks=False)
    rows[rows == ODD] = ODD + 1
    rows[:, 30] = ODD
    found.rows = rows
    for mass in found.table.sink_mass[1:]:
        mass[:, 1, 31] = 0.1
        mass[:, 1, 30] = 0.99
    (switch,) = next(h for h in dormant_heads(found, tiny_tokenizer()) if (h.layer, h.head) == (1, 1)).switches
    assert (switch.relation, switch.text, switch.count, switch.on_rate) == ("after", f"w{ODD}", len(rows), 1.0)


def test_first_position_mass_of_every_length_comes_from_one_walk(tiny: PreTrainedModel, text: torch.Tensor) -> None:
    decoder, rows = Decoder.of(tiny), front(text)
    lengths = [5, 24, rows.shape[1]]
    for length, found in zip(lengths, first_position_mass_by_length(decoder, rows, lengths, COMPUTE), strict=True):
        for layer, alone in zip(found, first_position_mass(decoder, rows[:, :length], COMPUTE), strict=True):
            torch.testing.assert_close(layer, alone, rtol=1e-4, atol=1e-6)
