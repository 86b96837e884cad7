"""Weights in large pages: the same values, tied ones once, from the beginning of a page on."""

from __future__ import annotations

import copy
import mmap

import pytest
import torch
from families import tiny_model
from torch import nn

from sinkquant.inference.pages import PAGE, PART, START, LargePages, to_large_pages

ROWS = torch.arange(3, 40)[None]
needs_large_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no such request")


@needs_large_pages
def test_a_model_computes_the_same_and_what_was_tied_is() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=True).eval()
    model.register_buffer("more", torch.arange(4096.0))
    model.lm_head.register_buffer("again", model.more)
    expected, plain = model(ROWS).logits, copy.deepcopy(model)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    to_large_pages(model)
    assert torch.equal(model(ROWS).logits, expected)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.again.data_ptr() == model.more.data_ptr()
    assert all(parameter.data_ptr() != before[name] for name, parameter in model.named_parameters())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    starts = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert min(starts) % PAGE == 0
    assert all(start % START == 0 for start in starts)


@needs_large_pages
def test_a_tensor_keeps_its_mapping_and_a_large_one_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(mmap.mmap):
        def __new__(cls, *given: int, **named: int) -> Counted:
            made.append(given[1] - PAGE)
            return super().__new__(cls, *given, **named)

    monkeypatch.setattr(mmap, "mmap", Counted)
    held = LargePages()
    small = [held.copy(torch.full((1000,), index, dtype=torch.int16)) for index in range(3)]
    assert made == [PART]
    large = held.copy(torch.zeros(PART + 1, dtype=torch.int8))
    assert made == [PART, PART + 1]
    assert large.data_ptr() % PAGE == 0
    held.copy(torch.ones(8))
    assert made == [PART, PART + 1, PART]
    del held
    assert [int(tensor.float().mean()) for tensor in small] == [0, 1, 2]


def test_ordinary_pages_do_where_large_ones_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    linear = nn.Linear(64, 64)
    before, expected = linear.weight.data_ptr(), linear.weight.detach().clone()
    to_large_pages(linear)
    assert linear.weight.data_ptr() != before  # it may have been a view of a file
    assert torch.equal(linear.weight, expected)
