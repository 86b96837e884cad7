"""Decoders beyond the thirteen families: each either equals its plain forward pass, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detect_helpers import small_recipe, write_text
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkquant.detect import detect
from sinkquant.detect.residual import ResidualStream
from sinkquant.detect.table import AttentionTable
from sinkquant.errors import RequestError
from sinkquant.models import Decoder, Walk

BASE: dict[str, Any] = {
    "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256}
OWN_NAMES: dict[str, Any] = {
    "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "num_local_experts": 4, "num_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 16, "initializer_range": 0.1, "dff": 128}
"""Names that some configurations have beside the usual ones; used where the configuration knows them."""
MLA: dict[str, Any] = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
                       "qk_nope_head_dim": 16, "v_head_dim": 20}
SLIDING: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

COVERED: dict[str, dict[str, Any]] = {
    "afmoe": {}, "apertus": {}, "arcee": {}, "biogpt": {}, "bitnet": {},
    "cohere": {"logit_scale": 0.5}, "cohere2": SLIDING, "ctrl": {}, "cwm": {},
    "deepseek_v2": MLA, "deepseek_v3": MLA, "doge": {}, "dots1": {}, "ernie4_5": {},
    "ernie4_5_moe": {}, "exaone4": SLIDING, "flex_olmo": {}, "gemma": {}, "glm": {}, "glm4": {}, "glm4_moe": {},
    "gpt_bigcode": {}, "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2,
                                   "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "granitemoe": {"residual_multiplier": 0.3}, "helium": {}, "hunyuan_v1_dense": {}, "hunyuan_v1_moe": {},
    "jais2": {}, "jetmoe": {}, "llama4_text": {}, "mimo_v2_flash": {}, "minimax_m2": {}, "ministral": {},
    "ministral3": {}, "nanochat": {}, "nemotron": {}, "olmo": {}, "olmo2": {}, "olmo3": {}, "olmoe": {},
    "persimmon": {}, "phi": {}, "phimoe": {}, "qwen2_moe": {}, "seed_oss": {}, "smollm3": {}, "solar_open": {},
    "stablelm": {}, "starcoder2": {}, "vaultgemma": {}}

_SECOND: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA: dict[str, Any] = _SECOND | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                                    "linear_value_head_dim": 16, "shared_expert_intermediate_size": 64}
HYBRIDS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 32,
                         "mamba_expand": 2, "mamba_d_state": 16, "mamba_n_groups": 1, "shared_intermediate_size": 64},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
              "mamba_dt_rank": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, "minimax": _SECOND,
    "nemotron_h": {"layer_types": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
                   "ssm_state_size": 16, "n_groups": 1},
    "olmo_hybrid": _SECOND, "qwen3_5_text": _DELTA, "qwen3_next": _DELTA}
"""The first of two layers has no attention matrix."""

REFUSED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_expand": 2,
              "mamba_d_state": 16, "mamba_n_groups": 1},
    "bert": {}, "bloom": {}, "diffllama": {}, "falcon": {}, "falcon_mamba": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "kimi_linear": {}, "mamba": {}, "mpt": {},
    "roberta": {}, "rwkv": {}, "xglm": {}}


def tiny(family: str, extra: dict[str, Any]) -> PreTrainedModel:
    """A random model of two small layers."""
    known = AutoConfig.for_model(family)
    names = {name: value for name, value in OWN_NAMES.items()
             if hasattr(known, name) and not (name == "head_dim" and (family == "falcon" or "v_head_dim" in extra))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(BASE | names | extra))).eval()


def survey(decoder: Decoder, rows: torch.Tensor) -> tuple[torch.Tensor, AttentionTable, ResidualStream]:
    """What detection does: walk, look at attention and at the residual stream, take the losses."""
    table, stream = AttentionTable(), ResidualStream()
    walk = Walk(decoder, rows, 2, observers=[table])
    for step in walk.steps():
        stream.run(step)
        if step.index not in decoder.quiet:
            table.require_causal(len(rows), type(decoder.model).__name__)
        table.close_layer(rows)
    return walk.losses(), table, stream


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.filterwarnings("ignore")  # transformers names kernels that are not installed
def test_attention_layers_of_a_hybrid_are_seen_and_the_others_left_alone_by_name(family: str) -> None:
    model = tiny(family, HYBRIDS[family])
    rows = torch.randint(8, 128, (3, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits.float()
    expected = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
    decoder = Decoder.of(model)
    losses, table, _ = survey(decoder, rows)
    assert torch.allclose(losses, expected, rtol=1e-3, atol=1e-3)
    assert [layer.received.shape for layer in table.layers] == [(3, 0, 40), (3, 4, 40)]
    assert table.attending == [1]
    shape = decoder.shape("")
    fixed = {name: str(linear.fixed) for name, linear in shape.linears.items() if linear.fixed}
    quiet = [name for name, linear in shape.linears.items() if linear.block == 0]
    assert quiet
    assert all("has no attention matrix: left alone" in fixed[name] for name in quiet)
    others = " ".join(why for name, why in fixed.items() if name not in quiet)
    assert "attention" not in others
    assert [layer.heads > 0 for layer in shape.kv_layers] == [False, True]


def test_layers_may_differ_in_their_number_of_heads(tmp_path: Path) -> None:
    model = tiny("laguna", {
        "num_attention_heads_per_layer": [4, 8], "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 48, "shared_expert_intermediate_size": 32})
    found = detect(model, tiny_tokenizer(), write_text(tmp_path), small_recipe("detect.long_rows=0"))
    assert [len(layer) for layer in found.heads] == [len(layer) for layer in found.head_roles] == [4, 8]
    assert found.tokens == []


@pytest.mark.parametrize("family", COVERED)
def test_the_walk_equals_a_plain_forward(family: str) -> None:
    model = tiny(family, COVERED[family])
    rows = torch.randint(8, 128, (3, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits.float()
    expected = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
    losses, table, stream = survey(Decoder.of(model), rows)
    assert torch.allclose(losses, expected, rtol=1e-3, atol=1e-3)
    assert [layer.received.shape for layer in table.layers] == [(3, 4, 40)] * 2
    assert stream.names == ["embedding", *(f"layers.{i}.{part}" for i in range(2) for part in ("attention", "mlp"))]
    with torch.no_grad():
        assert torch.equal(model(rows, use_cache=False).logits.float(), logits)


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family: str) -> None:
    model = tiny(family, REFUSED[family])
    rows = torch.randint(8, 128, (3, 40), generator=torch.Generator().manual_seed(3))
    with pytest.raises(RequestError, match=f"{type(model).__name__} is not supported: ") as caught:
        survey(Decoder.of(model), rows)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
