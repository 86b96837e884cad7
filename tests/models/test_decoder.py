"""What a decoder is: blocks, linears, what engines fuse, sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sinkquant.errors import RequestError
from sinkquant.models import Decoder, as_stored, require_dense, weight_matrix
from sinkquant.models.decoder import ROUTER
from sinkquant.models.structure import norm_of


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_linears_of_every_family(family: str) -> None:
    model = tiny_model(family)
    decoder = Decoder.of(model)
    assert len(decoder.blocks) == 3
    modules = dict(model.named_modules())
    assert all(modules[name] is block for name, block in zip(decoder.block_names, decoder.blocks, strict=True))
    for name, linear in decoder.linears.items():
        assert modules[name] is linear
        assert decoder.block_names[decoder.block_of(name)] in name
    facts = decoder.facts("x")
    assert (facts.layers, facts.heads, facts.hidden_size) == (3, 4, 64)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert decoder.vocabulary == 128
    assert decoder.max_length == 256


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_shape_lists_what_a_checkpoint_holds(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    shape = Decoder.of(model).shape("x")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert {key: size for key, (_, size) in shape.tensors.items()} == stored
    assert {dtype for dtype, _ in shape.tensors.values()} == {"bfloat16"}


def test_shapes_of_a_llama(tiny: AutoModelForCausalLM) -> None:
    linears = Decoder.of(tiny).shape("x").linears
    q, down = linears["model.layers.1.self_attn.q_proj"], linears["model.layers.2.mlp.down_proj"]
    assert (q.rows, q.columns, q.block) == (64, 64, 1)
    assert q.fused_with == [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    assert (down.rows, down.columns, down.block) == (64, 128, 2)
    assert down.fused_with == ["model.layers.2.mlp.down_proj"]
    assert not any(linear.fixed for linear in linears.values())


def test_what_cannot_be_quantized_says_why() -> None:
    gpt2 = Decoder.of(tiny_model("gpt2"))
    assert all(linear.transposed and not linear.fixed for linear in gpt2.shape("x").linears.values())
    conv = gpt2.linears["transformer.h.0.mlp.c_fc"]
    assert weight_matrix(conv).shape == (256, 64)
    assert torch.equal(as_stored(conv, weight_matrix(conv)), conv.weight)
    moe = Decoder.of(tiny_model("gpt_oss")).shape("x").linears
    assert "fused experts" in str(moe["model.layers.0.mlp.experts.down_proj"].fixed)


def test_models_without_observable_attention_are_refused_by_name() -> None:
    bloom = AutoConfig.for_model("bloom", vocab_size=128, hidden_size=64, n_layer=2, n_head=4)
    with pytest.raises(RequestError, match="BloomForCausalLM is not supported: it does not dispatch its attention"):
        Decoder.of(AutoModelForCausalLM.from_config(bloom))


def test_what_another_library_has_wrapped_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(RequestError, match="the model is compiled"):
        Decoder.of(torch.compile(model, backend="eager"))
    attention = model.model.layers[1].self_attn
    adapted = torch.nn.Module()  # as PEFT's layers are
    adapted.base_layer, adapted.lora_A = attention.q_proj, torch.nn.ModuleDict({"default": torch.nn.Linear(64, 8)})
    attention.q_proj = adapted
    with pytest.raises(RequestError, match=r"layers\.1\.self_attn\.q_proj carries an adapter"):
        Decoder.of(model)


def test_layers_that_share_weights_are_refused_by_name() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(RequestError, match="its layers 0 and 2 share the weight mlp"):
        Decoder.of(model)


def test_an_unknown_block_is_a_key_error(tiny: AutoModelForCausalLM) -> None:
    with pytest.raises(KeyError):
        Decoder.of(tiny).block_of("lm_head")


@pytest.mark.parametrize("name", ["mlp.gate", "block_sparse_moe.router", "mlp.shared_expert_gate", "router.proj",
                                  "mlp.gate.wg", "router.layer", "mlp.router.classifier"])
def test_routers_of_all_mixtures_are_known_by_their_names(name: str) -> None:
    assert ROUTER.search(name)


@pytest.mark.parametrize("name", ["mlp.gate_proj", "self_attn.o_proj", "mlp.gate.up_proj", "mixer.in_proj"])
def test_other_gates_are_no_routers(name: str) -> None:
    assert not ROUTER.search(name)


def test_a_model_in_memory_from_pickled_weights_is_taken(tmp_path: Path) -> None:
    """transformers reads `pytorch_model.bin`; once the model is in memory nothing more is read from there."""
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert Decoder.of(loaded).shape("").linears == Decoder.of(model).shape("").linears


def test_a_model_in_fp8_is_refused_by_name() -> None:
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(RequestError, match=r"layers.0.mlp.up_proj.weight is in float8_e4m3fn"):
        require_dense(model)


@pytest.mark.parametrize(("family", "more"), [
    ("llama", {}), ("gpt2", {}), ("gpt_neox", {}), ("phi3", {}), ("gpt_bigcode", {"multi_query": True}),
    ("gpt_bigcode", {"multi_query": False})])
def test_values_and_what_reads_them(family: str, more: dict[str, bool]) -> None:
    """Each channel of the values times two, and the columns that read it by a half: the same model."""
    model = tiny_model(family, **more) if family in FAMILIES else AutoModelForCausalLM.from_config(AutoConfig.for_model(
        family, n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64, **more)).eval()
    ids = torch.randint(8, 128, (2, 30), generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        plain = model(ids).logits
        pairs = [block.values for block in Decoder.of(model).structure.blocks]
        for pair in pairs:
            assert pair is not None
            scale = 2.0 ** torch.arange(len(pair.rows)).remainder(5)
            first, second = parameters[pair.first.weight], parameters[pair.second.weight]
            (first.T if pair.first.transposed else first)[pair.rows] *= scale[:, None]
            if pair.first.bias is not None:
                parameters[pair.first.bias][pair.rows] *= scale
            columns = (second.T if pair.second.transposed else second)
            columns /= scale[pair.reads]
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)


def test_key_value_heads_may_differ_by_layer() -> None:
    """Gemma 4 without embeddings per layer: its full attention has heads of its own."""
    config = AutoConfig.for_model(
        "gemma4_text", vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_global_key_value_heads=1, head_dim=16, global_head_dim=32,
        attention_k_eq_v=True, num_kv_shared_layers=0, hidden_size_per_layer_input=0, sliding_window=48,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0)
    shape = Decoder.of(AutoModelForCausalLM.from_config(config)).shape("")
    assert shape.attentions == {"model.layers.0.self_attn": 2, "model.layers.1.self_attn": 1}
    assert [layer.heads for layer in shape.kv_layers] == [2, 1]


def test_a_norm_that_wraps_other_modules_is_none_that_is_known() -> None:
    norm, wrapped = nn.RMSNorm(64), nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 64))
    known = norm_of("norm", norm, 64, {})
    assert known is not None
    assert known.gain == "norm.weight"
    assert norm_of("wrapped", wrapped, 64, {}) is None
