"""Heads are really cut off where the architecture allows it, and the smaller model is the one with silenced heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file
from sinkmaps import sink_map_of
from small_runs import model_folder
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from sinkquant.artifacts import SinkMap
from sinkquant.artifacts.heads import HeadAblation, HeadAblations
from sinkquant.blocks import require_droppable
from sinkquant.cli import app
from sinkquant.errors import RequestError
from sinkquant.formats import load
from sinkquant.heads import cut_heads
from sinkquant.heads.cut import require_cuttable
from sinkquant.models import Decoder, head_columns, open_model, weight_matrix
from sinkquant.models.smaller import smaller_model
from sinkquant.recipe import Recipe

CUT = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt_oss"]
GONE = {0: 1, 1: 0, 2: 1}
"""Layer -> the key-value head, of two, whose queries do nothing."""


def asleep(model: PreTrainedModel, gone: dict[int, int], change: float = 1e-4) -> SinkMap:
    """A sink map that says so of the queries of one key-value head per layer."""
    decoder = Decoder.of(model)
    facts = decoder.facts("tiny")
    shared = facts.heads // facts.kv_heads
    heads = []
    for layer, kv in gone.items():
        name, parts = head_columns(decoder, layer)
        heads += [HeadAblation(layer=layer, head=head, module=name, start=parts[head].start, stop=parts[head].stop,
                               loss_change=change, together=change) for head in range(kv * shared, (kv + 1) * shared)]
    found = HeadAblations(texts=["calibration"], rows=1, heads=heads, weights=[])
    return sink_map_of(decoder).model_copy(update={"head_ablations": found})


def silenced(model: PreTrainedModel, sink_map: SinkMap) -> PreTrainedModel:
    assert sink_map.head_ablations is not None
    for head in sink_map.head_ablations.heads:
        weight_matrix(Decoder.of(model).linears[head.module])[:, head.start:head.stop] = 0
    return model


@pytest.mark.parametrize("family", CUT)
def test_a_smaller_checkpoint_computes_what_silenced_heads_leave(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    sink_map = asleep(model, GONE)
    kept = cut_heads(model, tiny_tokenizer(), sink_map, tmp_path / "small")
    assert kept == [[0], [1], [0]]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    config = loaded.config.get_text_config(decoder=True)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 16)
    row = torch.arange(8, 60)[None]
    with torch.no_grad():
        expected = silenced(model, sink_map)(row, use_cache=False).logits
        assert torch.allclose(loaded(row, use_cache=False).logits, expected, atol=1e-5)
        assert loaded.generate(row, max_new_tokens=2, do_sample=False).shape == (1, 54)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
def test_where_a_heads_width_follows_from_their_number_nothing_can_be_cut(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    assert all(smaller_model(model, count) is None for count in range(1, 4))
    with pytest.raises(RequestError, match=r"with these smaller numbers: none\. prune\.heads=no-op in a recipe"):
        cut_heads(model, tiny_tokenizer(), asleep(model, GONE), tmp_path / "small")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match="with these smaller numbers: none"):
        require_cuttable(model)


def test_a_hybrid_is_refused_whatever_is_found_of_it() -> None:
    model = tiny_model("qwen3", layer_types=["linear_attention", "full_attention", "full_attention"])
    with pytest.raises(RequestError, match=r"every layer has to lose as many, and layer 0 of .* no attention matrix"):
        require_cuttable(model)


def test_from_disk_and_only_as_many_as_every_layer_can_lose(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = tiny_model("llama", dtype=torch.bfloat16, num_key_value_heads=4, tie_word_embeddings=True)
    model.save_pretrained(source)
    sink_map = asleep(model, {0: 1, 1: 2, 2: 3})
    # Llama wants a width that the number of heads divides: 3 of 4 heads are none.
    with pytest.raises(RequestError, match="with these smaller numbers: 1, 2"):
        cut_heads(open_model(source), tiny_tokenizer(), sink_map, tmp_path / "small")
    assert sink_map.head_ablations is not None
    more = asleep(model, {0: 0, 1: 0, 2: 1}).head_ablations
    assert more is not None
    both = sink_map.head_ablations.model_copy(update={"heads": sink_map.head_ablations.heads + more.heads})
    sink_map = sink_map.model_copy(update={"head_ablations": both})
    kept = cut_heads(open_model(source), tiny_tokenizer(), sink_map, tmp_path / "small")
    assert kept == [[2, 3], [1, 3], [0, 2]]
    small, whole = ((tmp_path / place / "model.safetensors").stat().st_size for place in ("small", "source"))
    assert small < whole - 3 * 2 * 4 * 16 * 64 * 2 + 100
    row = torch.arange(8, 40)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small").float()
        assert torch.allclose(loaded(row).logits, silenced(model, sink_map).float()(row).logits, atol=1e-5)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = model_folder(tmp_path / "source")
    asleep(tiny_model("llama"), GONE).save(tmp_path / "sinkmap.json")
    command = ["cut-heads", str(source), "-o", str(tmp_path / "small"), "--sink-map", str(tmp_path / "sinkmap.json")]
    app(command, standalone_mode=False)
    assert "1 of 2 key-value heads are left in every layer" in capsys.readouterr().out
    assert len(load(tmp_path / "small")[0].model.layers[0].self_attn.k_proj.weight) == 16
    with pytest.raises(RequestError, match="exists and is not empty"):
        app(command, standalone_mode=False)


def test_tensors_beside_the_model_are_refused_before_its_sinks_are_found(tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    source = model_folder(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"model.layers.3.eh_proj.weight": torch.zeros(64, 128)}, source / "model.safetensors",
              {"format": "pt"})
    monkeypatch.setattr("sinkquant.cli.models.find_sinks", lambda *_: pytest.fail("looked for sinks"))
    with pytest.raises(RequestError, match=r"comes with model\.layers\.3\.eh_proj\.weight"):
        app(["cut-heads", str(source), "-o", str(tmp_path / "small")], standalone_mode=False)
    with pytest.raises(RequestError, match=r"comes with model\.layers\.3\.eh_proj\.weight"):
        require_droppable(Decoder.of(open_model(source)), Recipe().replace(["prune.blocks=1"]))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for sink_map, message in (
            (sink_map_of(Decoder.of(model)), "does not say what heads are worth"),
            (asleep(model, {0: 1, 2: 1}), "layer 1 has 0 of 2 key-value heads"),
            (asleep(model, GONE, change=0.5), "has 0 of 2 key-value heads"),
            (asleep(tiny_model("llama", num_hidden_layers=2), {0: 1}), "of another model")):
        with pytest.raises(RequestError, match=message):
            cut_heads(model, tokenizer, sink_map, tmp_path / "small")
    with pytest.raises(RequestError, match="not in memory"):
        cut_heads(tiny_model("llama").to("meta"), tokenizer, asleep(model, GONE), tmp_path / "small")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").write_text("keep")
    with pytest.raises(RequestError, match="exists and is not empty"):
        cut_heads(model, tokenizer, asleep(model, GONE), tmp_path / "small")
