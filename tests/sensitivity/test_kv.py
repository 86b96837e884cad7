"""What packing the keys and values of a KV head costs: predicted beside passes through the cache itself."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from families import tiny_model
from sinkmaps import BOS, sink_map_of
from tiny_tokenizer import random_text, tiny_tokenizer

from sinkquant import Recipe, RequestError, find_sensitivity
from sinkquant.artifacts import Sensitivity
from sinkquant.cli.tables.sensitivity import cache_table, ranking_in_words
from sinkquant.models import Decoder
from sinkquant.policy.kv_cache import make_kv_plan
from sinkquant.sensitivity import find
from sinkquant.sensitivity.find import repeated
from sinkquant.sensitivity.kv import exact_places

KEYS = ["weights.group_size=32", "weights.method=rtn", "weights.scale_search=false", "sensitivity.rows=1",
        "sensitivity.length=8", "sensitivity.bits=[8]", "kv_cache={window: 32, group_size: 32}",
        "sensitivity.kv_bits=[2,4]", "sensitivity.kv_rows=6", "sensitivity.kv_length=96"]


def found(tmp_path: Path, family: str, *more: str, key_bias: float = 0.0, **overrides: float) -> Sensitivity:
    text = tmp_path / "words.txt"
    text.write_text(random_text(700))
    model = tiny_model(family, **({"num_hidden_layers": 2} if family == "llama" else {}), **overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
        for name, bias in model.named_parameters():
            if key_bias and name.endswith(("q_proj.bias", "k_proj.bias")):
                bias.normal_().mul_(key_bias if "k_proj" in name else 10)
    recipe = Recipe().replace([f"calibration.text={text}", *KEYS, *more])
    return find_sensitivity(model, tiny_tokenizer(), sink_map_of(Decoder.of(model)), recipe)


def test_predicted_losses_rank_like_measured_ones(tmp_path: Path) -> None:
    made = found(tmp_path, "llama", "sensitivity.measure_rows=2")
    assert len(made.kv) == 2 * 2 * 2 * 2
    assert {(one.layer, one.head, one.kind, one.bits) for one in made.kv} == {
        (layer, head, kind, bits) for layer in range(2) for head in range(2) for kind in ("key", "value")
        for bits in (2, 4)}
    assert made.kv_ranking is not None
    assert made.kv_ranking > 0.9
    ratio = sum(one.predicted for one in made.kv) / sum(one.measured for one in made.kv if one.measured is not None)
    assert 0.5 < ratio < 2
    assert all(one.sink_score == 0.5 and not one.no_op for one in made.kv)
    assert "of the KV cache over 16 formats" in ranking_in_words(made)[-1]
    assert cache_table(made).row_count == 8


def test_repeated_rows_have_losses_of_their_own(tmp_path: Path) -> None:
    made = found(tmp_path, "llama")
    assert all(one.repeated is not None and one.repeated > 0 for one in made.kv)
    assert [one.repeated for one in made.kv] != [one.predicted for one in made.kv]
    alone = found(tmp_path, "llama", "sensitivity.kv_repeated=false")
    assert [one.predicted for one in alone.kv] == [one.predicted for one in made.kv]
    assert all(one.repeated is None and one.weighed == one.predicted for one in alone.kv)


@pytest.mark.parametrize("bos", [True, False])
def test_the_second_half_repeats_the_first_behind_one_bos(bos: bool) -> None:
    rows = torch.arange(20).view(2, 10)
    again = repeated(rows, bos)
    assert again.shape[1] in (9, 10)
    assert torch.equal(again[:, :bos], rows[:, :bos])
    one, two = again[:, bos:].chunk(2, dim=1)
    assert torch.equal(one, two)
    assert torch.equal(one, rows[:, bos:bos + one.shape[1]])


def test_no_graph_waits_for_the_garbage_collector(tmp_path: Path) -> None:
    """Attention of long rows takes gigabytes: what held a batch's until a collection held that of all blocks."""
    gc.collect()
    gc.disable()
    try:
        found(tmp_path, "llama")
        left = [one.shape for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.dim() == 4]
    finally:
        gc.enable()
    assert not [shape for shape in left if shape[2] in (95, 96)]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_oss"])
def test_other_attentions_have_losses_too(family: str, tmp_path: Path) -> None:
    made = found(tmp_path, family)
    assert made.kv
    coarse, fine = ([one.predicted for one in made.kv if one.bits == bits] for bits in (2, 4))
    assert all(a > b > 0 for a, b in zip(coarse, fine, strict=True))


def test_a_score_that_is_capped_changes_less(tmp_path: Path) -> None:
    made = found(tmp_path, "gemma2", "sensitivity.measure_rows=2", "sensitivity.kv_bits=[2]",
                 attn_logit_softcapping=0.02)
    keys = [one for one in made.kv if one.kind == "key"]
    ratio = sum(one.predicted for one in keys) / sum(one.measured for one in keys if one.measured is not None)
    assert 0.4 < ratio < 2.5  # 3.6 where the cap is left out


def test_exact_tokens_are_those_of_the_cache() -> None:
    decoder = Decoder.of(tiny_model("llama"))
    rows = torch.tensor([[1, 9, 4, 9, 4, 4], [9, 9, 4, 9, 9, 9]])
    sinks = torch.tensor([[1, 0, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0]]).bool()

    def places(settings: str) -> list[list[int]]:
        plan = make_kv_plan(decoder.shape("x"), sink_map_of(decoder, tokens=(BOS,)),
                            Recipe().replace([f"kv_cache={settings}"]))
        assert plan is not None
        return exact_places(rows, plan, sinks).int().tolist()

    assert places("{max_exact: 2}") == [[1, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert places("{exact: first-n, first_n: 2}") == [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert places("{exact: none, prefix: bos}") == [[1, 0, 0, 0, 0, 0], [0] * 6]


def test_keys_that_err_by_much_have_finite_losses(tmp_path: Path) -> None:
    """As Qwen2's do by their biases: exp of the change of a score is beyond float32."""
    made = found(tmp_path, "qwen2", "sensitivity.kv_bits=[1]", "sensitivity.kv_rows=1", key_bias=100.0)
    assert 0 < sum(loss.predicted for loss in made.kv) < float("inf")


def test_what_nothing_is_packed_of_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "estimate", None)  # before anything is computed
    with pytest.raises(RequestError, match="nothing of a row of 96 tokens is packed"):
        found(tmp_path, "llama", "kv_cache={window: 90, group_size: 32}")
    with pytest.raises(RequestError, match="the recipe has no section kv_cache"):
        found(tmp_path, "llama", "kv_cache=null")
