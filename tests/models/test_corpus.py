"""Texts as people have them: whatever a file holds, its documents come out, or one sentence says why not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from sinkquant.errors import RequestError
from sinkquant.models import corpus, documents, read_text, token_rows
from sinkquant.recipe import Recipe
from sinkquant.run import run

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
RECORDS = [{"text": "w8 w9", "id": 1}, {"text": "", "id": 2}, {"text": "w10\nw11", "id": 3}]
FOUND = ["w8 w9", "w10\nw11"]


def chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet(path: Path, records: list[dict[str, object]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def lines(records: list[object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", lines(RECORDS)), ("a.txt", lines(RECORDS)), ("bare", lines(RECORDS)),
    ("crlf.jsonl", lines(RECORDS).replace("\n", "\r\n")), ("marked.jsonl", "\ufeff" + lines(RECORDS)),
    ("list.json", json.dumps(RECORDS, indent=1)), ("data.json", json.dumps({"version": 1, "data": RECORDS})),
    ("strings.json", json.dumps(FOUND)), ("columns.json", json.dumps({"text": FOUND})),
    ("table.csv", 'id,text\n1,w8 w9\n2,\n3,"w10\nw11"\n'), ("table.tsv", 'id\ttext\n1\tw8 w9\n3\t"w10\nw11"\n'),
    ("prose.txt", "w8 w9\r\n<|doc|>\r\nw10\r\nw11\r\n"), ("marked.txt", "\ufeffw8 w9\n<|doc|>\nw10\nw11")])
def test_whatever_holds_the_documents_they_are_the_same(tmp_path: Path, name: str, content: str) -> None:
    assert documents(read_text(written(tmp_path / name, content), "calibration")) == FOUND


def test_parquet_is_read_by_its_text(tmp_path: Path) -> None:
    records = [{"id": 1, "text": "w8 w9"}, {"id": 2, "text": None}, {"id": 3, "text": "w10\nw11"}]
    assert documents(read_text(parquet(tmp_path / "a.parquet", records), "calibration")) == FOUND
    other = parquet(tmp_path / "b.parquet", [{"prompt": "w8"}])
    with pytest.raises(RequestError, match=r"record 1, has no text .* its fields are prompt"):
        read_text(other, "calibration")
    broken = written(tmp_path / "c.parquet", (tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(RequestError, match=r"c\.parquet is a parquet file that cannot be read"):
        read_text(broken, "calibration")


def test_messages_are_written_by_the_chat_template_without_its_bos(tmp_path: Path) -> None:
    records = [{"messages": [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": "w9"}]}
               for i in range(10, 50)]
    expected = [f"user: w{i} w{i + 1}\nassistant: w9" for i in range(10, 50)]
    for path in (written(tmp_path / "a.jsonl", lines(list(records))), parquet(tmp_path / "a.parquet", list(records))):
        text = read_text(path, "calibration", chat_tokenizer())
        assert documents(text) == expected
        rows = token_rows(chat_tokenizer(), text, 4, 16)
        assert rows.shape == (4, 16)
        assert (rows == 1).sum(1).tolist() == [1] * 4
        with pytest.raises(RequestError, match="record 1, holds messages, and the model's tokenizer has no chat templ"):
            read_text(path, "calibration", tiny_tokenizer())
    twice = chat_tokenizer()
    twice.chat_template = "{{ bos_token }} {{ bos_token }}" + TEMPLATE
    assert documents(read_text(tmp_path / "a.jsonl", "calibration", twice)) == expected
    twice.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + TEMPLATE  # no day of the run stands in the text
    assert documents(read_text(tmp_path / "a.jsonl", "calibration", twice))[0].startswith("26 Jul 2024")
    refusing = tiny_tokenizer()
    refusing.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="cannot be written by the model's chat template: roles must alternate"):
        read_text(tmp_path / "a.jsonl", "calibration", refusing)


def test_texts_stand_in_the_proportion_of_their_weights(tmp_path: Path) -> None:
    chats = written(tmp_path / "chats.jsonl", lines([{"text": f"w{i} w{i}"} for i in range(10, 90)]))
    prose = written(tmp_path / "prose.txt", "w99 " * 400)
    odd = written(tmp_path / "odd@2", "w20 w21")
    text = read_text([f"{chats}@3", str(prose)], "calibration")
    assert text.count("w99") == pytest.approx(80 * 7 / 4 / 3, abs=1)  # all of the chats, a third as much prose
    assert len(documents(text)) == 81
    text = read_text([f"{chats}@0.5", f"{prose}@2"], "calibration")
    assert text.count("w99") == 400
    kept = documents(text)[:-1]
    assert len(kept) == pytest.approx(400 * 4 / 4 / 7, abs=1)
    assert (kept[0] < "w14", kept[-1] > "w85") == (True, True)  # from all over the set
    assert documents(read_text(str(odd), "calibration")) == ["w20 w21"]
    assert read_text([str(chats), str(prose)], "calibration").count("w99") == 400
    assert corpus.text_digest([f"{chats}@3", str(prose)], "calibration") != corpus.text_digest(
        [str(chats), str(prose)], "calibration")
    with pytest.raises(RequestError, match=r"prose\.txt@0 has the weight 0; leave it out"):
        read_text([str(chats), f"{prose}@0"], "calibration")


def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "b.jsonl", lines(RECORDS))
    written(tmp_path / "a.txt", "w20")
    written(tmp_path / "set [1].txt", "w30")
    assert documents(read_text(f"{tmp_path}/[ab].*", "calibration")) == ["w20", *FOUND]
    assert documents(read_text(tmp_path / "set [1].txt", "calibration")) == ["w30"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents(read_text("~/a.txt", "calibration")) == ["w20"]
    with pytest.raises(RequestError, match=r"cannot read the calibration text .*/none\*: "):
        read_text(tmp_path / "none*", "calibration")


def test_standard_input_is_read_once_for_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus._standard_input.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines(RECORDS).encode())))
    for _ in range(2):
        assert documents(read_text("-", "calibration")) == FOUND
    corpus._standard_input.cache_clear()


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.jsonl", lines([{"prompt": "x", "answer": "y"}]), "record 1, has no text .* its fields are answer, prompt"),
    ("a.txt", lines([{"text": "w8"}, {"text": 3}]), "record 2, has no text"),
    ("a.txt", lines([{"text": "w8"}]) + "{broken\n", "neither JSON nor JSON lines: line 2 does not parse"),
    ("a.jsonl", lines([{"text": "w8"}]) + "{broken\n", "neither JSON nor JSON lines: line 2 does not parse"),
    ("a.json", "prose after all", "line 1 does not parse"), ("a.json", "[3]", "record 1, is a int"),
    ("a.json", "[]", "is empty"), ("a.jsonl", "", "is empty"), ("a.txt", "[" * 100_000, None),
    ("a.csv", "prompt,answer\nx,y\n", "its fields are answer, prompt"),
    ("a.txt", "[1]\nw8 w9", None), ("a.txt", "w8".encode("utf-16"), "is not UTF-8 .it begins as UTF-16 does"),
    ("a.txt", "naïve".encode("latin-1"), "is not UTF-8"), ("a.txt", b"w8 \0 w9", "it holds zero bytes"),
    ("a.txt.gz", gzip.compress(b"w8 w9", mtime=0), "packed by gzip")])
def test_what_holds_no_text_is_said(tmp_path: Path, name: str, content: str | bytes, said: str | None) -> None:
    path = written(tmp_path / name, content)
    if said is None:
        assert documents(read_text(path, "calibration")) == [content]
        return
    with pytest.raises(RequestError, match=said) as caught:
        read_text(path, "calibration")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_digest_is_of_what_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "w8")
    before = corpus.text_digest(path, "calibration")
    assert corpus.text_digest(None, "calibration") != corpus.text_digest(None, "evaluation")
    written(path, "w9")
    assert corpus.text_digest(path, "calibration") != before


def test_several_texts_are_read_in_their_order_and_counted_into_one_digest(tmp_path: Path) -> None:
    first, second = tmp_path / "b.txt", tmp_path / "a.jsonl"
    first.write_text("one", encoding="utf-8")
    second.write_text('{"text": "two"}\n{"text": "three"}\n', encoding="utf-8")
    given = [str(first), str(second)]
    assert documents(read_text(given, "calibration")) == ["one", "two", "three"]
    assert documents(read_text(given[::-1], "calibration")) == ["two", "three", "one"]
    digests = {corpus.text_digest(one, "calibration") for one in (given, given[::-1], given[0])}
    assert len(digests) == 3
    with pytest.raises(RequestError, match="is an empty list"):
        read_text([], "calibration")
    assert Recipe.parse({"calibration": {"text": given}}).calibration.text == given
    assert Recipe().replace([f"calibration.text={first}"]).calibration.text == str(first)


def test_a_data_set_is_read_by_its_name_or_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [json.dumps({"id": i, "text": f"record {i}"}) for i in range(3)]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert documents(read_text(f"hub:{folder}", "calibration")) == ["record 0", "record 1", "record 2"]
    (folder / "train.jsonl").unlink()  # a run reads it at several stages, and streams it once
    assert len(documents(read_text(f"hub:{folder}", "calibration"))) == 3
    with pytest.raises(RequestError, match=r"hub:.*nowhere cannot be read by datasets: .*; give a file instead\."):
        read_text(f"hub:{tmp_path / 'nowhere'}", "calibration")


def test_standard_input_is_not_read_for_both_texts(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="both '-', and standard input can be read once"):
        run(Recipe().replace(["calibration.text=-", "evaluate.text=-"]), "demo", tmp_path / "out")


def test_a_long_document_in_a_table_is_read(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = written(tmp_path / "a.csv", "text\n" + "w8 " * 50_000 + "\nw9\n")
    assert [len(one) for one in documents(read_text(path, "calibration"))] == [3 * 50_000 - 1, 2]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("text", ["w8 " * 1000, "w8 " * 200 + "and/or w9", "\u4e2d" * 200])
def test_a_text_in_place_of_a_file_is_said_in_short(text: str) -> None:
    with pytest.raises(RequestError, match="File name too long; give a file that holds it") as caught:
        read_text(text, "calibration")
    assert len(str(caught.value)) < 200


def test_a_table_with_texts_and_messages_is_read_as_its_records_are(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    records = [{"text": "w8 w9", "messages": None},
               {"text": None, "messages": [{"role": "user", "content": "w10 w11"}]}]
    lines = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    table = parquet(tmp_path / "a.parquet", records)
    for place in (lines, table):
        assert documents(read_text(place, "calibration", tokenizer)) == ["w8 w9", "w10 w11"]


def test_what_json_writes_and_no_tokenizer_reads(tmp_path: Path) -> None:
    half = written(tmp_path / "a.jsonl", '{"text": "w8 \\ud83d w9"}')
    assert documents(read_text(half, "calibration")) == ["w8 \ufffd w9"]
    whole = written(tmp_path / "b.jsonl", '{"text": "w8 \\ud83d\\ude00 w9"}')
    assert documents(read_text(whole, "calibration")) == ["w8 \U0001f600 w9"]
    zero = written(tmp_path / "c.jsonl", '{"text": "w8 \\u0000 w9"}')
    assert documents(read_text(zero, "calibration")) == ["w8 \ufffd w9"]


def test_a_name_that_begins_like_a_home_folder_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "~notes.txt", "w8 w9")
    assert documents(read_text("~notes.txt", "calibration")) == ["w8 w9"]
    with pytest.raises(RequestError, match="No such file"):
        read_text("~nobody/notes.txt", "calibration")
