"""The score of a continuation that goes through the KV cache token by token."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from kv_plans import kv_plan
from transformers import PreTrainedModel

from sinkquant.artifacts.kv import KVSink
from sinkquant.cache import SinkCache, prepare
from sinkquant.errors import RequestError
from sinkquant.evaluate import Candidate, evaluate
from sinkquant.evaluate.generation import HalfCache, continuation_kl, continued_states
from sinkquant.evaluate.states import last_states
from sinkquant.recipe import Recipe

ROWS = torch.randint(8, 128, (2, 120), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_an_exact_cache_continues_as_a_whole_pass(family: str) -> None:
    model = prepare(tiny_model(family))
    whole = last_states(model, ROWS)
    found = continued_states(model, ROWS, 40, SinkCache(model.config, kv_plan(model, 16, sliding=True)))
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_what_is_measured_is_what_decoding_gives() -> None:
    """Each position by itself: the logits of a cache that has seen what stands before it."""
    base, other = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for model in (base, other):
            model.get_output_embeddings().weight.mul_(8)
    plan = kv_plan(other, 2, window=0)
    kl = continuation_kl(base, other, ROWS, 70, plan)
    cache, expected = SinkCache(other.config, plan), []
    with torch.no_grad():
        other(ROWS[:, :70], past_key_values=cache)
        for column in range(70, 120):
            q = torch.log_softmax(other(ROWS[:, column:column + 1], past_key_values=cache).logits[:, -1].double(), -1)
            p = torch.log_softmax(base(ROWS[:, :column + 1], use_cache=False).logits[:, -1].double(), -1)
            expected.append((p.exp() * (p - q)).sum(-1))
    torch.testing.assert_close(kl, torch.stack(expected, 1), rtol=1e-2, atol=1e-6)
    half = continuation_kl(base, other, ROWS, 70, None)
    assert 0 < half.mean() < 0.2 * kl.mean()


def test_rows_that_keep_different_numbers_of_dropped_sinks_are_continued_one_by_one() -> None:
    model = tiny_model("llama")
    rows = ROWS.clone()
    rows[0, 3] = 5
    rows[1, [2, 4]] = 5
    plan = kv_plan(model, 2, window=0, evict=32, exact="detected", sinks=[KVSink(token_id=5, position=None)])
    alone = [continuation_kl(model, model, row, 70, plan) for row in rows.split(1)]
    torch.testing.assert_close(continuation_kl(model, model, rows, 70, plan), torch.cat(alone))


def test_bfloat16_is_what_the_cache_holds() -> None:
    cache = HalfCache()
    keys, _ = cache.update(torch.full((1, 1, 1, 4), 1.003), torch.zeros(1, 1, 1, 4), 0)
    assert keys.dtype == torch.float32
    assert float(keys[0, 0, 0, 0]) == 1.0


def _evaluated(model: PreTrainedModel, tokenizer: object, text: object, *more: str) -> dict[str, int]:
    plan = kv_plan(model, 2)
    candidates = [Candidate("unquantized", "m", lambda: tiny_model("llama"), 1, 16.0, tasks_too=False),
                  Candidate("sink_aware", "m", lambda: prepare(tiny_model("llama")), 1, 16.0, kv=plan, tasks_too=False),
                  Candidate("weights", "m", lambda: tiny_model("llama"), 1, 16.0, tasks_too=False)]
    recipe = Recipe().replace([f"evaluate.text={text}", "evaluate.tasks=[sink_perplexity]",
                               "evaluate.divergence_rows=2",
                               "evaluate.divergence_length=32", "evaluate.generation_rows=2",
                               "evaluate.generation_prompt=64", "evaluate.limit=2", *more])
    report = evaluate(candidates, tokenizer, recipe, model="m")  # type: ignore[arg-type]
    return {row.name: row.kl_generating[-1].last if row.kl_generating else 0 for row in report.rows}


def test_rows_of_a_report_with_a_packed_cache_have_it(tiny: PreTrainedModel, tokenizer: object,
                                                      text_file: object) -> None:
    assert _evaluated(tiny, tokenizer, text_file, "evaluate.generation_tokens=40") == {
        "unquantized": 39, "sink_aware": 39, "weights": 0}
    with pytest.raises(RequestError, match="264 tokens together, and the model has positions for 256"):
        _evaluated(tiny, tokenizer, text_file, "evaluate.generation_tokens=200")
