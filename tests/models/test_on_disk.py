"""Experts that stay on disk while rows walk: the same results as with all of them in memory, one read at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_mixture, tiny_model
from torch import nn
from transformers import PreTrainedModel

from sinkquant.detect.experts import ExpertRecorder, Experts
from sinkquant.detect.modules import Modules
from sinkquant.detect.survey import Surveyor
from sinkquant.errors import RequestError
from sinkquant.models import AttentionRecord, Decoder, Step, Walk, answer, load_model, on_disk, open_model, together
from sinkquant.models.shards import StoredTensor, stored_tensors
from sinkquant.recipe import Recipe

MIXED = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any layer of experts is large."""
    monkeypatch.setattr(on_disk, "LARGE", 0)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(3))


def made(family: str, **overrides: object) -> PreTrainedModel:
    if family in FAMILIES and family not in ("mixtral", "qwen3_moe"):
        return tiny_model(family, dtype=torch.bfloat16, **overrides)
    return tiny_mixture(family, dtype=torch.bfloat16, **overrides)


def saved(family: str, folder: Path, fused: bool = False) -> Path:
    made(family).save_pretrained(folder, save_original_format=not fused)
    return folder


class Seen:
    """What somebody who watches a block sees."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.rows: list[int] = []
        self.outputs: list[torch.Tensor] = []
        self.queries = 0

    def attention(self, record: AttentionRecord) -> None:
        self.queries += record.received.shape[0]

    def look(self, step: Step) -> torch.Tensor:
        norms = [module for name, module in step.block.named_modules() if name == "post_attention_layernorm"]
        owners = [module for name, module in step.block.named_modules() if name.endswith("experts")]

        def before(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.rows.append(len(args[0]))

        def after(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self.outputs.append(output.flatten(0, -2))

        handles = [module.register_forward_pre_hook(before) for module in norms]
        handles += [module.register_forward_hook(after) for module in owners]
        try:
            return step.run()
        finally:
            for handle in handles:
                handle.remove()


def walked(model: PreTrainedModel, rows: torch.Tensor, size: int = 4) -> tuple[list[torch.Tensor], Seen]:
    decoder = Decoder.of(model)
    seen = Seen(decoder)
    return [seen.look(step) for step in Walk(decoder, rows, size, observers=[seen]).steps()], seen


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", MIXED)
def test_a_walk_gives_what_the_model_in_memory_gives(family: str, fused: bool, rows: torch.Tensor,
                                                     tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "source", fused)
    expected, theirs = walked(load_model(folder), rows)
    opened = open_model(folder)
    found, mine = walked(opened, rows)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert mine.rows == theirs.rows == [4, 2] * len(expected)  # whoever watches sees every batch once
    assert mine.queries == theirs.queries
    torch.testing.assert_close(torch.cat(mine.outputs), torch.cat(theirs.outputs), rtol=1e-4, atol=1e-5)
    assert all(parameter.is_meta for parameter in opened.parameters())
    assert not any("forward" in module.__dict__ for module in opened.modules())
    assert not mine.decoder.alone


@pytest.mark.parametrize("size", [1, 6])
def test_every_expert_is_read_once_however_many_batches_there_are(size: int, rows: torch.Tensor, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("mixtral", tmp_path / "source")
    names = {tensor.offset: name for name, tensor in stored_tensors(folder).items() if ".experts." in name}
    read: list[str] = []
    real = StoredTensor._read

    def counted(tensor: StoredTensor, start: int, count: int) -> torch.Tensor:
        if tensor.offset in names:
            read.append(names[tensor.offset])
            assert len(decoder.alone) == 0  # the expert before is gone
        return real(tensor, start, count)

    decoder = Decoder.of(open_model(folder))
    monkeypatch.setattr(StoredTensor, "_read", counted)
    for step in Walk(decoder, rows, size).steps():
        assert all(parameter.is_meta for name, parameter in step.block.named_parameters() if "experts" in name)
    assert sorted(read) == sorted(names.values())
    assert len(read) == 3 * 16 * 2  # of the 144 tokens some go to each expert


def test_walks_side_by_side_are_answered_in_one_reading(rows: torch.Tensor, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    folder, sets = saved("qwen3_moe", tmp_path / "source"), (rows, rows[:3, :9].flip(0), rows[:1])
    alone = [[step.run() for step in Walk(Decoder.of(load_model(folder)), some, 2).steps()] for some in sets]
    offsets = {tensor.offset for name, tensor in stored_tensors(folder).items() if ".experts." in name}
    read: list[int] = []
    real = StoredTensor._read
    monkeypatch.setattr(StoredTensor, "_read", lambda tensor, start, count: read.append(tensor.offset) or real(
        tensor, start, count))
    decoder = Decoder.of(open_model(folder))
    read.clear()
    for steps in together([Walk(decoder, some, 2) for some in sets]):
        answer(steps)
        for step, expected in zip(steps, alone, strict=True):
            torch.testing.assert_close(step.run(), expected[step.index], rtol=1e-4, atol=1e-5)
            assert not step.answers
    assert sorted(offset for offset in read if offset in offsets) == sorted(offsets)


def test_a_layer_that_is_small_or_asked_for_as_a_whole_is_in_memory(rows: torch.Tensor, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder.of(open_model(saved("mixtral", tmp_path / "source")))
    for step in Walk(decoder, rows, 4, whole=True).steps():
        assert not step.on_disk
        assert not any(parameter.is_meta for parameter in step.block.parameters())
    monkeypatch.setattr(on_disk, "LARGE", 16 * 3 * 32 * 64)
    assert not any(step.on_disk for step in Walk(decoder, rows, 4).steps())
    monkeypatch.setattr(on_disk, "LARGE", 16 * 3 * 32 * 64 - 1)
    assert all(step.on_disk for step in Walk(decoder, rows, 4).steps())


def test_one_batch_alone_is_computed_expert_by_expert(rows: torch.Tensor, tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path / "source")
    expected = [step.forward(step.walk.hidden[2:4]) for step in Walk(Decoder.of(load_model(folder)), rows, 4).steps()]
    found = [step.forward(step.walk.hidden[2:4]) for step in Walk(Decoder.of(open_model(folder)), rows, 4).steps()]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_was_kept_of_an_expert_is_what_it_is_from_then_on(rows: torch.Tensor, tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path / "source")
    model, name = load_model(folder), "model.layers.1.mlp.experts"
    fused = model.get_parameter(f"{name}.down_proj").data
    fused[3] *= 2
    expected = [step.run() for step in Walk(Decoder.of(model), rows, 4).steps()]
    for step in Walk(Decoder.of(open_model(folder)), rows, 4).steps():
        if step.index == 1:
            experts = step.on_disk[name]
            for kept in (False, True):  # without `keep`, what is done to it is lost
                with experts.holding(3) as one:
                    one.get_parameter("down_proj").data.mul_(2)
                    if kept:
                        experts.keep(3)
                    else:
                        assert set(step.walk.decoder.alone) == {part for part, one in experts.parts.items()
                                                                if one.index == 3}
            assert torch.equal(experts.whole("down_proj"), fused)
        found = step.run()
    torch.testing.assert_close(found, expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_broken_expert_is_named(family: str, rows: torch.Tensor, tmp_path: Path) -> None:
    model = made(family)
    model.get_parameter("model.layers.1.mlp.experts.down_proj").data[2, 3, 4] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(RequestError, match=r"layers\.1\.(mlp|block_sparse_moe)\.experts\..* holds NaN or Inf"):
        for _ in Walk(Decoder.of(open_model(tmp_path / "broken")), rows, 4).steps():
            pass


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_detection_sees_the_same_experts(family: str, rows: torch.Tensor, tmp_path: Path) -> None:
    folder, found = saved(family, tmp_path / "source"), []
    sinks = torch.zeros_like(rows, dtype=torch.bool)
    sinks[:, 0] = True
    for model in (load_model(folder), open_model(folder)):
        recorder = ExpertRecorder(Decoder.of(model))
        for step in Walk(recorder.decoder, rows, 4).steps():
            with recorder.watching(step):
                step.run()
        found.append(recorder.summary(sinks))
    assert list(found[0]) == list(found[1])
    assert found[0]
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        assert (one.tokens, one.sink_tokens) == (other.tokens, other.sink_tokens)
        for field in ("input_max", "input_max_without_sinks", "down_input_max", "down_input_max_without_sinks"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-3)


def test_a_survey_of_single_rows_counts_every_token_once_and_reads_every_expert_twice(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows = saved("qwen3_moe", tmp_path / "source"), torch.arange(3, 103).reshape(1, 100)
    offsets = {tensor.offset for name, tensor in stored_tensors(folder).items() if ".experts." in name}
    read: list[int] = []
    real = StoredTensor._read
    monkeypatch.setattr(StoredTensor, "_read", lambda tensor, start, count: read.append(tensor.offset) or real(
        tensor, start, count))
    surveys = []
    for model in (load_model(folder), open_model(folder)):
        decoder = Decoder.of(model)
        modules, experts = Modules(decoder, Recipe()), Experts(decoder, Recipe())
        surveyor = Surveyor(decoder, Recipe(), None, [modules, experts])
        read.clear()
        surveyor.run([rows[:, :40], rows], [])
        surveys.append((modules.inputs, experts.recorder))
    assert sorted(offset for offset in read if offset in offsets) == sorted([*offsets, *offsets])
    sinks = torch.zeros(rows.shape, dtype=torch.bool)
    held, apart = (recorder.summary(sinks) for _, recorder in surveys)
    for owner, one in held.items():
        assert sum(one.tokens) == 2 * 100
        assert apart[owner].tokens == one.tokens
        assert apart[owner].down_input_max == pytest.approx(one.down_input_max, rel=1e-3)
    inputs = [recorder.summary(sinks) for recorder, _ in surveys]
    for name, seen in inputs[0].items():
        assert seen.input_max == pytest.approx(inputs[1][name].input_max, rel=1e-3)
