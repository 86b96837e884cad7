"""The depth at which tokens settle: known where the last blocks do nothing, and told apart by kind of token."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from tiny_tokenizer import tiny_tokenizer

from sinkquant.diagnose.depth import drawn, settling_depth
from sinkquant.diagnose.survey import WalkSettings
from sinkquant.models import Decoder
from sinkquant.report.depth import page

ROWS = torch.randint(2, 60, (8, 40), generator=torch.Generator().manual_seed(0))
SINKS = torch.zeros_like(ROWS, dtype=torch.bool).index_fill_(1, torch.tensor([0]), True)


def decode(token: int) -> str:
    return str(tiny_tokenizer().decode([token]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_tokens_settle_after_the_last_block_that_does_something(family: str) -> None:
    """Blocks 3 and 4 of five write nothing but a little: three are needed, and by a tight bound all."""
    model = tiny_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 5})
    decoder = Decoder.of(model)
    with torch.no_grad():
        for name, linear in decoder.linears.items():
            if decoder.block_of(name) >= 3 and name.endswith(("o_proj", "down_proj", "c_proj")):
                linear.weight *= 1e-6
        if family == "gemma2":  # whose norms stand after the projections
            for block in decoder.blocks[3:]:
                for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
                    norm.weight.fill_(-1 + 1e-6)
    found = settling_depth(decoder, ROWS, SINKS, decode, WalkSettings(), bound=1e-5)
    assert found.blocks == 5
    assert [one.kind for one in found.kinds] == ["sinks", "delimiters", "others"]
    for one in found.kinds:
        assert one.depth.value == pytest.approx(3, abs=0.1)
        assert one.settled[1] < 0.1
        assert one.settled[2] > 0.95
        assert one.settled[-1] == 1
        assert one.same_top.value <= 3.2
    loose = settling_depth(decoder, ROWS, SINKS, decode, WalkSettings(), bound=100.0)
    assert all(one.depth.value == 1 for one in loose.kinds)
    html = page(found, "tiny")
    assert "sinks settle after 3.0 of 5 blocks on average" in html.replace("Sinks", "sinks")
    assert "<svg" in html


def test_kinds_of_tokens_are_told_apart() -> None:
    found = drawn(ROWS, SINKS, lambda token: "." if token == 5 else "w", 0)
    flat = ROWS.flatten()
    assert found["sinks"].tolist() == list(range(0, 320, 40))
    assert set(flat[found["delimiters"]].tolist()) == {5}
    assert len(found["delimiters"]) == int(((ROWS == 5) & ~SINKS).sum())
    assert len(found["others"]) == 256
    assert 5 not in flat[found["others"]]
