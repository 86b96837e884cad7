"""Saving: everything is in the folder, or nothing is."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import digest, quantized, weight_bytes
from families import tiny_model
from forked import start
from interruptions import fills
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.cache import load_prefix, make_prefix
from sinkquant.errors import RequestError, SinkquantError
from sinkquant.formats import load, read_checkpoint, save, versions
from sinkquant.formats import save as save_package
from sinkquant.formats.load import KV_PREFIX
from sinkquant.models import Decoder, load_model
from sinkquant.policy import make_plan
from sinkquant.quantize import quantize
from sinkquant.recipe import Recipe

saving = sys.modules["sinkquant.formats.save"]


@pytest.fixture(scope="module")
def model(text_file: Path) -> PreTrainedModel:
    return quantized(text_file)[0]


def test_the_checkpoint_carries_where_it_came_from(text_file: Path, tmp_path: Path) -> None:
    model, plan, sink_map = quantized(text_file)
    recipe = Recipe().replace(["name=mine"])
    folder = save(model, tiny_tokenizer(), tmp_path / "deep" / "out", sink_map, recipe)
    content = read_checkpoint(folder)
    assert content is not None
    assert content["schema"] == "sinkquant/checkpoint@1"
    assert content["plan"].to_json() == plan.to_json()
    assert content["sink_map"].to_json() == sink_map.to_json()
    assert Recipe.parse(content["recipe"]) == recipe
    assert content["seed"] == 7
    assert content["versions"] == versions()
    assert {"torch", "transformers", "compressed-tensors", "safetensors", "sinkquant"} <= set(versions())
    assert save(model, tiny_tokenizer(), tmp_path / "plain").is_dir()
    own = read_checkpoint(tmp_path / "plain")
    assert own is not None
    assert Recipe.parse(own["recipe"]).seed == 7
    assert own["sink_map"].to_json() == sink_map.to_json()


def test_two_runs_give_the_same_bytes_and_saving_leaves_the_model_as_it_was(text_file: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("first", "second"):
        model, _, _ = quantized(text_file, method="gptq", bits=3)
        digests.append(digest(save(model, tiny_tokenizer(), tmp_path / name)))
    assert digests[0] == digests[1]
    assert digest(save(model, tiny_tokenizer(), tmp_path / "third")) == digests[0]
    assert getattr(model.config, "quantization_config", None) is None


def test_every_file_follows_the_umask_and_no_bar_is_drawn(model: PreTrainedModel, tmp_path: Path,
                                                          capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    out = save(model, tiny_tokenizer(), tmp_path / "out")
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {
        stat.S_IMODE((tmp_path / "file").stat().st_mode)}
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((tmp_path / "folder").stat().st_mode)
    assert "it/s" not in capfd.readouterr().err


def test_a_sharded_source_is_read_and_never_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(source, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(source)
    before = digest(source)
    assert len(list(source.glob("*.safetensors"))) > 2
    model = load_model(source)
    decoder = Decoder.of(model)
    plan = make_plan(decoder.shape("source"), sink_map_of(decoder), Recipe().replace(
        ["weights.method=rtn", "weights.group_size=32"]))
    assert plan.unquantized_bytes == pytest.approx(weight_bytes(source), rel=0.01)
    out = save(quantize(model, plan), tiny_tokenizer(), tmp_path / "out")
    assert weight_bytes(out) == plan.weight_bytes
    assert digest(source) == before


def test_an_output_that_stands_there_is_refused_and_an_empty_folder_is_taken(model: PreTrainedModel,
                                                                             tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(RequestError, match="exists and is not empty"):
            save(model, tiny_tokenizer(), tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "keep"
    save(model, tiny_tokenizer(), tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full"]


def test_a_model_that_was_not_quantized_is_refused(tiny: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="was not quantized by sinkquant"):
        save(tiny, tiny_tokenizer(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_takes_no_more_leaves_nothing_behind(text_file: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    limits = [100, 2500, 9000, 60000, 10000000]
    # The first limit stops config.json, the next ones the weights; the last stops nothing.
    code, out, err = start(tmp_path / "said", fills, work, text_file, limits).communicate()
    assert code == 0, err
    lines = out.splitlines()
    for i, limit in enumerate(limits[:-1]):
        assert lines[2 * i] == f"{limit} 1 0 True", out + err
        assert lines[2 * i + 1] == "[]"
    assert lines[-2:] == [f"{limits[-1]} saved", "['out']"]


@pytest.mark.parametrize(("error", "raised", "message"), [
    (OSError(errno.ENOSPC, "No space left on device"), SinkquantError, "the disk is full"),
    (OSError(errno.EIO, "Input/output error"), SinkquantError, "Input/output error"),
    (KeyboardInterrupt("stopped"), KeyboardInterrupt, "stopped")])
def test_whatever_stops_the_writing_nothing_is_left(model: PreTrainedModel, tmp_path: Path, error: BaseException,
                                                    raised: type[BaseException], message: str,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr(saving, "check_reload", stop)
    with pytest.raises(raised, match=message):
        save(model, tiny_tokenizer(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_tokenizer_that_cannot_be_written_is_a_full_disk_too(model: PreTrainedModel, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()

    def full(*_: object) -> None:
        raise Exception("No space left on device (os error 28)")  # As the tokenizers library does.

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(SinkquantError, match="the disk is full"):
        save(model, tokenizer, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_that_does_not_give_the_models_logits_is_not_written(text_file: Path, tmp_path: Path) -> None:
    model = quantized(text_file)[0]
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] += 1
    with pytest.raises(SinkquantError, match="does not give the model's logits"):
        save(model, tiny_tokenizer(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_said(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkquantError, match=r"nothing can be written into .* is no folder"):
        save_package(model, tiny_tokenizer(), tmp_path / "file" / "out")


def test_a_model_with_another_attention_is_saved(text_file: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are compared with the attention that the model has: another one rounds differently."""
    model = quantized(text_file, attn_implementation="eager")[0]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model.config._attn_implementation == "eager"
    assert save(model, tiny_tokenizer(), "~/eager") == tmp_path / "eager"


def test_a_model_in_training_mode_is_saved_and_goes_on_training(text_file: Path, tmp_path: Path) -> None:
    model = quantized(text_file, attention_dropout=0.5)[0].train()
    assert save(model, tiny_tokenizer(), tmp_path / "out").is_dir()
    assert model.training


def test_a_prefix_goes_with_its_checkpoint(text_file: Path, tmp_path: Path) -> None:
    """Its keys and values are of the unquantized model, which is gone once the model is quantized."""
    model = quantized(text_file, more=("kv_cache={prefix: bos, exact: none, window: 32}",))[0]
    loaded, _ = load(save(model, tiny_tokenizer(), tmp_path / "out"))
    expected = make_prefix(tiny_model("llama"), [1])
    found = load_prefix(tmp_path / "out" / KV_PREFIX)
    assert all(torch.equal(found.keys[layer], keys) for layer, keys in expected.keys.items())
    ids = torch.tensor([[1, *range(8, 60)]])
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 56)
