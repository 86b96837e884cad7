"""What packing the keys and values of a KV head costs: predicted beside passes through the cache itself."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from families import tiny_model
from kv_plans import kv_plan
from sinkmaps import BOS, STOP, sink_map_of
from tiny_tokenizer import random_text, tiny_tokenizer

from sinkquant import Recipe, RequestError, find_sensitivity
from sinkquant.artifacts import Channel, KVLoss, OutlierPrefix, Sensitivity
from sinkquant.cache import make_prefix, prepare
from sinkquant.cli.tables.sensitivity import cache_table, ranking_in_words
from sinkquant.models import Decoder
from sinkquant.policy.kv_cache import make_kv_plan
from sinkquant.sensitivity import find
from sinkquant.sensitivity.find import repeated
from sinkquant.sensitivity.kv import exact_places, measured_kv
from sinkquant.sensitivity.measure import divergence

KEYS = ["weights.group_size=32", "weights.method=rtn", "weights.scale_search=false", "sensitivity.rows=1",
        "sensitivity.length=8", "sensitivity.bits=[8]", "kv_cache={window: 32, group_size: 32}",
        "sensitivity.kv_bits=[2,4]", "sensitivity.kv_rows=6", "sensitivity.kv_length=96"]


CHANNEL = Channel(channel=3, peak=9.0, ratio=80.0, born="embedding", ended=None, tokens=["<s>"], profile=[9.0])


def found(tmp_path: Path, family: str, *more: str, key_bias: float = 0.0, outliers: list[int] | None = None,
          **overrides: float) -> Sensitivity:
    text = tmp_path / "words.txt"
    text.write_text(random_text(700))
    model = tiny_model(family, **({"num_hidden_layers": 2} if family == "llama" else {}), **overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
        for name, bias in model.named_parameters():
            if key_bias and name.endswith(("q_proj.bias", "k_proj.bias")):
                bias.normal_().mul_(key_bias if "k_proj" in name else 10)
    recipe = Recipe().replace([f"calibration.text={text}", *KEYS, *more])
    sink_map = sink_map_of(Decoder.of(model), tokens=(BOS, STOP), channels=(CHANNEL,)).model_copy(update={
        "depth": ["embedding"], "outlier_prefix": outliers and OutlierPrefix(
            token_ids=outliers, texts=["t"] * len(outliers), count=len(outliers), largest_ratio=9.0, layers=2)})
    return find_sensitivity(model, tiny_tokenizer(), sink_map, recipe)


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


def test_what_is_measured_is_packing_alone() -> None:
    """No tokens are dropped, and a `<bos>` that the prefix keeps exact stays so."""
    rows = torch.randint(8, 128, (1, 128), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 1

    def measured(**settings: object) -> float:
        model = tiny_model("llama", num_hidden_layers=1)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(8)
        prepare(model, make_prefix(model, [1]) if "prefix" in settings else None)
        (found,) = measured_kv(model, kv_plan(model, 2, **settings), rows, [
            KVLoss(layer=0, head=0, kind="key", bits=2, predicted=0.0)])
        assert found.measured is not None
        return found.measured

    packed, kept = measured(), measured(exact="first-n", first_n=1)
    assert measured(evict=32) == packed
    assert measured(exact="none", max_exact=0, prefix=[1]) == pytest.approx(kept, rel=1e-3)
    assert abs(packed - kept) > 0.005 * packed


def test_a_divergence_is_the_sum_over_tokens_whatever_is_in_float64_at_a_time() -> None:
    one, two = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    whole = (one.double().exp() * (one.double() - two.double())).sum()
    assert divergence(one, two) == pytest.approx(float(whole), rel=1e-5)


def test_copies_of_a_head_that_attention_reads_are_one_head(tmp_path: Path) -> None:
    made = found(tmp_path, "jetmoe", "sensitivity.measure_rows=2", "sensitivity.kv_bits=[2]", num_hidden_layers=1)
    assert [(one.head, one.kind) for one in made.kv] == [(0, "key"), (0, "value"), (1, "key"), (1, "value")]
    for one in made.kv:
        assert one.measured is not None
        assert 0.5 < one.predicted / one.measured < 2


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
    with pytest.raises(RequestError, match="no sensitivities: nothing is packed: every layer's sliding window"):
        found(tmp_path, "mistral", "kv_cache={window: 64, group_size: 32}")


def test_a_text_too_short_is_refused_before_anything_is_computed(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "estimate", None)
    short = tmp_path / "short.txt"
    short.write_text(random_text(60))
    for more, key in (([], "kv_length"), (["sensitivity.measure_rows=1", "sensitivity.measure_length=96"],
                                          "measure_length")):
        with pytest.raises(RequestError, match=f"shorter than one row.* a smaller sensitivity.{key}\\."):
            found(tmp_path, "llama", f"calibration.text={short}", *more)
    bases = ["sensitivity.kv_length=64", "kv_cache={window: 16, group_size: 32, rotate: covariance}"]
    with pytest.raises(RequestError, match=r"shorter than one row.* a smaller calibration.length\."):
        found(tmp_path, "llama", f"calibration.text={short}", *bases)


@pytest.fixture
def unpriced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed."""
    monkeypatch.setattr(find, "estimate", lambda *_: ([], []))
    monkeypatch.setattr(find, "_with_cache", lambda made, *_: made)


@pytest.mark.usefixtures("unpriced")
def test_fewer_rows_are_noted(tmp_path: Path) -> None:
    (note,) = found(tmp_path, "llama", "sensitivity.kv_rows=50").notes
    assert "rows of 96 tokens for the sensitivities of the KV cache; 50 were asked for" in note


@pytest.mark.usefixtures("unpriced")
def test_the_key_is_of_the_prefix_and_of_the_text_that_bases_are_of(tmp_path: Path) -> None:
    plain = found(tmp_path, "llama", "calibration.length=32").key
    assert found(tmp_path, "llama", "calibration.length=64").key == plain
    rotated = "kv_cache={window: 32, group_size: 32, rotate: covariance}"
    assert found(tmp_path, "llama", "calibration.length=32", rotated).key != found(
        tmp_path, "llama", "calibration.length=64", rotated).key
    keys = {found(tmp_path, "llama", "kv_cache={window: 32, group_size: 32, prefix: found}", outliers=ids).key
            for ids in ([4, 1], [7, 1])}
    assert len(keys) == 2


def test_of_massive_policies_only_massive_sinks_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinks: list[torch.Tensor] = []
    monkeypatch.setattr(find, "estimate", lambda *_: ([], []))
    monkeypatch.setattr(find, "kv_losses", lambda *_: [])
    monkeypatch.setattr(find, "exact_places", lambda rows, plan, places: sinks.append(places))
    for exact in ("detected", "massive"):
        found(tmp_path, "llama", f"kv_cache={{window: 32, group_size: 32, exact: {exact}}}",
              "sensitivity.kv_repeated=false")
    assert sinks[0].any(0)[1:].any()
    assert not sinks[1].any(0)[1:].any()
    assert sinks[1][:, 0].all()
