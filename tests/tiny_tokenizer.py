"""A word-level tokenizer of 128 ids that fits the models of `families`, made in memory."""

from __future__ import annotations

import random
from typing import Literal

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
DELIMITERS = [".", ",", ";", "!"]
WORDS = [f"w{i}" for i in range(len(SPECIAL) + len(DELIMITERS), 128)]
"""The word "w17" has the id 17."""


def tiny_tokenizer(add_bos: Literal["none", "once", "twice"] = "once", has_bos: bool = True) -> PreTrainedTokenizerFast:
    """ids: 0 <pad>, 1 <s>, 2 </s>, 3 <unk>, 4 "." ... 7 "!", then "w8" to "w127"."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *DELIMITERS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    front = {"none": "", "once": "<s> ", "twice": "<s> <s> "}[add_bos]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{front}$A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>"} if has_bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", **special)


def with_mask_in_front() -> PreTrainedTokenizerFast:
    """One that puts `<pad></s>` in front of a text, as GLM-4's does with `[gMASK]<sop>`."""
    tokenizer = tiny_tokenizer("none")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> </s> $A", special_tokens=[("<pad>", 0), ("</s>", 2)])
    return tokenizer


def random_text(words: int = 12_000, seed: int = 0, delimiters: bool = True) -> str:
    """Words drawn evenly, a full stop after every eighth or so."""
    generator = random.Random(seed)
    pieces = []
    for _ in range(words):
        pieces.append(generator.choice(WORDS))
        if delimiters and generator.random() < 0.12:
            pieces.append(".")
    return " ".join(pieces)
