"""Embeddings and heads in 8 and 4 bits: rows looked up are those of the head's weight, near the original."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from torch import nn

from sinkquant.errors import RequestError
from sinkquant.inference import KernelLinear, round_ends
from sinkquant.inference.int4_cpu import Int4CPU
from sinkquant.inference.int4_cuda import Int4CUDA

INT4 = Int4CPU.probe()
FAR = {8: 0.01, 4: 0.1}
"""Relative error of rounding normally distributed weights."""


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [128, 90])  # whole blocks of the kernel, and rows that fill none up
def test_rows_looked_up_are_those_of_the_heads_weight(bits: int, tied: bool, tokens: int) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=tied, vocab_size=tokens)
    before = [model.get_input_embeddings().weight.detach().clone(), model.lm_head.weight.detach().clone()]
    kernels, saved = round_ends(model, INT4, bits)
    assert saved == (1 if tied else 2) * 2 * tokens * 64
    name = {8: "int8", 4: "int4"}[bits]
    assert kernels == {"model.embed_tokens": f"{name}, looked up", "lm_head": name}
    lookup, head = model.get_input_embeddings(), model.lm_head
    assert isinstance(head, KernelLinear)
    for found, original in zip((lookup.weight, head.weight), before, strict=True):
        assert (found - original).norm() < FAR[bits] * original.norm()
    assert torch.equal(lookup.weight, head.weight) == tied
    ids = torch.tensor([[0, tokens - 1, 63], [64, 65, 0]])
    assert torch.equal(lookup(ids), lookup.weight[ids])
    shared = {buffer.data_ptr() for buffer in lookup.buffers()} & {buffer.data_ptr() for buffer in head.buffers()}
    assert len(shared) == (2 if tied else 0)
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = inputs.double() @ head.weight.double().T
    assert (head(inputs).double() - expected).norm() < 2**-7 * expected.norm()


def test_four_bits_use_a_zero_where_values_have_a_mean() -> None:
    """With codes around zero alone, values of 1 +- 0.01 would be rounded to steps of an eighth."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        draw = torch.rand(embedding.weight.shape, generator=torch.Generator().manual_seed(0))
        embedding.weight.copy_(1 + 0.05 * draw)
    before = embedding.weight.detach().float()
    round_ends(model, INT4, 4)
    assert (model.get_input_embeddings().weight.float() - before).abs().max() < 0.01


def test_a_group_of_equal_values_is_kept() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = 0
        model.get_input_embeddings().weight[6] = 0.5
    round_ends(model, INT4, 4)
    assert model.get_input_embeddings().weight[5].abs().max() == 0
    assert (model.get_input_embeddings().weight[6] == 0.5).all()


def test_an_embedding_that_does_more_than_look_up_is_refused() -> None:
    class Twice(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    for bits in (8, 4):
        model = tiny_model("llama", dtype=torch.bfloat16)
        more = Twice(*model.get_input_embeddings().weight.shape, dtype=torch.bfloat16)
        model.set_input_embeddings(more)
        with pytest.raises(RequestError, match=f"head_bits={bits} does not fit model.embed_tokens: a Twice does more"):
            round_ends(model, INT4, bits)


def test_four_bits_are_refused_on_cuda() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(RequestError, match="on CUDA head_bits is 8 or 16"):
        round_ends(model, Int4CUDA(torch.device("cuda")), 4)
