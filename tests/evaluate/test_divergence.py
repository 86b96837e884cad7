"""KL divergence and losses per row against a float64 reference."""

from __future__ import annotations

import copy

import pytest
import torch
from families import tiny_model
from kv_plans import kv_plan
from transformers import PreTrainedModel

from sinkquant.evaluate import compare_rows
from sinkquant.evaluate.divergence import compare_side_by_side
from sinkquant.evaluate.states import last_states
from sinkquant.models import head


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_model("llama", initializer_range=0.3), tiny_model("llama", seed=1, initializer_range=0.3)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 128, (5, 150), generator=generator)
    rows[:, 0] = 1
    return rows


def test_against_float64(pair: tuple[PreTrainedModel, PreTrainedModel], rows: torch.Tensor) -> None:
    found = compare_rows(*pair, rows, batch_size=2)
    with torch.no_grad():
        p, q = (torch.log_softmax(copy.deepcopy(model).double()(rows).logits, -1) for model in pair)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean(1).tolist(), rel=1e-4)
    assert min(found.kl) > 0.1
    for losses, reference in ((found.baseline_loss, p), (found.other_loss, q)):
        expected = -reference[:, :-1].gather(-1, rows[:, 1:, None]).squeeze(-1).mean(1)
        assert losses == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_model_does_not_diverge_from_itself(pair: tuple[PreTrainedModel, PreTrainedModel],
                                              rows: torch.Tensor) -> None:
    assert compare_rows(pair[0], pair[0], rows).kl == [0.0] * 5


@pytest.mark.parametrize("length", [2, 128, 129])
def test_lengths_around_the_chunk(pair: tuple[PreTrainedModel, PreTrainedModel], rows: torch.Tensor,
                                  length: int) -> None:
    found = compare_rows(*pair, rows[:, :length])
    with torch.no_grad():
        logits = pair[1](rows[:, :length]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].mT, rows[:, 1:length], reduction="none").mean(1)
    assert found.other_loss == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_large_vocabulary_takes_a_few_positions_at_a_time(pair: tuple[PreTrainedModel, PreTrainedModel],
                                                            rows: torch.Tensor,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compare_rows(*pair, rows).kl
    sizes: list[int] = []
    monkeypatch.setattr(head, "PIECE_VALUES", 7 * 128)
    handle = pair[0].get_output_embeddings().register_forward_hook(
        lambda _module, _args, logits: sizes.append(logits.numel()))
    assert compare_rows(*pair, rows).kl == pytest.approx(expected, rel=1e-5)
    handle.remove()
    passes = [size for size in sizes if size in (4 * 150, 150)]  # the blocks' passes, which end before the head
    assert len(passes) == 2
    assert sorted({*sizes} - {*passes}) == [3 * 128, 5 * 128, 7 * 128]


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "opt", "mixtral"])
def test_the_head_alone_gives_the_models_logits(family: str, rows: torch.Tensor) -> None:
    """Soft caps, learned positions, embeddings that are scaled: what follows the blocks is all there."""
    model = tiny_model(family, initializer_range=0.3)
    with torch.no_grad():
        expected = model(rows, use_cache=False).logits
    states = last_states(model, rows)
    assert torch.allclose(head.OutputHead(model).logits(states.flatten(0, 1)), expected.flatten(0, 1), atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(rows, use_cache=False).logits, expected)


def test_the_baseline_runs_once_for_all_models(pair: tuple[PreTrainedModel, PreTrainedModel],
                                               rows: torch.Tensor) -> None:
    base, other = pair
    batches = rows.split(2)
    states = [last_states(base, batch) for batch in batches]
    calls: list[int] = []
    handle = base.get_output_embeddings().register_forward_hook(
        lambda _module, _args, logits: calls.append(logits.shape[0]))
    plan = kv_plan(other, 2)
    found = compare_side_by_side(base, states, [(other, None), (base, None), (other, plan)], batches)
    handle.remove()
    # Of the baseline's own row there are its blocks' passes, too; the predictions of each are made once.
    assert sum(count for count in calls if count > 2) == 2 * rows.numel()
    assert found[0] == compare_rows(base, other, rows, batch_size=2)
    assert found[1].kl == [0.0] * 5
    assert found[2] == compare_rows(base, other, rows, batch_size=2, kv=plan)
    assert found[2].kl != found[0].kl
