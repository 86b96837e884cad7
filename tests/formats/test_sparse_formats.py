"""What docs/guides/pruning.md says of compressed-tensors' formats for zeros: plain transformers loads none of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.utils import pack_bitmasks
from families import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("name", ["sparse-24-bitmask", "sparse-bitmask", "marlin-24"])
def test_plain_transformers_knows_no_format_for_zeros(name: str, tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    packed: dict[str, torch.Tensor] = {}
    for key, weight in load_file(tmp_path / "model.safetensors").items():
        if "proj" in key:
            module = key.removesuffix(".weight")
            kept = torch.tensor([False, False, True, True]).repeat(weight.shape[1] // 4).expand(weight.shape)
            packed |= {f"{module}.compressed": weight[kept].reshape(len(weight), -1).contiguous(),
                       f"{module}.bitmask": pack_bitmasks(kept), f"{module}.shape": torch.tensor(weight.shape)}
        else:
            packed[key] = weight
    save_file(packed, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "dense", "quantization_status": "compressed",
        "config_groups": {}, "ignore": ["lm_head"],
        "sparsity_config": {"format": name, "targets": ["Linear"], "ignore": ["lm_head"], "sparsity_structure": "2:4",
                            "global_sparsity": 0.5}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {f"{key.removesuffix('.compressed')}.weight" for key in packed if key.endswith(".compressed")} <= set(
        info["missing_keys"])
