"""From disk to disk: the bytes of the in-memory path, whatever interrupts it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_model
from forked import start
from interruptions import dies, killed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sinkquant as sq
from sinkquant.errors import SinkquantError
from sinkquant.formats import quantize_to, writer
from sinkquant.models import load_model, open_model
from sinkquant.quantize import quantized_blocks
from sinkquant.schemes.tensors import checkpoint_files, file_header

QUICK = ["calibration.rows=6", "calibration.length=64", "weights.group_size=32", "detect.rows=8", "detect.long_rows=0"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def recipe(text_file: Path) -> sq.Recipe:
    return sq.Recipe().replace([*QUICK, f"calibration.text={text_file}"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=True, num_hidden_layers=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sink_map(source: Path, tokenizer: PreTrainedTokenizerFast, recipe: sq.Recipe) -> sq.SinkMap:
    return sq.detect(load_model(source), tokenizer, recipe=recipe, name="tiny")


def test_detection_from_disk_finds_the_same(source: Path, tokenizer: PreTrainedTokenizerFast, recipe: sq.Recipe,
                                            sink_map: sq.SinkMap) -> None:
    assert sq.detect(open_model(source), tokenizer, recipe=recipe, name="tiny") == sink_map


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [4, 3])
def test_the_same_bytes_from_memory_and_from_disk(
        source: Path, tokenizer: PreTrainedTokenizerFast, sink_map: sq.SinkMap, recipe: sq.Recipe, method: str,
        bits: int, tmp_path: Path) -> None:
    chosen = recipe.replace([f"weights.method={method}", f"weights.bits={bits}"])
    model = load_model(source)
    plan = sq.plan(model, sink_map, chosen)
    assert sq.plan(open_model(source), sink_map, chosen) == plan
    losses = quantize_to(tmp_path / "disk", open_model(source), plan, tokenizer, sink_map, chosen)
    assert losses.keys() == plan.modules.keys()
    assert all(0 < loss < 0.1 for loss in losses.values())
    sq.save(sq.quantize(model, plan, tokenizer), tokenizer, tmp_path / "memory", sink_map, chosen)
    found = contents(tmp_path / "disk")
    assert found == contents(tmp_path / "memory")
    assert len(found["model.safetensors"]) == plan.weight_bytes
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    row = torch.arange(8, 40)[None]
    with torch.no_grad():
        assert torch.equal(plain(row).logits, model(row).logits)


def test_the_file_is_what_safetensors_would_write(source: Path, tokenizer: PreTrainedTokenizerFast, recipe: sq.Recipe,
                                                  sink_map: sq.SinkMap, tmp_path: Path) -> None:
    plan = sq.plan(open_model(source), sink_map, recipe.replace(["weights.method=rtn"]))
    quantize_to(tmp_path / "disk", open_model(source), plan, tokenizer)
    file = tmp_path / "disk" / "model.safetensors"
    save_file(load_file(file), tmp_path / "again.safetensors", {"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_checkpoint_in_several_files(source: Path, tokenizer: PreTrainedTokenizerFast, recipe: sq.Recipe,
                                       sink_map: sq.SinkMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sq.plan(open_model(source), sink_map, recipe.replace(["weights.method=rtn"]))
    quantize_to(tmp_path / "one", open_model(source), plan, tokenizer)
    monkeypatch.setattr(writer, "checkpoint_files", lambda tensors: checkpoint_files(tensors, 30_000))
    quantize_to(tmp_path / "many", open_model(source), plan, tokenizer)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many")]
    row = torch.arange(8, 40)[None]
    with torch.no_grad():
        assert torch.equal(models[0](row).logits, models[1](row).logits)


def test_tensors_fill_files_in_order() -> None:
    tensors = {f"t{i}": ("float32", [10]) for i in range(5)}
    assert [list(file) for file in checkpoint_files(tensors, 80)] == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    assert [list(file) for file in checkpoint_files(tensors, 1)] == [[name] for name in tensors]
    header = file_header(tensors)
    assert len(header) == 8 + int.from_bytes(header[:8], "little")


@pytest.fixture(scope="module")
def whole(source: Path, tokenizer: PreTrainedTokenizerFast, recipe: sq.Recipe, sink_map: sq.SinkMap,
          tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The checkpoint of a job that nothing interrupted."""
    target = tmp_path_factory.mktemp("whole") / "out"
    quantize_to(target, open_model(source), sq.plan(open_model(source), sink_map, recipe), tokenizer)
    return contents(target)


@pytest.mark.parametrize(("place", "calls", "really"), [
    ("copy_dense", 0, False), ("_write_block", 0, False), ("_write_block", 2, True), ("_remember", 3, False),
    ("write_packed", 16, True), ("write_files", 0, False), ("_check_reload", 0, False)])
def test_killed_anywhere_and_resumed_to_the_same_bytes(
        source: Path, tokenizer: PreTrainedTokenizerFast, recipe: sq.Recipe, sink_map: sq.SinkMap,
        whole: dict[str, bytes], place: str, calls: int, really: bool, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    sq.plan(open_model(source), sink_map, recipe).save(tmp_path / "plan.json")
    plan = sq.Plan.load(tmp_path / "plan.json")
    target = tmp_path / "killed"
    if really:
        program = start(tmp_path / "said", dies, source, tmp_path / "plan.json", target, place, calls)
        assert program.communicate()[0] == -signal.SIGKILL
    else:
        with killed(calls, place):
            quantize_to(target, open_model(source), plan, tokenizer)
    assert not target.exists()
    seen: list[int] = []
    if place == "write_files":  # with all blocks done no row walks any more
        monkeypatch.setattr(sys.modules[quantized_blocks.__module__], "calibrated", None)
    quantize_to(target, open_model(source), plan, tokenizer, progress=lambda done, *_: seen.append(done))
    if place == "_write_block":
        assert seen == list(range(calls + 1, 5))  # blocks that were done are not done again
    assert contents(target) == whole


def test_tuned_end_to_end_and_killed_anywhere(source: Path, tokenizer: PreTrainedTokenizerFast, recipe: sq.Recipe,
                                              sink_map: sq.SinkMap, tmp_path: Path) -> None:
    chosen = recipe.replace(["weights.distill=6", "weights.method=rtn", "weights.tune=1", "calibration.length=32",
                             "calibration.rows=4", "weights.bits=2", "weights.lm_head=4"])
    model = load_model(source)
    plan = sq.plan(model, sink_map, chosen)
    sq.save(sq.quantize(model, plan, tokenizer), tokenizer, tmp_path / "memory", sink_map, chosen)
    # In the middle of writing what was tuned, and when that is done but nothing else.
    for place, calls, again in (("_write_block", 6, 6), ("write_files", 0, 0)):
        folder = tmp_path / place
        with killed(calls, place):
            quantize_to(folder, open_model(source), plan, tokenizer, sink_map, chosen)
        said: list[str] = []
        quantize_to(folder, open_model(source), plan, tokenizer, sink_map, chosen,
                    progress=lambda *now, said=said: said.append(now[2]))
        assert said.count("tuning end to end") == again  # what is done is not done again
        assert "quantizing blocks" not in said
        assert contents(folder) == contents(tmp_path / "memory")


@pytest.mark.parametrize("more", [
    ["weights.format=nvfp4", "weights.group_size=16", "weights.distill_codes=true"],
    ["weights.format=mxfp4", "weights.group_size=32", "weights.distill_codes=true"]], ids=str)
def test_every_grid_is_tuned_on_disk_as_in_memory(source: Path, tokenizer: PreTrainedTokenizerFast, recipe: sq.Recipe,
                                                  sink_map: sq.SinkMap, more: list[str], tmp_path: Path) -> None:
    chosen = recipe.replace(["weights.distill=2", "weights.method=rtn", "calibration.length=32", "calibration.rows=4",
                             "weights.bits=4", *more])
    model = load_model(source)
    plan = sq.plan(model, sink_map, chosen)
    sq.save(sq.quantize(model, plan, tokenizer), tokenizer, tmp_path / "memory", sink_map, chosen)
    quantize_to(tmp_path / "disk", open_model(source), plan, tokenizer, sink_map, chosen)
    assert contents(tmp_path / "disk") == contents(tmp_path / "memory")


def test_a_disk_that_gives_back_something_else_is_noticed(
        source: Path, tokenizer: PreTrainedTokenizerFast, recipe: sq.Recipe, sink_map: sq.SinkMap, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sq.plan(open_model(source), sink_map, recipe.replace(["weights.method=rtn"]))
    read = writer.CheckpointWriter.read
    monkeypatch.setattr(writer.CheckpointWriter, "read", lambda self, name: read(self, name) ^ 1 if name.endswith(
        "weight_packed") else read(self, name))
    with pytest.raises(SinkquantError, match="reads back differently"):
        quantize_to(tmp_path / "out", open_model(source), plan, tokenizer)
