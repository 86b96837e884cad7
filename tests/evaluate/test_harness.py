"""SinkLM: `<bos>` exactly once at the start of every window, and log-likelihoods as a direct computation gives them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import tiny_model
from lm_eval.api.instance import Instance
from tiny_tokenizer import random_text, tiny_tokenizer
from transformers import PreTrainedModel

from sinkquant.errors import RequestError, SinkquantError
from sinkquant.evaluate import SinkLM
from sinkquant.models import encode

BOS, EOS = 1, 2
LIMIT = 96
LONG = random_text(250, seed=3)
SHORT = random_text(20, seed=4)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def rows_of(inputs: list[torch.Tensor]) -> list[list[int]]:
    """Every row that the model saw, without the zeros that pad it on the right."""
    rows = [row.tolist() for batch in inputs for row in batch]
    return [row[:max(i for i, token in enumerate(row) if token) + 1] for row in rows]


def direct(model: PreTrainedModel, context: list[int], scored: list[int]) -> float:
    """Sum of log-probabilities in float64."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = exact(torch.tensor([context + scored[:-1]]), use_cache=False).logits[0, len(context) - 1:]
    chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(scored)[:, None])
    return float(chosen.sum())


@pytest.mark.parametrize("adds", ["none", "once", "twice"])
def test_every_rolling_window_starts_with_bos_once(model: PreTrainedModel, inputs: list[torch.Tensor],
                                                    adds: Any) -> None:
    lm = SinkLM(model, tiny_tokenizer(adds), bos=True, batch_size=2)
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", (LONG,), (SHORT,), ("<s> " + SHORT,)))
    rows = rows_of(inputs)
    assert len(rows) >= 4
    assert all(row[0] == BOS and row.count(BOS) == 1 and len(row) <= LIMIT for row in rows)


@pytest.mark.parametrize("adds", ["none", "once", "twice"])
def test_without_bos_no_window_holds_one(model: PreTrainedModel, inputs: list[torch.Tensor], adds: Any) -> None:
    lm = SinkLM(model, tiny_tokenizer(adds), bos=False, batch_size=2)
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", (LONG,)))
    lm.loglikelihood(requests("loglikelihood", (SHORT, " w20"), ("", "w20 w21")))
    rows = rows_of(inputs)
    assert not any(BOS in row for row in rows)
    assert sum(row[0] == EOS for row in rows) == 2  # the first window, and the text without a context


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("has_eos", [True, False])
def test_every_token_is_scored_once(model: PreTrainedModel, bos: bool, has_eos: bool) -> None:
    tokenizer = tiny_tokenizer()
    if not has_eos:
        tokenizer.eos_token = None
    lm = SinkLM(model, tokenizer, bos=bos, batch_size=2)
    for length in (1, 2, LIMIT - 1, LIMIT, LIMIT + 1, 3 * LIMIT + 5):
        tokens = [8 + i % 100 for i in range(length)]
        windows = lm.windows(tokens)
        first_is_context = not bos and not has_eos
        assert [t for _, scored in windows for t in scored] == (tokens[1:] if first_is_context else tokens)
        assert all(len(context) + len(scored) - 1 <= LIMIT for context, scored in windows)


@pytest.mark.parametrize("bos", [True, False])
def test_rolling_likelihood_equals_a_direct_computation(model: PreTrainedModel, bos: bool) -> None:
    tokenizer = tiny_tokenizer()
    lm = SinkLM(model, tokenizer, bos=bos, batch_size=3)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (LONG,), (SHORT,), (LONG,)))
    tokens = encode(tokenizer, LONG)
    expected = 0.0
    for start in range(0, len(tokens), LIMIT):
        window = tokens[start:start + LIMIT]
        # Without <bos> the last window is filled with what stands before it, as lm-eval does it.
        room = LIMIT + 1 - len(window)
        expected += direct(model, [BOS] if bos else [EOS, *tokens][:start + 1][-room:], window)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[2] == found[0]
    assert found[1] == pytest.approx(direct(model, [BOS if bos else EOS], encode(tokenizer, SHORT)), rel=1e-5)


@pytest.mark.parametrize("adds", ["none", "once", "twice"])
def test_choices_equal_a_direct_computation(model: PreTrainedModel, inputs: list[torch.Tensor], adds: Any) -> None:
    tokenizer = tiny_tokenizer(adds)
    lm = SinkLM(model, tokenizer, bos=True, batch_size=4)
    pairs = [(SHORT, " w20 w21"), (SHORT, " w30"), (f"<s> {SHORT} ", "w30"), ("", "w40 w41")]
    found = [score for score, _ in lm.loglikelihood(requests("loglikelihood", *pairs))]
    assert all(row[0] == BOS and row.count(BOS) == 1 for row in rows_of(inputs))
    assert len(rows_of(inputs)) == 2  # the second and third are read in the first
    before = [BOS, *encode(tokenizer, SHORT)]
    expected = [direct(model, before, [20, 21]), direct(model, before, [30]), direct(model, before, [30]),
                direct(model, [BOS], [40, 41])]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_context_that_is_cut_keeps_its_bos_and_its_end(model: PreTrainedModel, inputs: list[torch.Tensor]) -> None:
    lm = SinkLM(model, tiny_tokenizer(), bos=True, batch_size=1)
    lm.loglikelihood(requests("loglikelihood", (LONG, " w20 w21")))
    (row,) = rows_of(inputs)
    tokens = encode(lm.tokenizer, LONG)
    assert len(row) == LIMIT
    assert row == [BOS, *tokens[-(LIMIT - 2):], 20]


def test_an_answer_longer_than_the_context_is_refused(model: PreTrainedModel) -> None:
    lm = SinkLM(model, tiny_tokenizer(), bos=True, batch_size=1)
    with pytest.raises(RequestError, match="leave the task out"):
        lm.loglikelihood(requests("loglikelihood", (SHORT, f" {LONG}")))


@pytest.mark.parametrize("bos", [True, False])
def test_a_batch_of_prompts_does_not_follow_its_first_string(model: PreTrainedModel, bos: bool) -> None:
    lm = SinkLM(model, tiny_tokenizer("once"), bos=bos, batch_size=3)
    ids, mask = lm.tok_batch_encode(["<s> w20 w21 w22", "w30", "<s> <s> w40 w41"] if bos else ["w20 w21", "w30"],
                                    left_truncate_len=3)
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    assert rows == ([[BOS, 21, 22], [BOS, 30], [BOS, 40, 41]] if bos else [[20, 21], [30]])
    assert mask[1, 0] == 0  # padded on the left


def test_generation_starts_with_bos(model: PreTrainedModel, inputs: list[torch.Tensor]) -> None:
    lm = SinkLM(model, tiny_tokenizer("twice"), bos=True, batch_size=2)
    settings = {"until": ["</s>"], "max_gen_toks": 3, "do_sample": False}
    texts = lm.generate_until(requests("generate_until", ("w20 w21", settings), ("<s> w30 w31 w32", settings)))
    assert len(texts) == 2
    assert inputs[0].tolist() == [[BOS, 30, 31, 32], [0, BOS, 20, 21]]


def test_a_generation_that_leaves_no_room_for_a_prompt_is_refused(model: PreTrainedModel) -> None:
    lm = SinkLM(model, tiny_tokenizer(), bos=True, batch_size=1)
    for asked in ({"max_gen_toks": lm.max_length}, {"max_new_tokens": lm.max_length + 5}):
        with pytest.raises(RequestError, match=f"reads {lm.max_length}, the prompt among them; leave it out"):
            lm.generate_until(requests("generate_until", ("w20 w21", {"until": ["</s>"], **asked})))


def test_the_callers_tokenizer_is_left_alone(model: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.unk_token = None
    tokenizer.eos_token = None
    before = len(tokenizer)
    lm = SinkLM(model, tokenizer, bos=True, batch_size=1)
    assert tokenizer.pad_token is None
    assert len(tokenizer) == len(lm.tokenizer) == before


def test_the_hub_is_not_asked_about_the_model(model: PreTrainedModel) -> None:
    assert SinkLM(model, tiny_tokenizer(), bos=True, batch_size=1).get_model_info() == {}


def test_a_tokenizer_that_ends_no_text_generates_none(model: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    lm = SinkLM(model, tokenizer, bos=True, batch_size=1)
    with pytest.raises(RequestError, match="has no token that ends one"):
        lm.generate_until(requests("generate_until", ("w20 w21", {"until": ["w9"], "max_gen_toks": 3})))


def test_a_head_of_its_own_beside_a_configuration_that_ties_it_stays_one() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    head = model.lm_head.weight
    SinkLM(model, tiny_tokenizer(), bos=True, batch_size=1)
    assert model.lm_head.weight is head
    assert "tie_weights" not in vars(model)


def test_the_window_holds_prompts_and_what_is_generated_comes_beside_it(model: PreTrainedModel,
                                                                        inputs: list[torch.Tensor]) -> None:
    lm = SinkLM(model, tiny_tokenizer(), bos=True, batch_size=1, window=32)
    for made, read in ((40, 32), (80, LIMIT - 80)):  # of 96 positions
        inputs.clear()
        lm.generate_until(requests("generate_until", (LONG, {"until": ["</s>"], "max_gen_toks": made})))
        assert inputs[0].shape == (1, read)
    assert lm.max_length == 32


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_predicts_nothing_finite_has_no_accuracy() -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(torch.inf)
    lm = SinkLM(model, tiny_tokenizer(), bos=True, batch_size=2)
    with pytest.raises(SinkquantError, match="is not finite: its weights"):
        lm.loglikelihood(requests("loglikelihood", (SHORT, " w20"), (SHORT, " w21")))
