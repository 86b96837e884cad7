"""Text -> rows of tokens in which `<bos>` stands exactly where the model expects it."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from sinkquant.artifacts import TokenizationFacts
from sinkquant.errors import RequestError
from sinkquant.models.corpus import documents

BosPolicy = Literal["auto", "always", "never"]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> Literal["none", "once", "twice"]:
    """How often the tokenizer itself puts `<bos>` in front of a plain text."""
    count = leading(tokenizer("a")["input_ids"], tokenizer.bos_token_id)
    return "none" if count == 0 else "once" if count == 1 else "twice"


def leading(ids: Sequence[int], bos: int | None) -> int:
    """How many `<bos>` stand in front of tokens; 0 where there is no such token."""
    return next((place for place, token in enumerate(ids) if bos is None or token != bos), len(ids))


def left_out(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the tokenizer puts in front of a plain text beside `<bos>`, such as GLM-4's `[gMASK]<sop>`, which rows do
    not begin with, as a sentence; None where there is nothing."""
    ids, text = list(tokenizer("a")["input_ids"]), encode(tokenizer, "a")
    before = next((ids[:start] for start in range(len(ids)) if ids[start:start + len(text)] == text), [])
    others = [token for token in before if token != tokenizer.bos_token_id]
    if not others:
        return None
    return (f"the tokenizer puts {tokenizer.decode(others)} in front of a text, as serving does; rows of detection, "
            "calibration and evaluation begin without it")


def is_delimiter(text: str) -> bool:
    """Whether a token holds no letter and no digit, nor a part of one, which decodes to the replacement character."""
    return not any(character.isalnum() or character == "\ufffd" for character in text)


def starts_with_bos(tokenizer: PreTrainedTokenizerBase, bos: BosPolicy) -> bool:
    """Whether rows start with `<bos>`: "auto" follows the tokenizer, and never puts it there twice.

    Raises:
        RequestError: "always" with a tokenizer that has no `<bos>`.
    """
    if bos == "never":
        return False
    if bos == "always":
        if tokenizer.bos_token_id is None:
            raise RequestError("calibration.bos is 'always', but the tokenizer has no <bos> token; use 'auto'.")
        return True
    return adds_bos(tokenizer) != "none"


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text without any special token that the tokenizer would add."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def token_rows(tokenizer: PreTrainedTokenizerBase, text: str, rows: int, length: int, bos: BosPolicy = "auto",
               vocabulary: int | None = None, what: str = "calibration text",
               key: str = "calibration.length") -> torch.Tensor:
    """Cut a text into rows of `length` tokens, `<bos>` counted, and take `rows` of them spread evenly over it.

    Rows do not cross documents. Only where that gives too few rows, documents that are shorter than one are packed: one
    after the other, with `</s>` between them (an empty line where the tokenizer has none). Fewer rows come back where
    the text holds fewer.

    Args:
        vocabulary: number of rows of the model's embedding; ids beyond it are refused.
        what, key: the text, and what the user sets the length by, in words of an error; "" where nobody sets it.

    Returns:
        int64 [at most rows, length].

    Raises:
        RequestError: the text is shorter than one row, or the tokenizer does not belong to the model.
    """
    front = [int(tokenizer.bos_token_id)] if starts_with_bos(tokenizer, bos) else []
    room = length - len(front)
    encoded = _encoded(tokenizer, len(tokenizer), text)
    windows = [ids[start:start + room] for ids in encoded for start in range(0, len(ids) - room + 1, room)]
    if len(windows) < rows:
        windows += _packed([ids for ids in encoded if len(ids) < room], room, _between(tokenizer))
    if not windows:
        raise RequestError(f"the {what} is shorter than one row: it has {sum(map(len, encoded))} tokens and a row "
                           f"needs {room}; give more text{key and f' or a smaller {key}'}.")
    if len(windows) > rows:
        windows = [windows[i * len(windows) // rows] for i in range(rows)]
    table = torch.tensor([[*front, *window] for window in windows], dtype=torch.long)
    if vocabulary is not None and int(table.max()) >= vocabulary:
        raise RequestError(f"the tokenizer gives the token id {int(table.max())}, but the model's embedding has only "
                           f"{vocabulary} rows; this tokenizer belongs to another model.")
    return table


@functools.lru_cache(maxsize=4)  # a run cuts its two texts into rows of several lengths
def _encoded(tokenizer: PreTrainedTokenizerBase, size: int, text: str) -> list[array[int]]:
    """The tokens of every document. size: of the tokenizer, which somebody may have added tokens to."""
    return [array("q", encode(tokenizer, document)) for document in documents(text)]


def _packed(short: list[array[int]], room: int, between: list[int]) -> list[array[int]]:
    """Documents one after the other, cut into windows."""
    stream = array("q", [token for ids in short for token in (*ids, *between)][:-len(between) or None])
    return [stream[start:start + room] for start in range(0, len(stream) - room + 1, room)]


def _between(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands between packed documents."""
    end = tokenizer.eos_token_id
    return encode(tokenizer, "\n\n") if end is None else [int(end)]


def tokenization_facts(tokenizer: PreTrainedTokenizerBase, rows: torch.Tensor) -> TokenizationFacts:
    """What the tokenizer does about `<bos>`, and what the rows of this run look like. `rows` is int64 [n, length]."""
    bos = tokenizer.bos_token_id
    return TokenizationFacts(
        bos_token_id=bos, bos_token=tokenizer.bos_token, adds_bos=adds_bos(tokenizer),
        rows_start_with_bos=bos is not None and bool((rows[:, 0] == bos).all()),
        rows=rows.shape[0], length=rows.shape[1])
