"""lm-eval through the packed cache, and the rows of a run whose cache is packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detect_helpers import write_text
from families import tiny_model
from planter import Plant, plant
from tiny_tokenizer import random_text, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import sinkquant as sq
from sinkquant.artifacts import KVCachePlan, KVSink, Plan
from sinkquant.cache import SinkCache, cached_logits, load_prefix, make_prefix, prepare, put_in_front
from sinkquant.cache.layer import SinkLayer
from sinkquant.errors import RequestError
from sinkquant.evaluate.harness import SinkLM
from sinkquant.evaluate.states import last_states
from sinkquant.models import Decoder
from sinkquant.models.head import OutputHead
from sinkquant.policy.headers import nothing_found
from sinkquant.policy.kv_cache import make_kv_plan
from sinkquant.recipe import Recipe

SETTINGS = ["kv_cache.window=16", "kv_cache.length=128", "calibration.rows=4", "calibration.length=64",
            "detect.rows=8", "detect.long_rows=0", "detect.super_weights=false", "evaluate.tasks=[sink_perplexity]",
            "evaluate.limit=3", "evaluate.divergence_rows=4", "evaluate.divergence_length=128",
            "evaluate.bootstrap=100", "evaluate.fidelity=false"]


class _Request:
    task_name = "mine"

    def __init__(self, *arguments: object) -> None:
        self.args = arguments


def _kv(model: PreTrainedModel, bits: int) -> KVCachePlan:
    recipe = Recipe().replace(["kv_cache.window=16", f"kv_cache.key_bits={bits}", f"kv_cache.value_bits={bits}",
                               "kv_cache.exact=first-n"])
    shape = Decoder.of(model).shape("tiny")
    made = make_kv_plan(shape, nothing_found(shape), recipe)
    assert made is not None
    return made


@pytest.fixture
def pair() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return tiny_model("llama"), tiny_tokenizer()


def test_sixteen_bits_score_as_no_cache_and_two_do_not(pair: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = pair
    texts = [random_text(150, seed) for seed in range(3)]
    plain = SinkLM(tiny_model("llama"), tokenizer, True, 2)
    exact, packed = (SinkLM(model, tokenizer, True, 2, kv=_kv(model, bits)) for bits in (16, 2))
    rolling = [lm.loglikelihood_rolling([_Request(text) for text in texts]) for lm in (plain, exact, packed)]
    assert rolling[1] == pytest.approx(rolling[0], rel=1e-5)
    assert rolling[2] != pytest.approx(rolling[0], rel=1e-5)
    choices = [_Request(text, " w9 w10") for text in texts]
    scores = [lm.loglikelihood(choices) for lm in (plain, exact, packed)]
    assert [s for s, _ in scores[1]] == pytest.approx([s for s, _ in scores[0]], rel=1e-5)
    assert [s for s, _ in scores[2]] != pytest.approx([s for s, _ in scores[0]], rel=1e-5)


def test_rows_that_drop_tokens_are_scored_one_by_one(pair: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    """Each keeps other numbers of them: of the sinks, one stands in some rows only."""
    model, tokenizer = pair
    sinks = [KVSink(token_id=None, position=0), KVSink(token_id=9, position=None)]
    plan = _kv(model, 2).model_copy(update={"exact": "detected", "sinks": sinks, "max_exact": 4, "evict": 32})
    texts = [random_text(150, seed) for seed in range(3)]
    lm = SinkLM(model, tokenizer, True, 4, kv=plan)
    together = lm.loglikelihood_rolling([_Request(text) for text in texts])
    assert together == [lm.loglikelihood_rolling([_Request(text)])[0] for text in texts]
    ids = torch.tensor([[1, *lm.tok_encode(text)[:140]] for text in texts])
    fresh = prepare(tiny_model("llama"))
    with torch.no_grad():
        expected = torch.cat([cached_logits(fresh, row, plan) for row in ids.split(1)])
    assert torch.allclose(OutputHead(model).logits(last_states(model, ids, plan)[:, -1]), expected[:, -1], atol=1e-4)
    assert last_states(tiny_model("llama"), ids, plan).shape == (*ids.shape, 64)


def test_tokens_in_front_are_neither_scored_nor_generated(
        pair: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = pair
    prepare(model, make_prefix(tiny_model("llama"), [9, 1]))
    plan = _kv(model, 16).model_copy(update={"prefix": [9, 1], "front": [9]})
    lm = SinkLM(model, tokenizer, True, 2, kv=plan)
    assert lm.max_length == SinkLM(tiny_model("llama"), tokenizer, True, 2).max_length - 1
    text = random_text(60, 2)
    ids = torch.tensor([[9, 1, *lm.tok_encode(text)]])
    plain = tiny_model("llama")
    with torch.no_grad():
        found = plain(ids).logits[0].log_softmax(-1)
    expected = float(found[1:-1].gather(1, ids[0, 2:, None]).sum())
    assert lm.loglikelihood_rolling([_Request(text)])[0] == pytest.approx(expected, rel=1e-5)
    made = plain.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1]:]
    # Two prompts of two lengths: the shorter one is padded.
    requests = [_Request(text, {"until": ["nothing"], "max_gen_toks": 6}),
                _Request(random_text(90, 3), {"until": ["nothing"], "max_gen_toks": 6})]
    assert lm.generate_until(requests)[0].split() == tokenizer.decode(made, skip_special_tokens=True).split()


def test_a_run_starts_rows_from_the_found_prefix(text_file: Path, tmp_path: Path) -> None:
    plant(tiny_model("llama"), Plant(4, None, frozenset({0, 2}), 20, 1)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    text = write_text(tmp_path)
    recipe = Recipe().replace([*SETTINGS, "weights.method=rtn", "weights.group_size=32", "kv_cache.prefix=found",
                               f"calibration.text={text}", f"evaluate.text={text_file}"])
    report = sq.run(recipe, tmp_path / "model", tmp_path / "out")
    assert report is not None
    plan = Plan.load(tmp_path / "out" / "plan.json").kv_cache
    assert plan is not None
    assert (plan.prefix, plan.front) == ([4, 1], [4])
    assert load_prefix(tmp_path / "out" / "model" / "kv_prefix" / "prefix.safetensors").ids == (4, 1)
    assert all(row.tasks["divergence"]["kl"].value > 0 for row in report.rows if row.name != "unquantized")
    model, _ = sq.load(tmp_path / "out" / "model")
    ids, mask = put_in_front(torch.tensor([[1, *range(20, 90)]]), None, plan.front)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=4).shape == (1, 76)
    with pytest.raises(RequestError, match="put_in_front"):
        model.generate(ids[:, 1:], max_new_tokens=4)


def test_generation_goes_through_the_cache(pair: tuple[PreTrainedModel, PreTrainedTokenizerFast],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pair
    seen: list[int] = []
    settle = SinkLayer.settle

    def counted(layer: SinkLayer, row_starts: torch.Tensor | None = None) -> None:
        settle(layer, row_starts)
        seen.append(layer.packed_length)

    monkeypatch.setattr(SinkLayer, "settle", counted)
    requests = [_Request(random_text(100, 1), {"until": ["w127"], "max_gen_toks": 6}),
                _Request(random_text(60, 2), {"until": ["w127"], "max_gen_toks": 6})]
    exact = SinkLM(model, tokenizer, True, 2, kv=_kv(model, 16)).generate_until(requests)
    assert exact == SinkLM(tiny_model("llama"), tokenizer, True, 2).generate_until(requests)
    assert max(seen) > 0


def test_a_run_has_a_row_per_mechanism_and_loads_with_its_cache(tiny_folder: Path, text_file: Path,
                                                                 tmp_path: Path) -> None:
    recipe = Recipe().replace([*SETTINGS, "weights.method=rtn", "weights.group_size=32", "kv_cache.exact=first-n",
                               "kv_cache.prefix=bos", f"calibration.text={text_file}", f"evaluate.text={text_file}"])
    report = sq.run(recipe, tiny_folder, tmp_path / "out")
    assert report is not None
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["unquantized", "sink_aware", "control", "weights", "cache", "weights_control",
                          "cache_control"]
    assert rows["unquantized"].kv_bits == rows["weights"].kv_bits == 16
    assert rows["cache"].kv_bits == rows["sink_aware"].kv_bits < 16
    assert rows["cache"].weight_bytes == rows["unquantized"].weight_bytes
    assert rows["cache_control"].kv_bytes == pytest.approx(rows["cache"].kv_bytes, rel=0.02)
    divergence = {name: row.tasks["divergence"]["kl"].value for name, row in rows.items() if name != "unquantized"}
    assert divergence["sink_aware"] > divergence["weights"] > 0
    assert divergence["cache"] > 0
    assert "sink_perplexity" in rows["sink_aware"].tasks
    assert {("weights_control", "weights"), ("cache_control", "cache")} <= {(p.a, p.b) for p in report.paired}
    assert any(line.startswith("For the KV cache alone") for line in report.verdict.details)
    assert "KV cache: keys in 2" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert plan.kv_cache is not None
    assert plan.kv_cache.prefix == [1]
    assert (tmp_path / "out" / "model" / "kv_prefix" / "prefix.safetensors").is_file()
    assert not (tmp_path / "out" / "model-control" / "kv_prefix").exists()
    model, _ = sq.load(tmp_path / "out" / "model")
    found = model.generate(torch.full((1, 70), 9), max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(found.past_key_values, SinkCache)
    assert found.past_key_values.plan == plan.kv_cache


@pytest.mark.parametrize("evict", ["null", "32"])
def test_the_cache_alone(evict: str, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = Recipe.load("kv2-sink").replace([*SETTINGS, "kv_cache.exact=first-n", f"calibration.text={text_file}",
                                              f"evaluate.text={text_file}", f"kv_cache.evict={evict}",
                                              "kv_cache.group_size=32"])
    report = sq.run(recipe, tiny_folder, tmp_path / "out")
    assert report is not None
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["unquantized", "sink_aware", "control"]
    assert rows["sink_aware"].tasks["divergence"]["kl"].value > 0
    assert rows["control"].kv_bits == pytest.approx(rows["sink_aware"].kv_bits, rel=0.03)
