"""A user's text as it is found: prose, or records of JSON, CSV or parquet; one file, several, or standard input.

Whatever it was, it becomes one text in which lines that are exactly `<|doc|>` stand between documents. A record is a
document: its field `text`, or its field `messages` as the model's chat template writes them.
"""

from __future__ import annotations

import csv
import datetime
import functools
import glob
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from os.path import expanduser  # pathlib's fails for a name that begins with ~ and is no user
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from sinkquant.errors import RequestError, first_line
from sinkquant.resources import demo_text

DOCUMENT_SEPARATOR = "<|doc|>"
STANDARD_INPUT, HUB = "-", "hub:"
HUB_CHARACTERS = 1 << 23
"""As much is read of a data set; its records come in their order."""
Split = Literal["calibration", "evaluation"]
TextSource = str | os.PathLike[str] | Sequence[str] | None
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstandard", b"BZh": "bzip2",
          b"\xfd7zXZ": "xz"}
WEIGHTED = re.compile(r"(.+)@(\d+(?:\.\d+)?)")
"""A text with its weight among several."""
NOW = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")
DAY = datetime.date(2024, 7, 26)
"""What chat templates write for today, so that two runs give the same bytes: the day that Llama 3.1's has."""
UNREADABLE = re.compile("[\0\ud800-\udfff]")
MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""How files begin that are no text in UTF-8."""


def read_text(path: TextSource, split: Split, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The user's text, or the packaged text of that split. What a file holds decides how it is read, not its name.

    Args:
        path: a file, a pattern of files such as `texts/*.jsonl`, `hub:` and the name or the folder of a data set, or
            `-` for standard input; several of them, in their order, each with its weight where one has any
            (`chats.jsonl@3`: three times as much as of one without); None for the packaged text.
        tokenizer: its chat template writes records of messages.

    Raises:
        RequestError: a file cannot be read, is empty, is not UTF-8, or holds data without a text in it; there are
            messages and no chat template; or a weight is zero.
    """
    sources = path if isinstance(path, list | tuple) else [path]
    weights = [_weighted(source)[1] for source in sources]
    found = []
    for source in sources or [path]:
        texts = []
        for name, content in _contents(source, split):
            what = f"the {split} text {name}"
            data = _is_data(name, content)
            text = _joined(_records(name, content, what), what, tokenizer) if data else _decoded(content, what)
            if not documents(text):
                raise RequestError(f"{what} is empty; give a file with some prose.")
            texts.append(text)
        found.append(f"\n{DOCUMENT_SEPARATOR}\n".join(texts))
    if any(weight is not None for weight in weights):
        found = _in_proportion(found, [1.0 if weight is None else weight for weight in weights])
    return f"\n{DOCUMENT_SEPARATOR}\n".join(found)


def text_digest(path: TextSource, split: Split) -> bytes:
    """A hash of what `read_text` would read."""
    digest = hashlib.sha256()
    for _, content in _contents(path, split):
        digest.update(hashlib.sha256(content).digest())
    weights = [_weighted(source)[1] for source in (path if isinstance(path, list | tuple) else ())]
    if any(weights):
        digest.update(repr(weights).encode())
    return digest.digest()


def documents(text: str) -> list[str]:
    """The documents of a text: lines that are exactly `<|doc|>` separate them and are not part of them."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if line.strip() == DOCUMENT_SEPARATOR:
            parts.append([])
        else:
            parts[-1].append(line)
    return [joined for part in parts if (joined := "".join(part).strip())]


def _weighted(source: Any) -> tuple[Any, float | None]:
    """A text and its weight; what is there under the whole name has none.

    Raises:
        RequestError: the weight is zero.
    """
    match = WEIGHTED.fullmatch(source) if isinstance(source, str) else None
    if match is None or Path(expanduser(source)).exists():
        return source, None
    if not float(match[2]):
        raise RequestError(f"the text {source} has the weight 0; leave it out.")
    return match[1], float(match[2])


def _in_proportion(texts: list[str], weights: list[float]) -> list[str]:
    """As much of every text as its weight says, and of one of them all: whole documents, evenly spread, or the
    beginning of a text that is one."""
    parts = [documents(text) for text in texts]
    sizes = [sum(map(len, one)) for one in parts]
    unit = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    shares = [unit * weight / size for size, weight in zip(sizes, weights, strict=True)]
    return [text if share >= 1 else f"\n{DOCUMENT_SEPARATOR}\n".join(_part_of(one, share))
            for text, one, share in zip(texts, parts, shares, strict=True)]


def _part_of(parts: list[str], share: float) -> list[str]:
    if len(parts) == 1:
        return [parts[0][:max(1, int(share * len(parts[0])))].rsplit(maxsplit=1)[0]]
    kept, size, seen = [], 0, 0
    for part in parts:
        seen += len(part)
        if size + len(part) / 2 <= share * seen:
            kept.append(part)
            size += len(part)
    return kept or parts[:1]


def _contents(path: TextSource, split: Split) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file, in the order that they are given, and by name where a pattern gives several."""
    path, _ = _weighted(path)
    if path is None:
        paths = [demo_text(split)]
    elif not isinstance(path, str | os.PathLike):
        if not path:
            raise RequestError(f"the {split} text is an empty list; name a file, or leave it out for the packaged one.")
        for name in path:
            yield from _contents(name, split)
        return
    elif str(path).startswith(HUB):
        yield f"{path}.jsonl", _data_set(str(path).removeprefix(HUB), split)
        return
    elif str(path) == STANDARD_INPUT:
        yield "on standard input", _standard_input()
        return
    else:
        whole = Path(expanduser(path))
        try:
            there = whole.exists()
        except OSError as error:  # a text in place of a file's name
            raise RequestError(f"cannot read the {split} text {str(path)[:40]!r}...: {error.strerror}; give a file "
                               "that holds it.") from error
        matching = [] if there else sorted(glob.glob(str(whole), recursive=True))
        paths = [Path(one) for one in matching if Path(one).is_file()] or [whole]
    for one in paths:
        try:
            content = one.read_bytes()
        except IsADirectoryError as error:
            raise RequestError(f"cannot read the {split} text {one}: it is a folder; name a file in it, or a pattern "
                               f"such as {one}/*.txt.") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RequestError(f"cannot read the {split} text {one}: {reason}.") from error
        yield str(one), content


def require_two_texts(calibration: TextSource, evaluation: TextSource) -> None:
    """Refuse standard input for both: it can be read once, and what was calibrated on proves nothing."""
    both = [text if isinstance(text, list | tuple) else [text] for text in (calibration, evaluation)]
    if all(STANDARD_INPUT in map(str, texts) for texts in both):
        raise RequestError("calibration.text and evaluate.text are both '-', and standard input can be read once; give "
                           "one of them as a file.")


def in_words(text: TextSource) -> str:
    """The name of a text of the user's own, of several by commas."""
    return str(text) if isinstance(text, str | os.PathLike) else ", ".join(text or ())


@functools.cache
def _data_set(name: str, split: Split) -> bytes:
    """The texts or messages of a data set's part `train`, or of its only one, as JSON lines; several stages read it."""
    import datasets

    lines, size = [], 0
    try:
        found = datasets.load_dataset(name, streaming=True)
        records = found["train"] if "train" in found else found[next(iter(found))]
        for record in records:
            kept = {key: record[key] for key in ("text", "messages") if key in record} or record
            lines.append(json.dumps(kept, ensure_ascii=False, default=str))
            size += len(lines[-1])
            if size >= HUB_CHARACTERS:
                break
    except Exception as error:  # the hub, the network, builders and readers each raise their own
        raise RequestError(f"the {split} text {HUB}{name} cannot be read by datasets: {first_line(error)}; give a file "
                           "instead.") from error
    return "\n".join(lines).encode()


@functools.cache
def _standard_input() -> bytes:
    """It can be read once, and is needed for every stage."""
    return sys.stdin.buffer.read()


def _decoded(content: bytes, what: str) -> str:
    for start, kind in PACKED.items():
        if content.startswith(start):
            raise RequestError(f"{what} is not text: it is packed by {kind}; unpack it first.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = next((f" (it begins as {mark} does)" for start, mark in MARKS.items() if content.startswith(start)), "")
        raise RequestError(f"{what} is not UTF-8{kind}; convert it first.") from error
    if "\0" in text:
        raise RequestError(f"{what} is not text: it holds zero bytes; give a file with some prose.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _is_data(name: str, content: bytes) -> bool:
    """Whether a file holds records, by its first bytes; by its name too where those could be prose."""
    start = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    if content.startswith(b"PAR1") or name.lower().endswith((".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv")):
        return True
    if start[:1] not in (b"{", b"["):
        return False
    first = [line for line in start.split(b"\n", 64) if line.strip()][:1 if start[:1] == b"{" else 2]
    return all(map(_parses, first)) or _parses(start)


def _parses(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _records(name: str, content: bytes, what: str) -> Sequence[Any]:
    """The records of a file of data, empty where it holds none."""
    if content.startswith(b"PAR1"):
        return _parquet(content, what)
    text = _decoded(content, what)
    if name.lower().endswith((".csv", ".tsv")):
        delimiter = "\t" if name.lower().endswith(".tsv") else ","
        limit = csv.field_size_limit(max(len(text), 1))  # a document is longer than csv's 131,072 characters
        try:
            return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        except csv.Error as error:
            raise RequestError(f"{what} is no table that can be read: {error}.") from error
        finally:
            csv.field_size_limit(limit)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return _lines(text, what)
    if isinstance(whole, dict) and not {"text", "messages"} & set(whole):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 else whole
    if isinstance(whole, dict) and isinstance(whole.get("text"), list):
        return list(whole["text"])
    return whole if isinstance(whole, list) else [whole]


def _lines(text: str, what: str) -> list[Any]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{what} is neither JSON nor JSON lines: line {number} does not parse; mend it, or "
                                   "name it .txt if it is prose.") from error
    return records


def _parquet(content: bytes, what: str) -> Sequence[Any]:
    import pyarrow.parquet  # of no use to anybody else

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        names = [name for name in ("text", "messages") if name in file.schema_arrow.names]
        table = file.read(columns=names or None)
        return list(table.to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise RequestError(f"{what} is a parquet file that cannot be read: {first_line(error)}.") from error


def _joined(records: Sequence[Any], what: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The texts of the records. Zeros and halves of surrogate pairs, which JSON can write and no tokenizer reads,
    become U+FFFD, as in other readers."""
    texts = [_text_of(record, f"{what}, record {number},", tokenizer) for number, record in enumerate(records, start=1)]
    texts = [UNREADABLE.sub("\ufffd", text) for text in texts]
    return f"\n{DOCUMENT_SEPARATOR}\n".join(text for text in texts if text.strip())


def _text_of(record: Any, what: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, Mapping):
        text, messages = record.get("text"), record.get("messages")
        if isinstance(text, str):
            return text
        if isinstance(messages, list):
            return _chat(messages, what, tokenizer)
        if "text" in record and text is None and messages is None:
            return ""
        names = ", ".join(sorted(map(str, record))[:8]) or "none"
        raise RequestError(f"{what} has no text (a string) and no messages (a list); its fields are {names}. Rename "
                           "the field that holds the text.")
    raise RequestError(f"{what} is a {type(record).__name__}, and a string or an object with the field text or "
                       "messages is needed.")


def _chat(messages: list[Any], what: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A conversation as the model reads it, without the `<bos>` that rows are given anyway, however often the template
    writes it in front."""
    if tokenizer is None or not tokenizer.chat_template:
        raise RequestError(f"{what} holds messages, and the model's tokenizer has no chat template to write them with; "
                           "give their text in the field text.")
    try:
        template = NOW.sub(lambda call: repr(DAY.strftime(call[2])), tokenizer.get_chat_template())
        text = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except Exception as error:  # a template is a program, and raises what it wants
        raise RequestError(f"{what} cannot be written by the model's chat template: {first_line(error)}.") from error
    while tokenizer.bos_token and text.lstrip().startswith(tokenizer.bos_token):
        text = text.lstrip().removeprefix(tokenizer.bos_token)
    return text
