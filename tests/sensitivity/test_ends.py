"""What rounding the embedding or the head alone costs: against the model with that end rounded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import tiny_model
from sinkmaps import sink_map_of
from tiny_tokenizer import random_text, tiny_tokenizer

from sinkquant import Recipe, find_sensitivity
from sinkquant.evaluate import compare_rows
from sinkquant.models import Decoder, token_rows
from sinkquant.policy import make_plan
from sinkquant.quantize.ends import quantize_ends

SMALL = ["weights.group_size=32", "weights.method=rtn", "weights.scale_search=false", "sensitivity.rows=32",
         "sensitivity.length=24", "sensitivity.batch_size=8", "sensitivity.bits=[4]", "sensitivity.end_bits=[3,8]"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_losses_are_those_of_the_model_with_one_end_rounded(family: str, tmp_path: Path) -> None:
    """Gemma's embedding scales what it looks up."""
    text = tmp_path / "words.txt"
    text.write_text(random_text(1600))
    model = tiny_model(family, tie_word_embeddings=family == "gemma3_text")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    decoder = Decoder.of(model)
    sink_map, recipe = sink_map_of(decoder), Recipe().replace([f"calibration.text={text}", *SMALL])
    found = find_sensitivity(model, tiny_tokenizer(), sink_map, recipe)
    tied = family == "gemma3_text"
    # Bits that cost a tied model more bytes than both in 8 bits are not tried, nor is an embedding that none loads.
    assert [(end.kind, end.bits) for end in found.ends] == [("head", 8), *([] if tied else [("head", 3)]),
                                                            ("embedding", 8)]
    rows = token_rows(tiny_tokenizer(), text.read_text(), 32, 24)
    for end in found.ends:
        if tied and end.kind == "embedding":
            continue  # cannot be stored alone
        key = {"head": "lm_head", "embedding": "embeddings"}[end.kind]
        asked = recipe.replace(["sensitivity.end_bits=[]", f"weights.{key}={end.bits}", "weights.ignore=['*.1.*']"])
        rounded = copy.deepcopy(model)
        quantize_ends(Decoder.of(rounded), make_plan(decoder.shape(""), sink_map, asked))
        kl = compare_rows(model, rounded, rows).kl
        assert end.loss == pytest.approx(sum(kl) / len(kl), rel=0.02 if end.kind == "head" else 0.5), end
