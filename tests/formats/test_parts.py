"""Only a part of the model is quantized: the attention layers of a hybrid, the text part of a vision-language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import small_recipe
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import sinkquant

TEXT: dict[str, Any] = {
    "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 16, "patch_size": 8}
HYBRID = TEXT | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                 "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}


def made(folder: Path, loader: Any, family: str, **settings: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = loader.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")  # transformers names kernels that are not installed
@pytest.mark.parametrize(("loader", "family", "settings", "packed"), [
    (AutoModelForCausalLM, "qwen3_5_text", HYBRID, "model.layers.1."),
    # A tower as deep as the decoder, in a class that AutoModelForCausalLM does not know.
    (AutoModelForImageTextToText, "idefics3", {"text_config": {"model_type": "llama"} | TEXT, "vision_config": TOWER,
                                               "scale_factor": 1, "image_token_id": 9}, "model.text_model.layers."),
    (AutoModelForImageTextToText, "qwen2_5_vl", {
        "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                   "mrope_section": [2, 3, 3]}},
        "vision_config": {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32,
                          "fullatt_block_indexes": [0]},
        "tie_word_embeddings": True, "image_token_id": 9}, "model.language_model.layers."),  # no such key of the text
])
def test_the_rest_stays_as_it_is(loader: Any, family: str, settings: dict[str, Any], packed: str, tmp_path: Path,
                                 text_file: Path) -> None:
    model = made(tmp_path / "model", loader, family, **settings)
    recipe = small_recipe(text_file, "weights.method=rtn", "kv_cache.key_bits=4", "evaluate.skip=true")
    sinkquant.run(recipe, model=str(tmp_path / "model"), output=tmp_path / "out")
    folder = tmp_path / "out/model"
    stored = load_file(folder / "model.safetensors")
    assert {name for name in stored if name.endswith("weight_packed")} == {
        f"{name}.weight_packed" for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(packed)}
    again = loader.from_pretrained(folder).eval()
    ids = torch.arange(8, 40)[None]
    with torch.no_grad():
        again(ids, use_cache=False)
        moved = (again(ids, use_cache=False).logits - model.eval()(ids, use_cache=False).logits).norm()
    assert 0 < moved < 0.5 * model(ids, use_cache=False).logits.norm()
    kept = {name: tensor for name, tensor in model.state_dict().items() if f"{name}_packed" not in stored}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in kept.items())
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert [layer["packed"] for layer in plan["kv_cache"]["layers"]] == [family != "qwen3_5_text", True]
    loaded, tokenizer = sinkquant.load(folder)
    assert loaded.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 36)
    assert tokenizer.bos_token_id == 1
