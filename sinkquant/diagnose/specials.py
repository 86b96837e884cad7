"""Special-token strings in user text: do they become real special tokens, and on which path?

A user who can write `<bos>` or an end-of-turn marker into a prompt can plant or move a sink. A tokenizer keeps such
strings apart as text where it is asked to (`split_special_tokens=True`).
"""

from __future__ import annotations

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from sinkquant.errors import first_line

BEFORE, AFTER = "one ", " two"
PATHS = ("plain text", "plain text, split_special_tokens=True", "chat template")


def special_token_paths(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Path -> what becomes of the strings of the tokenizer's special tokens in user text."""
    specials = {str(token): int(i) for token, i in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids,
                                                       strict=True)
                if i != tokenizer.unk_token_id}  # what any unknown text becomes
    found = {}
    for path in PATHS:
        if path == "chat template" and tokenizer.chat_template is None:
            found[path] = "there is none"
            continue
        try:
            real = [text for text, token in specials.items() if _count(tokenizer, path, text, token) > 0]
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # a template is a program
            found[path] = f"does not render one user message ({first_line(error)})"
            continue
        found[path] = (f"become real special tokens: {', '.join(real)}; strip them from user text" if real
                       else "stay text")
    return found


def _count(tokenizer: PreTrainedTokenizerBase, path: str, text: str, token: int) -> int:
    """How many more of a special token there are than without its string."""
    return _ids(tokenizer, path, f"{BEFORE}{text}{AFTER}").count(token) - _ids(
        tokenizer, path, BEFORE + AFTER).count(token)


def _ids(tokenizer: PreTrainedTokenizerBase, path: str, text: str) -> list[int]:
    if path == "chat template":
        encoded: Any = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=True)
        return list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)
    split = path.endswith("True")
    return list(tokenizer(text, split_special_tokens=split)["input_ids"])
