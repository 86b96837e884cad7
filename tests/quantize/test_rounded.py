"""Rounding reads a layer's experts from disk a few at a time, and gives what a model in memory gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_mixture
from interruptions import killed
from safetensors.torch import load_file, save_file
from sinkmaps import sink_map_of
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.artifacts import Plan
from sinkquant.errors import RequestError
from sinkquant.formats import quantize_to, save
from sinkquant.models import Decoder, load_model, open_model, pieces
from sinkquant.models.alone import in_groups
from sinkquant.models.shards import StoredTensor
from sinkquant.policy import make_plan
from sinkquant.predict import predict
from sinkquant.quantize import costs, quantize, quantized_blocks, rounded
from sinkquant.recipe import Recipe

EXPERT = 3 * 32 * 64 * 2
"""Bytes of one expert in bfloat16."""


def planned(model: PreTrainedModel, *more: str) -> Plan:
    decoder = Decoder.of(model)
    return make_plan(decoder.shape("tiny"), sink_map_of(decoder), recipe(*more))


def recipe(*more: str) -> Recipe:
    return Recipe().replace(["weights.method=rtn", "weights.group_size=32", "weights.scale_search=false", *more])


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor per expert, under names that transformers renames, in several files."""
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    tiny_mixture("mixtral", dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every reading from a checkpoint."""
    sizes: list[int] = []
    real = StoredTensor._read

    def counted(tensor: StoredTensor, start: int, count: int) -> torch.Tensor:
        sizes.append(count * tensor.dtype.itemsize)
        return real(tensor, start, count)

    monkeypatch.setattr(StoredTensor, "_read", counted)
    return sizes


def bytes_per_piece(model: PreTrainedModel, plan: Plan, read: list[int]) -> list[int]:
    """Bytes that are read for everything that is handed over by itself."""
    decoder, found = Decoder.of(model), []
    read.clear()
    for _ in quantized_blocks(decoder, plan, None, "cpu", torch.float32):
        assert not decoder.alone
        assert all(parameter.is_meta for parameter in decoder.model.parameters())
        found.append(sum(read))
        read.clear()
    return found


def test_one_expert_is_read_at_a_time_and_every_weight_once(mixtral: Path, read: list[int],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(mixtral)
    rest = sum(parameter.numel() * 2 for name, parameter in model.named_parameters()
               if name.startswith("model.layers.0.") and ".experts." not in name)
    monkeypatch.setattr(rounded, "TOGETHER", 1)
    assert bytes_per_piece(model, planned(model), read) == 2 * [rest, *[EXPERT] * 16]
    monkeypatch.setattr(rounded, "TOGETHER", 3 * 3 * 32 * 64 + 1)
    assert bytes_per_piece(model, planned(model), read) == 2 * [rest, *[3 * EXPERT] * 5, EXPERT]


def test_experts_that_stay_in_16_bits_are_copied_one_at_a_time_and_not_read_otherwise(
        mixtral: Path, read: list[int]) -> None:
    model = open_model(mixtral)
    plan = planned(model, "weights.ignore=['*layers.1.*experts*']")
    first, experts, second = bytes_per_piece(model, plan, read)
    assert (first, experts) == (second, 16 * EXPERT)
    loaded = load_model(mixtral)
    for name, parts in (("gate_up_proj", 2), ("down_proj", 1)):
        key = f"model.layers.1.mlp.experts.{name}"
        read.clear()
        copied = list(pieces(Decoder.of(model), key))
        assert set(read) == {EXPERT // 3}
        assert len(read) == 16 * parts
        assert torch.equal(torch.cat([rows for _, rows in copied]), loaded.get_parameter(key))
        assert [start for start, _ in copied] == list(range(16))


@pytest.mark.parametrize("layout", ["per expert", "without its prefix", "fused"])
@pytest.mark.parametrize("more", [[], ["weights.rotate=full"]])
def test_the_bytes_are_those_of_the_model_in_memory(mixtral: Path, layout: str, more: list[str], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch, read: list[int]) -> None:
    tokenizer, folder = tiny_tokenizer(), tmp_path / "source"
    model = load_model(mixtral)
    model.save_pretrained(folder, save_original_format=layout != "fused")
    if layout == "without its prefix":
        file = folder / "model.safetensors"
        save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    monkeypatch.setattr(rounded, "TOGETHER", 1)
    plan = planned(model, *more)
    save(quantize(model, plan, tokenizer), tokenizer, tmp_path / "memory", plan.sink_map)
    with killed(5):  # in the middle of a block
        quantize_to(tmp_path / "disk", open_model(folder), plan, tokenizer, plan.sink_map)
    quantize_to(tmp_path / "disk", open_model(folder), plan, tokenizer, plan.sink_map)
    for path in (tmp_path / "memory").iterdir():
        assert (tmp_path / "disk" / path.name).read_bytes() == path.read_bytes(), path.name
    if not more:
        assert len(bytes_per_piece(open_model(folder), plan, read)) == 2 * 17


def test_pruned_experts_that_stay_in_16_bits_are_written_as_a_whole(mixtral: Path, tmp_path: Path) -> None:
    more = ["prune.method=magnitude", "weights.ignore=['*experts*']"]
    plan, tokenizer = planned(open_model(mixtral), *more), tiny_tokenizer()
    quantize_to(tmp_path / "disk", open_model(mixtral), plan, tokenizer, plan.sink_map)
    written = load_model(tmp_path / "disk").get_parameter("model.layers.1.mlp.experts.down_proj")
    assert float((written == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_a_broken_expert_is_named(mixtral: Path, tmp_path: Path) -> None:
    model = load_model(mixtral)
    model.get_parameter("model.layers.1.mlp.experts.down_proj").data[7, 3, 4] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    opened = open_model(tmp_path / "broken")
    plan = planned(opened)
    with pytest.raises(RequestError, match=r"layers\.1\.mlp\.experts\.7\.w2\.weight holds NaN or Inf"):
        for _ in quantized_blocks(Decoder.of(opened), plan, None, "cpu", torch.float32):
            pass


def test_groups_hold_whole_experts_and_the_prediction_counts_one(mixtral: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder.of(open_model(mixtral))
    layer = {name: part for name, part in decoder.experts.items() if ".layers.0." in name}
    assert [len(group) for group in in_groups(layer, 0)] == [3] * 16
    assert [len(group) for group in in_groups(layer, 5 * 3 * 32 * 64)] == [15, 15, 15, 3]
    assert in_groups({}, 5) == []
    asked = recipe("evaluate.skip=true")
    monkeypatch.setattr(costs, "RELOADED", 0)
    together = predict(decoder, asked).peak_bytes["quantize"]
    monkeypatch.setattr(costs, "TOGETHER", 1)
    assert together - predict(decoder, asked).peak_bytes["quantize"] == 3 * (
        sum(p.numel() for p in decoder.blocks[0].mlp.experts.parameters()) - sum(
            p.numel() for n, p in decoder.blocks[0].named_parameters() if "experts" not in n))
