"""A model that stays on disk gives the very weights, walks and losses of one that is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sinkquant.errors import RequestError
from sinkquant.models import ActivationStore, Decoder, Walk, load_model, open_model, source_of, together

ROWS = torch.randint(8, 128, (5, 48), generator=torch.Generator().manual_seed(0))


def on_disk(model: PreTrainedModel, folder: Path, shard: str = "50GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_are_filled_as_from_pretrained_fills_them_and_emptied_again(family: str, tmp_path: Path) -> None:
    folder = on_disk(tiny_model(family, dtype=torch.bfloat16), tmp_path, "100KB")
    disk, loaded = Decoder.of(open_model(folder)), Decoder.of(load_model(folder))
    assert all(parameter.is_meta for parameter in disk.model.parameters())
    assert disk.shape("x") == loaded.shape("x")
    assert disk.facts("x") == loaded.facts("x")
    for mine, theirs in zip(disk.blocks, loaded.blocks, strict=True):
        with disk.present([mine]):
            expected = theirs.state_dict()
            assert all(torch.equal(value, expected[name]) for name, value in mine.state_dict().items())
            assert sum(not p.is_meta for p in disk.model.parameters()) == len(list(mine.parameters()))
    assert all(parameter.is_meta for parameter in disk.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_a_walk_from_disk_gives_the_bits_of_a_walk_in_memory(family: str, tmp_path: Path) -> None:
    folder = on_disk(tiny_model(family, dtype=torch.bfloat16, tie_word_embeddings=True), tmp_path)
    walks = [Walk(Decoder.of(model), ROWS, 2) for model in (open_model(folder), load_model(folder))]
    for walk in walks:
        for _ in walk.steps():
            pass
    assert torch.equal(walks[0].hidden, walks[1].hidden)
    assert torch.equal(walks[0].losses(), walks[1].losses())


def test_several_walks_share_one_reading_and_a_mapped_file_holds_what_memory_does_not(
        tiny_folder: Path, tmp_path: Path) -> None:
    decoder = Decoder.of(open_model(tiny_folder))
    short = ROWS[:3, :32]
    alone = [Walk(decoder, rows, 2) for rows in (ROWS, short)]
    for walk in alone:
        for _ in walk.steps():
            pass
    source, reads = source_of(decoder.model), []
    assert source is not None
    fill = source._fill
    source._fill = lambda names: (reads.append(len(names)), fill(names))[1]  # type: ignore[method-assign]
    shared = [Walk(decoder, ROWS, 2, store=ActivationStore(tmp_path, 0)), Walk(decoder, short, 2)]
    for steps in together(shared):
        assert {step.name for step in steps} == {decoder.block_names[steps[0].index]}
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(alone, shared, strict=True))
    assert len(reads) == len(decoder.blocks) + 1  # each block once, and what stands outside them
    assert list(tmp_path.iterdir()) == []  # mapped files have no names


def test_losses_with_a_head_in_pieces(tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = Walk(Decoder.of(tiny), ROWS, 2)
    for _ in walk.steps():
        pass
    whole = walk.losses()
    monkeypatch.setattr("sinkquant.models.ends.HEAD_VALUES", 50 * 64)
    torch.testing.assert_close(walk.losses(), whole, rtol=1e-6, atol=1e-6)
    monkeypatch.undo()
    monkeypatch.setattr("sinkquant.models.ends.LOGITS", 2 * ROWS.shape[1] * 30)  # of two rows, 30 at a time
    torch.testing.assert_close(walk.losses(), whole, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        logits = tiny(ROWS).logits.double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ROWS[:, 1:], reduction="none")
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_walk_in_fewer_bits_leaves_the_weights_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in Walk(Decoder.of(model), ROWS, 5, dtype=torch.bfloat16).steps():
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_that_the_checkpoint_holds_beside_a_tied_embedding(tmp_path: Path) -> None:
    """Equal on disk: tied, as from_pretrained does; different: two tensors, whatever config.json says."""
    folder = on_disk(tiny_model("llama", tie_word_embeddings=True), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for head, tied in ((embedding.clone(), True), (embedding + 1, False)):
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
        model = open_model(folder)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        with Decoder.of(model).present([model]):
            assert torch.equal(model.lm_head.weight, head)


def test_a_dtype_that_the_configuration_does_not_name_is_the_one_of_transformers(tmp_path: Path) -> None:
    folder = on_disk(tiny_model("llama", dtype=torch.bfloat16), tmp_path)
    tensors = load_file(folder / "model.safetensors")  # wide tensors lie first in the file
    save_file({name: one.float() if "norm" in name else one for name, one in tensors.items()},
              folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: one for key, one in settings.items() if key != "dtype"}))
    assert open_model(folder).dtype == load_model(folder).dtype == torch.bfloat16


def test_a_tied_embedding_is_read_from_the_head_that_the_checkpoint_holds_alone(tmp_path: Path) -> None:
    """What safetensors' save_model keeps of the two."""
    folder = on_disk(tiny_model("llama", tie_word_embeddings=True), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": embedding}, folder / "model.safetensors", {"format": "pt"})
    decoder = Decoder.of(open_model(folder))
    assert decoder.model.lm_head.weight is decoder.model.model.embed_tokens.weight
    with decoder.present([decoder.model.model.embed_tokens]):
        assert torch.equal(decoder.model.model.embed_tokens.weight, embedding)


def test_broken_checkpoints_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(RequestError, match=r"lacks the tensor model.layers.1.mlp.up_proj.weight"):
        open_model(folder)
    save_file(tensors | {name: tensors[name][:-1]}, folder / "model.safetensors")
    with pytest.raises(RequestError, match=r"up_proj.weight with the shape \[127, 64\] where \[128, 64\]"):
        open_model(folder)
    spoilt = tensors[name].clone()
    spoilt[3, 5] = float("nan")
    save_file(tensors | {name: spoilt}, folder / "model.safetensors")
    with pytest.raises(RequestError, match=r"up_proj.weight holds NaN or Inf"):
        for _ in Walk(Decoder.of(open_model(folder)), ROWS, 5).steps():
            pass
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(RequestError, match="quantized as 'gptq'; start from the unquantized model"):
        open_model(folder)


def test_rounded_inputs_of_stacked_experts_are_refused_and_those_of_renamed_linears_read(tmp_path: Path) -> None:
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    for family, change in (("qwen3_moe", lambda name: name), ("llama", lambda name: name.removeprefix("model."))):
        folder = on_disk(tiny_model(family, dtype=torch.bfloat16), tmp_path / family)
        tensors = {}
        for name, weight in load_file(folder / "model.safetensors").items():
            tensors[change(name)] = weight
            if ".layers." in name and name.endswith("_proj.weight"):
                scale = weight.float().abs().amax(1, keepdim=True) / 448
                tensors[change(name)] = (weight.float() / scale).to(torch.float8_e4m3fn)
                tensors[f"{change(name)}_scale"] = scale.to(torch.bfloat16)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {
            "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}}))
        if family == "llama":
            assert len(open_model(folder).model.layers[1].mlp.up_proj._forward_pre_hooks) == 1
        else:
            with pytest.raises(RequestError, match=r"rounds the inputs of .*experts\.0\.\w+, which is no module"):
                open_model(folder)
