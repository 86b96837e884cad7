"""Detectors fill the sink map: every field once, each with what the same measure gives where nothing is."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sinkquant.artifacts import SinkMap
from sinkquant.detect.detector import text_of
from sinkquant.detect.detectors import BUILT_IN

NOT_DETECTED = {"schema_", "model", "tokenization", "thresholds", "notes", "nulls", "extensions", "shape"}


def test_every_field_of_the_sink_map_is_one_detectors() -> None:
    filled = [field for one in BUILT_IN for field in one.fields]
    assert len(filled) == len(set(filled))
    assert set(filled) == set(SinkMap.model_fields) - NOT_DETECTED
    assert all(one.null for one in BUILT_IN)


def test_a_token_that_decodes_to_nothing_by_itself_has_a_text_all_the_same() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "\u2581": 1, "a": 2}, unk_token="<unk>"))
    words.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert [text_of(token, tokenizer) for token in (1, 2, None)] == ["\u2581", "a", None]


def test_bytes_that_are_no_letter_by_themselves_are_told_apart() -> None:
    words = Tokenizer(models.BPE({"<0xE5>": 0, "<0xA4>": 1}, [], byte_fallback=True))
    words.decoder = decoders.ByteFallback()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert [text_of(token, tokenizer) for token in (0, 1)] == ["<0xE5>", "<0xA4>"]
