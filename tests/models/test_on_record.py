"""A sink map of a folder keeps the model's shape: a plan from it builds no model, and is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import quantized
from commands import call, one_sentence, settings
from families import MIXTURES, tiny_mixture, tiny_model
from safetensors.torch import load_file, save_file
from sinkmaps import sink_map_of
from small_runs import model_folder
from tiny_tokenizer import tiny_tokenizer

import sinkquant as sq
from sinkquant.artifacts import SinkMap
from sinkquant.detect.kept_shape import with_shape
from sinkquant.models import Decoder, open_model
from sinkquant.models.on_record import shape_on_record


def kept_of(folder: Path) -> SinkMap:
    """A sink map of a folder as a file gives it back."""
    model = open_model(folder)
    made = with_shape(sink_map_of(Decoder.of(model)), model)
    return SinkMap.parse(json.loads(made.to_json()), "map")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_oss", *MIXTURES])
def test_the_shape_comes_back_as_the_model_gives_it(family: str, tmp_path: Path) -> None:
    (tiny_mixture if family in MIXTURES else tiny_model)(family).save_pretrained(tmp_path)
    shape = Decoder.of(open_model(tmp_path)).shape("a name")
    found = shape_on_record(kept_of(tmp_path), tmp_path, "a name")
    assert found == shape
    assert list(found.linears) == list(shape.linears)
    assert list(found.tensors) == list(shape.tensors)


def test_a_shape_is_kept_for_the_files_that_it_is_of(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    kept, weights, config = kept_of(folder), folder / "model.safetensors", folder / "config.json"
    assert shape_on_record(kept, folder, "") is not None
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    assert shape_on_record(kept, folder, "") is not None
    save_file({name: tensor.half() for name, tensor in tensors.items()}, weights, {"format": "pt"})
    assert shape_on_record(kept, folder, "") is None
    save_file(tensors, weights, {"format": "pt"})
    content = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(content | {"rope_theta": 5000.0}), encoding="utf-8")
    assert shape_on_record(kept, folder, "") is None
    assert shape_on_record(None, folder, "") is None


def test_a_shape_that_was_edited_is_not_taken(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    made = json.loads(kept_of(folder).to_json())
    next(iter(made["shape"]["shape"]["linears"].values()))["block"] = 99
    assert shape_on_record(SinkMap.parse(made, "map"), folder, "") is None


def test_none_is_kept_where_files_do_not_tell_it(tmp_path: Path) -> None:
    """Whether an output head is the embedding can be a question of values, and code of a folder's own does anything."""
    folder = model_folder(tmp_path / "model", tie_word_embeddings=True)
    assert kept_of(folder).shape is not None
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert kept_of(folder).shape is None
    own = model_folder(tmp_path / "own")
    content = json.loads((own / "config.json").read_text(encoding="utf-8"))
    (own / "config.json").write_text(json.dumps(content | {"auto_map": {}}), encoding="utf-8")
    assert kept_of(own).shape is None


def test_a_quantized_model_is_not_planned_from_its_sink_map(text_file: Path, tmp_path: Path) -> None:
    model, _, sink_map = quantized(text_file)
    sq.save(model, tiny_tokenizer(), tmp_path / "w4", sink_map)
    assert call("detect", tmp_path / "w4", "-o", tmp_path / "map.json", *settings(text_file)).code == 0
    done = call("plan", tmp_path / "w4", "--sink-map", tmp_path / "map.json", "--set", "weights.group_size=32")
    assert "quantized already" in one_sentence(done)


def test_a_plan_from_it_is_the_same_and_imports_nothing_heavy(text_file: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", dtype=torch.bfloat16)
    assert call("detect", folder, "-o", tmp_path / "map.json", *settings(text_file)).code == 0
    bare = json.loads((tmp_path / "map.json").read_text(encoding="utf-8")) | {"shape": None}
    (tmp_path / "bare.json").write_text(json.dumps(bare), encoding="utf-8")
    asked = ["plan", str(folder), "-r", "w4-kv2-sink", "--set", "weights.group_size=32", "--json", "--sink-map"]
    built = call(*asked, tmp_path / "bare.json")
    code = ("import sys\nfrom sinkquant.cli import main\ntry:\n    main()\nfinally:\n"
            "    print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)")
    kept = subprocess.run([sys.executable, "-c", code, *asked, str(tmp_path / "map.json")], capture_output=True,
                          text=True, check=True)
    assert kept.stdout == built.out
    assert json.loads(built.out)["kv_cache"] is not None
    assert not {"torch", "transformers", "compressed_tensors", "accelerate", "scipy"} & set(kept.stderr.split())
