"""Every codec: the tensors that its scheme announces, and the same weight again from them."""

from __future__ import annotations

import pytest
import torch

from sinkquant.schemes import SCHEMES, Scheme, WeightFormat, input_format
from sinkquant.schemes.codecs import CODECS, LibraryCodec, StoredWeight, codec_of, gptq
from sinkquant.schemes.tensors import tensor_bytes

CASES = [(scheme, bits) for scheme in SCHEMES for bits in scheme.bits]


def form_of(scheme: Scheme, bits: int, columns: int, inputs: str = "16-bit") -> WeightFormat:
    asked = scheme.group_for(bits) or 32
    return WeightFormat(bits, scheme.fitted(bits, asked, columns), scheme.kind, inputs,
                        None if inputs == "16-bit" else input_format(inputs).scales[-1], scheme.storage)


def stored(form: WeightFormat, weight: torch.Tensor) -> StoredWeight:
    codec = codec_of(form)
    if isinstance(codec, LibraryCodec):
        return codec.rounded(weight, form)
    fused = codec.fused_scale([weight]) if codec.scheme.fused_scale else None
    return codec.nearest(form, getattr(torch, codec.scheme.scales("float32", False)), True, fused).quantize(weight)


def test_every_scheme_has_its_codec_and_every_codec_its_scheme() -> None:
    assert [codec.scheme for codec in CODECS] == list(SCHEMES)
    assert all(codec.files.backend == codec.scheme.backend for codec in CODECS)


@pytest.mark.parametrize(("scheme", "bits"), CASES, ids=[f"{s.storage}-{s.kind}-{bits}" for s, bits in CASES])
def test_a_weight_comes_back_from_the_tensors_that_were_announced(scheme: Scheme, bits: int) -> None:
    rows, columns = 32, 256
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    for inputs in {"16-bit", *(scheme.inputs[1:2] if not scheme.foreign else ())}:
        form = form_of(scheme, bits, columns, inputs)
        made, codec = stored(form, weight), codec_of(form)
        kind = torch.float32 if form.input_scale == "group" else torch.bfloat16
        leaves = codec.leaves(made, form, torch.ones(1, dtype=kind) if form.static_inputs else None)
        announced = scheme.tensors(rows, columns, form, "float32", False)
        assert {name: (str(leaf.dtype).removeprefix("torch."), list(leaf.shape)) for name, leaf in leaves.items()
                } == announced
        assert sum(leaf.nbytes for leaf in leaves.values()) == sum(tensor_bytes(*one) for one in announced.values())
        again = codec.decode(leaves, form, (rows, columns), torch.float32)
        assert torch.equal(again, made.dequantized())
        error = (again - weight).square().mean() / weight.square().mean()
        assert error < max(8 * 0.25 ** bits, 2e-3)  # it halves with every bit; FP8 has a mantissa of 3


@pytest.mark.parametrize(("scheme", "bits"), CASES, ids=[f"{s.storage}-{s.kind}-{bits}" for s, bits in CASES])
def test_a_row_of_zeros_stays_finite(scheme: Scheme, bits: int) -> None:
    """Models are padded with such rows for engines that split them."""
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(bits))
    weight[[3, 31]] = 0
    form = form_of(scheme, bits, 256)
    made, codec = stored(form, weight), codec_of(form)
    leaves = codec.leaves(made, form, torch.ones(1) if form.static_inputs else None)
    again = codec.decode(leaves, form, (32, 256), torch.float32)
    assert again.isfinite().all()
    assert again[[3, 31]].abs().max() < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_words_are_the_same_in_pieces(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2 ** bits, (64, 37), dtype=torch.int32, generator=torch.Generator().manual_seed(bits))
    words = gptq._pack(codes, bits)
    monkeypatch.setattr(gptq, "PIECE", 200)
    assert torch.equal(gptq._pack(codes, bits), words)
    assert torch.equal(gptq._unpack(words, bits, 64), codes)
