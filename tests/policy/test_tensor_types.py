"""What llama-quantize is told of a plan: a type for every matrix, at the bytes of the file of the same plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import tiny_model
from gguf import GGUFReader
from sinkmaps import sink_map_of
from tiny_bpe import BPE_VOCABULARY, byte_level

from sinkquant.cli import app
from sinkquant.errors import RequestError
from sinkquant.formats import quantize_to
from sinkquant.models import Decoder, load_tokenizer, open_model
from sinkquant.policy import make_plan, tensor_types
from sinkquant.recipe import Recipe

GGUF = ("backend=gguf", "weights.group_size=32", "weights.method=rtn", "weights.format=iq4_nl", "weights.ends=q8_0",
        "weights.overrides=[{pattern: '*.1.*', bits: 5}, {pattern: '*.o_proj', bits: 16}]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("types") / "model"
    tiny_model("llama", vocab_size=BPE_VOCABULARY, tie_word_embeddings=True).save_pretrained(place)
    byte_level().save_pretrained(place)
    return place


def test_every_matrix_has_the_type_and_the_bytes_of_the_file(folder: Path, tmp_path: Path) -> None:
    decoder = Decoder.of(open_model(folder))
    shape, sink_map = decoder.shape("tiny"), sink_map_of(decoder, name="tiny")
    plan = make_plan(shape, sink_map, Recipe().replace(GGUF))
    found = tensor_types(plan, shape)
    quantize_to(tmp_path / "out", open_model(folder), plan, load_tokenizer(folder))
    file = GGUFReader(tmp_path / "out" / "model.gguf")
    kinds = {one.name: one.tensor_type.name.lower() for one in file.tensors if len(one.shape) > 1}
    assert found.kinds == kinds
    assert set(kinds.values()) == {"iq4_nl", "q5_0", "q8_0", "f32"}
    assert found.most == "IQ4_NL"
    assert found.bytes == plan.weight_bytes - file.data_offset
    patterns = [line.split("=") for line in found.text().splitlines()]
    for name, kind in kinds.items():
        assert [each for pattern, each in patterns if re.search(pattern, name)] == [kind]


def test_what_rounding_alone_cannot_do_is_refused(folder: Path) -> None:
    decoder = Decoder.of(open_model(folder))
    shape, sink_map = decoder.shape("tiny"), sink_map_of(decoder, name="tiny")
    pruned = Recipe().replace([*GGUF, "weights.format=int", "weights.overrides=[]", "prune.method=magnitude"])
    with pytest.raises(RequestError, match="rounds weights and does nothing else, and the plan has pruning"):
        tensor_types(make_plan(shape, sink_map, pruned), shape)
    alone = Recipe().replace([*GGUF, "weights.ignore=['*']", "weights.overrides=[]", "kv_cache={}"])
    with pytest.raises(RequestError, match="packs no linear"):
        tensor_types(make_plan(shape, sink_map, alone), shape)


def test_a_budget_that_packs_nothing_makes_no_file(folder: Path) -> None:
    decoder = Decoder.of(open_model(folder))
    shape, sink_map = decoder.shape("tiny"), sink_map_of(decoder, name="tiny")
    for asked in ("weights.format=iq4_nl", "weights.format=int"):
        recipe = Recipe().replace([*GGUF, asked, "weights.overrides=[]", "budget.megabytes=100", "budget.solver=even"])
        with pytest.raises(RequestError, match="leaves every linear in 16 bits"):
            make_plan(shape, sink_map, recipe)


@pytest.mark.parametrize(("words", "said"), [
    (("-r", "w4a16-sink", "--tensor-types", "types.txt"), "the recipe is for compressed-tensors; use one with"),
    (("-r", "gguf-q4-sink", "--tensor-types", "types.txt", "--set", "weights.ignore=['*']"), "packs no linear"),
    (("-r", "gguf-q4-sink", "--tensor-types", "types.txt", "--set", "weights.rotate=full"),
     "does nothing else, and the recipe has weights.rotate; leave that out"),
    (("-r", "gguf-q4-sink", "--tensor-types", "nowhere/types.txt"), "nowhere/types.txt cannot be written as a file"),
    (("-r", "gguf-q4-sink", "--tensor-types", "types.txt", "--frontier"), "leave out --frontier")])
def test_the_command_refuses_before_compute(words: tuple[str, ...], said: str, folder: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["plan", str(folder), *words])
    assert done.exit_code != 0
    assert said in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_a_plan_without_types_is_kept(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    sinks = sink_map_of(Decoder.of(open_model(folder)), {"model.layers.1.mlp.down_proj": 0.9}, name="tiny")
    sinks.save(tmp_path / "sinkmap.json")
    options = {"-r": "gguf-q4-sink", "--set": "protect.channels=scale", "--sink-map": tmp_path / "sinkmap.json",
               "-o": tmp_path / "plan.json", "--tensor-types": tmp_path / "types.txt"}
    done = CliRunner().invoke(app, ["plan", str(folder), *(str(word) for pair in options.items() for word in pair)])
    assert "the plan has scale" in str(done.exception)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "sinkmap.json"}
