"""A super weight that a model lives on is found and confirmed; a spike that costs nothing is not reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detect_helpers import small_recipe
from families import tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.detect import detect
from sinkquant.detect.super_weights import SpikeWatcher, Trial, _zeroed, down_projection
from sinkquant.models import Decoder, Walk
from sinkquant.models.inputs import input_args, let_through, round_inputs

CONSTANT, CANCELLED, DECOY, NEURON = 5, 20, 30, 3
LEVEL = 40.0


def model_with_a_super_weight(seed: int) -> PreTrainedModel:
    """A model that continues the cycle w8, w9, ..., w127, w8, ... and lives on one scalar.

    Every embedding holds -40 in one channel; in layer 1 a neuron that fires for every token adds 40 through the weight
    [CANCELLED, NEURON]. Without it the final norm squashes all other channels. In layer 0 the same neuron writes a
    spike, far over the median of that layer's writes, into a channel that no one reads: the decoy.
    """
    model = tiny_model("llama", seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.randn(128, 64, generator=generator)
        embedding[:, [CONSTANT, CANCELLED, DECOY]] = torch.tensor([1.0, -LEVEL, 0.0])
        model.model.embed_tokens.weight.copy_(embedding)
        words = torch.arange(8, 128)
        model.lm_head.weight.zero_()
        model.lm_head.weight[8 + (words - 7) % 120] = 0.5 * embedding[words]
        model.lm_head.weight[:, [CONSTANT, CANCELLED, DECOY]] = 0
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(0.01)
            block.mlp.down_proj.weight.mul_(0.01)
        for index, channel, level in ((0, DECOY, 1.0), (1, CANCELLED, LEVEL)):
            mlp = model.model.layers[index].mlp
            for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
                matrix[NEURON] = 0
                matrix[NEURON, CONSTANT] = 50
            fired: list[torch.Tensor] = []
            handle = mlp.down_proj.register_forward_pre_hook(lambda _, args, to=fired: to.append(args[0]))
            model(words[None], use_cache=False)
            handle.remove()
            mlp.down_proj.weight[:, NEURON] = 0
            mlp.down_proj.weight[channel, NEURON] = level / float(fired[0][..., NEURON].mean())
    return model


@pytest.mark.parametrize("seed", [0, 1])
def test_the_planted_one_and_no_decoy(tmp_path: Path, seed: int) -> None:
    model = model_with_a_super_weight(seed)
    path = tmp_path / "cycle.txt"
    path.write_text(" ".join(f"w{8 + i % 120}" for i in range(3000)), encoding="utf-8")
    value = float(model.model.layers[1].mlp.down_proj.weight[CANCELLED, NEURON].detach())
    found = detect(model, tiny_tokenizer(), str(path), small_recipe())
    assert [(s.module, s.row, s.column) for s in found.super_weights] == [
        ("model.layers.1.mlp.down_proj", CANCELLED, NEURON)]
    super_weight = found.super_weights[0]
    assert super_weight.value == pytest.approx(value)
    rows = torch.tensor([[1, *(8 + (start + i) % 120 for i in range(63))] for start in range(0, 63 * 12, 63)])
    with torch.no_grad():
        before = model(rows, labels=rows, use_cache=False).loss
        model.model.layers[1].mlp.down_proj.weight[CANCELLED, NEURON] = 0
        after = model(rows, labels=rows, use_cache=False).loss
    assert super_weight.loss_increase == pytest.approx(float(after - before), rel=0.05)
    assert super_weight.loss_increase > 0.3
    assert found.tokens == []
    assert detect(model, tiny_tokenizer(), str(path), small_recipe()).super_weights == []
    assert detect(model, tiny_tokenizer(), str(path), small_recipe("detect.super_weights=false")).super_weights == []


def test_the_decoy_is_a_spike_too() -> None:
    decoder = Decoder.of(model_with_a_super_weight(0))
    watcher = SpikeWatcher(decoder, 50)
    for step in Walk(decoder, torch.arange(8, 72)[None], 1).steps():
        with watcher.watching(step.index):
            step.run()
    assert {name: (spike.row, spike.columns[0]) for name, spike in watcher.spikes.items()} == {
        "model.layers.0.mlp.down_proj": (DECOY, NEURON), "model.layers.1.mlp.down_proj": (CANCELLED, NEURON)}


def test_weights_that_are_zero_cost_nothing_under_rounded_inputs_and_a_prefix() -> None:
    """Every trial lets the tokens of the prefix through, as the walk does."""
    model = tiny_model("llama")
    decoder = Decoder.of(model)
    name = "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[0, :4] = 0
    round_inputs(model, decoder.linears, dict.fromkeys(decoder.linears, input_args("int8", "token")), {})
    let_through(model, [1])
    rows = torch.randint(8, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 1
    tried = _zeroed(decoder, [name], lambda _: [Trial(name, 0, column) for column in range(3)], Walk(decoder, rows, 8),
                    None, "")
    assert [one.increase for one in tried] == pytest.approx([0.0] * 3, abs=1e-7)


def test_down_projections_are_found_by_what_they_write() -> None:
    expected = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj",
                "opt": "model.decoder.layers.1.fc2", "gpt_neox": "gpt_neox.layers.1.mlp.dense_4h_to_h",
                "gpt_oss": None}
    assert {family: down_projection(Decoder.of(tiny_model(family)), 1) for family in expected} == expected
    # Its mixer writes to the residual stream too, and from another width than that one's.
    hybrid = tiny_model("falcon_h1", mamba_d_ssm=128, mamba_n_heads=8)
    assert down_projection(Decoder.of(hybrid), 1) == "model.layers.1.feed_forward.down_proj"
