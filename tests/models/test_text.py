"""Text to rows: `<bos>` stands exactly where the model expects it, whatever the tokenizer does."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import WORDS, random_text, tiny_tokenizer

from sinkquant.detect import detect
from sinkquant.errors import RequestError
from sinkquant.models import (
    BosPolicy,
    adds_bos,
    documents,
    encode,
    read_text,
    starts_with_bos,
    token_rows,
    tokenization_facts,
)
from sinkquant.models.text import is_delimiter

TEXT = random_text(600)


@pytest.mark.parametrize("added", ["none", "once", "twice"])
def test_how_often_the_tokenizer_adds_bos(added: Literal["none", "once", "twice"]) -> None:
    assert adds_bos(tiny_tokenizer(added)) == added


def test_a_tokenizer_without_bos_adds_none() -> None:
    tokenizer = tiny_tokenizer("none", has_bos=False)
    assert adds_bos(tokenizer) == "none"
    assert starts_with_bos(tokenizer, "auto") is False
    with pytest.raises(RequestError, match="no <bos> token"):
        starts_with_bos(tokenizer, "always")


@pytest.mark.parametrize(("added", "policy", "count"), [
    ("none", "auto", 0), ("once", "auto", 1), ("twice", "auto", 1),
    ("none", "always", 1), ("once", "always", 1), ("twice", "always", 1),
    ("none", "never", 0), ("once", "never", 0), ("twice", "never", 0)])
def test_rows_hold_bos_in_front_once_or_not_at_all(added: Literal["none", "once", "twice"], policy: BosPolicy,
                                                   count: int) -> None:
    tokenizer = tiny_tokenizer(added)
    rows = token_rows(tokenizer, TEXT, 5, 20, policy)
    assert rows.shape == (5, 20)
    assert (rows == 1).sum(1).tolist() == [count] * 5
    if count:
        assert (rows[:, 0] == 1).all()
    facts = tokenization_facts(tokenizer, rows)
    assert (facts.bos_token_id, facts.bos_token, facts.adds_bos) == (1, "<s>", added)
    assert (facts.rows_start_with_bos, facts.rows, facts.length) == (count == 1, 5, 20)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40), min_size=1, max_size=5),
       st.integers(1, 6), st.integers(2, 12))
def test_rows_are_windows_of_one_document_in_order(texts: list[list[str]], count: int, length: int) -> None:
    tokenizer = tiny_tokenizer()
    text = "\n<|doc|>\n".join(" ".join(words) for words in texts)
    room = length - 1
    encoded = [encode(tokenizer, " ".join(words)) for words in texts]
    windows = [ids[i:i + room] for ids in encoded for i in range(0, len(ids) - room + 1, room)]
    if len(windows) < count:  # then short documents are packed, </s> between them
        short = [token for ids in encoded if len(ids) < room for token in (*ids, 2)][:-1]
        windows += [short[i:i + room] for i in range(0, len(short) - room + 1, room)]
    if not windows:
        total = sum(map(len, encoded))
        with pytest.raises(RequestError, match=f"shorter than one row: it has {total} tokens and a row needs {room}"):
            token_rows(tokenizer, text, count, length)
        return
    rows = token_rows(tokenizer, text, count, length)
    assert rows.shape == (min(count, len(windows)), length)
    places = [windows.index(row[1:].tolist()) for row in rows]
    assert rows[0, 1:].tolist() == windows[0]
    assert all(row[1:].tolist() in windows for row in rows)
    assert places == sorted(places) or len(set(map(tuple, windows))) < len(windows)


def test_documents_shorter_than_a_row_are_packed() -> None:
    tokenizer = tiny_tokenizer()
    text = "\n<|doc|>\n".join(f"w{8 + i % 100} w9 w10" for i in range(2000))
    rows = token_rows(tokenizer, text, 8, 33)
    assert rows.shape == (8, 33)
    assert rows[0].tolist() == [1, *([t for i in range(8) for t in (8 + i, 9, 10, 2)])]
    assert (rows == 1).sum() == 8
    without_end = tiny_tokenizer()
    without_end.eos_token = None
    assert token_rows(without_end, text, 1, 7).tolist() == [[1, 8, 9, 10, 9, 9, 10]]


def test_documents_are_split_at_their_separator_only() -> None:
    assert documents("one\n<|doc|>\n\ntwo <|doc|> three\n  <|doc|>  \n\n") == ["one", "two <|doc|> three"]


def test_a_text_shorter_than_one_row_says_how_much_is_needed() -> None:
    with pytest.raises(RequestError, match=r"calibration text is shorter than one row: it has 3 tokens .* needs 19"):
        token_rows(tiny_tokenizer(), "w8 w9 w10", 5, 20)


def test_a_text_shorter_than_one_row_at_a_large_vocabulary_is_refused_by_detection(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("w8 w99 w10 " * 15, encoding="utf-8")  # 45 tokens, few of 50,000
    model = tiny_model("llama", vocab_size=50_000, num_hidden_layers=1)
    with pytest.raises(RequestError, match=r"text is shorter than one row: it has 45 tokens and a row needs 63"):
        detect(model, tiny_tokenizer(), str(path))


def test_ids_beyond_the_embedding_are_refused() -> None:
    with pytest.raises(RequestError, match=r"token id 9\d, but the model's embedding has only 64 rows"):
        token_rows(tiny_tokenizer(), "w8 w99 " * 20, 5, 20, vocabulary=64)


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n\n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(RequestError, match=r"empty\.txt is empty"):
        read_text(empty, "calibration")
    with pytest.raises(RequestError, match="is not UTF-8"):
        read_text(binary, "calibration")
    with pytest.raises(RequestError, match=r"cannot read the evaluation text .*none\.txt"):
        read_text(tmp_path / "none.txt", "evaluation")
    with pytest.raises(RequestError, match="cannot read the calibration text"):
        read_text(tmp_path, "calibration")


def test_the_packaged_texts_differ_by_split() -> None:
    calibration, evaluation = read_text(None, "calibration"), read_text(None, "evaluation")
    assert min(len(calibration), len(evaluation)) > 200_000
    assert calibration[:1000] not in evaluation


def test_rows_are_deterministic_integers() -> None:
    first, second = (token_rows(tiny_tokenizer(), TEXT, 7, 16) for _ in range(2))
    assert first.dtype == torch.int64
    assert torch.equal(first, second)


@pytest.mark.parametrize(("token", "is_one"), [(".", True), (" \n", True), ("", True), ("a", False), (" 7", False),
                                               ("\u4e2d", False), ("\ufffd", False), ("\ufffd\ufffd", False)])
def test_a_part_of_a_character_is_no_delimiter(token: str, is_one: bool) -> None:
    assert is_delimiter(token) == is_one
