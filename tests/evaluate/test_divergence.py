"""KL divergence and losses per row against a float64 reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import tiny_model
from transformers import PreTrainedModel

from sinkquant.evaluate import compare_rows, divergence, row_divergences


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
    assert row_divergences(pair[0], pair[0], rows) == [0.0] * 5


@pytest.mark.parametrize("length", [2, 128, 129])
def test_lengths_around_the_chunk(pair: tuple[PreTrainedModel, PreTrainedModel], rows: torch.Tensor,
                                  length: int) -> None:
    found = compare_rows(*pair, rows[:, :length])
    with torch.no_grad():
        logits = pair[1](rows[:, :length]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].mT, rows[:, 1:length], reduction="none").mean(1)
    assert found.other_loss == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_large_vocabulary_runs_row_by_row(pair: tuple[PreTrainedModel, PreTrainedModel], rows: torch.Tensor,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def record(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], _kwargs: dict[str, Any]) -> None:
        sizes.append(len(args[0]))

    expected = row_divergences(*pair, rows)
    monkeypatch.setattr(divergence, "LOGITS_BYTES", 1)
    handle = pair[0].register_forward_pre_hook(record, with_kwargs=True)
    assert row_divergences(*pair, rows) == pytest.approx(expected, rel=1e-4)
    handle.remove()
    assert sizes == [1] * 5
