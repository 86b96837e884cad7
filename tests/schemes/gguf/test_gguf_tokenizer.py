"""Tokenizers in llama.cpp's words: kinds of tokens, scores, how text is split, the chat template."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from tiny_bpe import BPE_VOCABULARY, byte_fallback, byte_level
from tiny_tokenizer import tiny_tokenizer
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from sinkquant.errors import RequestError
from sinkquant.schemes.gguf.tokenizer import SPLITS, tokenizer_metadata


def metadata(place: Path, tokenizer: object, rows: int = BPE_VOCABULARY) -> dict[str, object]:
    tokenizer.save_pretrained(place)  # type: ignore[attr-defined]
    return {key.removeprefix("tokenizer.ggml."): value for key, (_, value) in tokenizer_metadata(place, rows).items()}


@pytest.mark.parametrize(("split", "digits", "name"), [
    (None, False, "gpt-2"), (None, True, "smollm"), (next(iter(SPLITS)), False, None),
    (list(SPLITS)[1], False, "qwen2")])
def test_bytes(split: str | None, digits: bool, name: str | None, tmp_path: Path) -> None:
    tokenizer = byte_level(split, digits)
    if name is None:  # Llama 3's takes whole words as they stand
        with pytest.raises(RequestError, match="splits text in a way that has no name"):
            metadata(tmp_path, tokenizer)
        path = tmp_path / "tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["ignore_merges"] = True
        path.write_text(json.dumps(content))
        assert tokenizer_metadata(tmp_path, BPE_VOCABULARY)["tokenizer.ggml.pre"] == ("str", "llama-bpe")
        return
    found = metadata(tmp_path, tokenizer)
    assert (found["model"], found["pre"], found["add_bos_token"]) == ("gpt2", name, True)
    tokens, types = found["tokens"], found["token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert tokens[:len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert types[:4] == [3, 3, 3, 1]
    assert (tokens[-1], types[-1]) == (f"[PAD{BPE_VOCABULARY - 1}]", 5)
    assert [found[f"{key}_token_id"] for key in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert "t h" in str(found["merges"])
    assert found["tokenizer.chat_template"] == tokenizer.chat_template


def test_byte_fallback_scores_by_the_order_of_merges(tmp_path: Path) -> None:
    found = metadata(tmp_path, byte_fallback(), 400)
    assert (found["model"], found["add_space_prefix"]) == ("llama", True)
    tokens, scores, types = found["tokens"], found["scores"], found["token_type"]
    assert isinstance(tokens, list)
    assert isinstance(scores, list)
    assert isinstance(types, list)
    score = dict(zip(tokens, scores, strict=True))
    assert score["th"] == 0 > score["the"] > score["an"] > score["a"]
    assert types[:4] == [2, 3, 3, 6]


def test_what_no_file_can_say(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is a WordLevel, and GGUF files are written with BPE alone"):
        metadata(tmp_path / "words", tiny_tokenizer())
    with pytest.raises(RequestError, match="gives the id 282, and the model has 100 embeddings"):
        metadata(tmp_path / "more", byte_level(), 100)
    with pytest.raises(RequestError, match=r"\(known: gpt-2, smollm, llama-bpe, qwen2, tekken\)"):
        metadata(tmp_path / "other", byte_level(r"\s+"))
    assert metadata(tmp_path / "none", byte_level(bos=False))["add_bos_token"] is False


@pytest.mark.parametrize(("normalizer", "bytes_too", "spaces_too"), [
    (normalizers.NFC(), True, True), (normalizers.Sequence([]), True, True), (normalizers.Lowercase(), False, False),
    (normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), False, False),
    (normalizers.Replace(" ", "\u2581"), False, True), (normalizers.Prepend("\u2581"), False, True),
    (normalizers.Replace("a", "b"), False, False)])
def test_what_changes_text_before_it_is_split(normalizer: normalizers.Normalizer, bytes_too: bool, spaces_too: bool,
                                              tmp_path: Path) -> None:
    for made, fits in ((byte_level(), bytes_too), (byte_fallback(), spaces_too)):
        made.backend_tokenizer.normalizer = normalizer
        with nullcontext() if fits else pytest.raises(RequestError, match=r"changes text by .* before it splits it"):
            metadata(tmp_path / str(fits), made, 400)


@pytest.mark.parametrize(("steps", "space"), [
    ([], False), ([pre_tokenizers.Split(" ", "merged_with_previous")], False),
    ([pre_tokenizers.Metaspace(prepend_scheme="never")], False), ([pre_tokenizers.Metaspace()], True),
    ([pre_tokenizers.Metaspace(prepend_scheme="first", split=False)], True),
    ([pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first")])], True),
    ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Metaspace(prepend_scheme="first")], None),
    ([pre_tokenizers.Metaspace(replacement="_")], None), ([pre_tokenizers.Split(" ", "isolated")], None)])
def test_sentencepiece_splits_at_spaces_alone(steps: list[pre_tokenizers.PreTokenizer], space: bool | None,
                                              tmp_path: Path) -> None:
    tokenizer = byte_fallback()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if space is None:
        with pytest.raises(RequestError, match="splits text in a way that has no name in GGUF files here"):
            metadata(tmp_path, tokenizer, 400)
    else:
        assert metadata(tmp_path, tokenizer, 400)["add_space_prefix"] is space


@pytest.mark.parametrize(("single", "eos", "found"), [
    ("<s> $A", "</s>", (False, 2, None)), ("<s> $A </s>", "</s>", (True, 2, None)), ("$A <unk>", "</s>", (True, 0, 2)),
    ("$A <unk>", None, (True, 0, None)), ("$A", None, (False, None, None))])
def test_what_every_row_ends_with(single: str, eos: str | None, found: tuple[bool, int | None, int | None],
                                  tmp_path: Path) -> None:
    """Qwen3-Embedding's rows end in another token than its turns."""
    tokenizer = byte_level()
    tokenizer.eos_token = eos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<unk>", 0), ("<s>", 1), ("</s>", 2)])
    made = metadata(tmp_path, tokenizer)
    assert (made["add_eos_token"], made.get("eos_token_id"), made.get("eot_token_id")) == found


def test_added_runs_of_spaces_are_spaces_and_what_has_no_row_is_left_out(tmp_path: Path) -> None:
    """Gemma's added tokens for indented text: llama.cpp would print the marks of sentencepiece. Its image token stands
    behind the last row of models that read text alone."""
    tokenizer = byte_fallback()
    tokenizer.add_tokens([AddedToken(count * "\u2581", normalized=False) for count in (2, 3)])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    rows = len(tokenizer) - 1
    found = metadata(tmp_path, tokenizer, rows)
    tokens, types = found["tokens"], found["token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert len(tokens) == rows
    assert list(zip(tokens[-2:], types[-2:], strict=True)) == [("  ", 4), ("   ", 4)]
    assert any(token.startswith("\u2581") for token, kind in zip(tokens, types, strict=True) if kind == 1)


def test_an_end_of_text_without_a_row_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_fallback()
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    with pytest.raises(RequestError, match="they do not belong together"):
        metadata(tmp_path, tokenizer, len(tokenizer) - 1)
