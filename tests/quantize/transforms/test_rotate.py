"""A rotated model computes the same, in every family, or is refused with the reason."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from exact_norms import exact_norms, jolt
from families import FAMILIES, tiny_model
from small_runs import model_folder

from sinkquant.errors import RequestError
from sinkquant.models import Decoder, load_model, open_model, pieces
from sinkquant.quantize.transforms.rotate import Rotate, rehearse

ROWS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
SANDWICHED = ("gemma2", "gemma3_text")
CASES = [(family, scope) for family in FAMILIES for scope in ("values", "full")
         if scope == "values" or family not in SANDWICHED]


@pytest.mark.parametrize(("family", "scope"), CASES)
def test_the_logits_are_the_same_in_float64(family: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = jolt(tiny_model(family, dtype=torch.float64, tie_word_embeddings=True))
    exact_norms(model, monkeypatch)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = model(ROWS).logits
    decoder = Decoder.of(model)
    rehearse(decoder, Rotate(scope, 5))  # type: ignore[arg-type]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    Rotate(scope, 5).apply(decoder)  # type: ignore[arg-type]
    assert model.config.tie_word_embeddings == (scope == "values")
    with torch.no_grad():
        found = model(ROWS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    changed = {name for name, parameter in model.named_parameters()
               if name not in before or not torch.allclose(parameter, before[name], atol=1e-3)}
    linears = {f"{name}.weight" for name in decoder.linears}
    assert linears <= changed if scope == "full" else len(changed & linears) == 2 * len(decoder.blocks)


@pytest.mark.parametrize("size", [{"hidden_size": 96, "num_attention_heads": 6, "head_dim": 16},
                                  {"hidden_size": 72, "num_attention_heads": 6, "head_dim": 12}])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_widths_that_are_no_powers_of_two(family: str, size: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    size = size if family == "llama" else {key: size[key] for key in ("hidden_size", "num_attention_heads")}
    model = jolt(tiny_model(family, dtype=torch.float64, **size))
    exact_norms(model, monkeypatch)
    with torch.no_grad():
        expected = model(ROWS).logits
        Rotate("full", 1).apply(Decoder.of(model))
        torch.testing.assert_close(model(ROWS).logits, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["olmo", "cohere", "nemotron", "starcoder2", "phi", "gemma"])
def test_families_that_nobody_named(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, family, FAMILIES["llama"] | {"head_dim": 16})
    model = jolt(tiny_model(family))
    with torch.no_grad():
        expected = model(ROWS).logits
        Rotate("full", 1).apply(Decoder.of(model))
        torch.testing.assert_close(model(ROWS).logits, expected, rtol=0, atol=1e-5)


def test_it_spreads_a_massive_channel() -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().weight.data[:, 7] = 50
    Rotate("full").apply(Decoder.of(model))
    row = model.get_input_embeddings().weight[5]
    assert row.abs().max() < 1.1 * 50 / 8


@pytest.mark.parametrize("family", SANDWICHED)
def test_norms_before_the_stream_are_a_reason(family: str) -> None:
    with pytest.raises(RequestError, match="post_attention_layernorm scales every channel by itself"):
        Rotate("full").apply(Decoder.of(tiny_model(family)))


def test_a_parameter_whose_place_is_not_known_is_a_reason() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.extra = torch.nn.Linear(64, 64)
    with pytest.raises(RequestError, match=r"it holds model.layers.1.mlp.extra, whose part"):
        Rotate("full").apply(Decoder.of(model))
    model = tiny_model("llama")
    model.model.layers[0].self_attn.v_norm = torch.nn.LayerNorm(16)
    with pytest.raises(RequestError, match="values of its attention do not go straight"):
        Rotate("values").apply(Decoder.of(model))


def test_a_gate_between_values_and_output_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of channels commutes with it."""
    monkeypatch.setitem(FAMILIES, "qwen3_5_text", FAMILIES["qwen3"] | {"layer_types": ["full_attention"] * 3})
    decoder = Decoder.of(tiny_model("qwen3_5_text"))
    with pytest.raises(RequestError, match="values of its attention do not go straight"):
        Rotate("values").apply(decoder)
    assert all(block.values is not None for block in decoder.structure.blocks)


def test_a_block_that_computes_something_else_than_its_names_say_is_refused() -> None:
    model = tiny_model("llama")
    block = model.model.layers[0]
    plain = copy.deepcopy(block.mlp)
    block.mlp.forward = lambda hidden: plain(hidden) + hidden.roll(1, -1).abs()
    with pytest.raises(RequestError, match=r"model.layers.0 does not compute the same"):
        rehearse(Decoder.of(model), Rotate("full"))


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gpt_neox", False), ("mixtral", False)])
def test_from_disk_every_tensor_is_read_as_it_is_made_in_memory(family: str, tied: bool, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", family, torch.bfloat16, tie_word_embeddings=tied)
    jolt(load_model(folder)).save_pretrained(folder)
    memory, disk = Decoder.of(load_model(folder)), Decoder.of(open_model(folder))
    for decoder in (memory, disk):
        Rotate("full", 3).apply(decoder)
    expected = memory.model.state_dict()
    assert set(disk.shape("").tensors) == set(memory.shape("").tensors) >= {"lm_head.weight"}
    for name in disk.shape("").tensors:
        found = torch.cat([rows for _, rows in pieces(disk, name)])
        assert torch.equal(found, expected[name]), name
    source = disk.source
    assert source is not None
    stored = source.stored(memory.structure.embeddings[0])
    assert stored is not None
    ids = torch.tensor([3, 4, 9])
    assert torch.equal(stored.pick(ids), expected[memory.structure.embeddings[0]][ids])
