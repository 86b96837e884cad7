"""Cuts the demo's calibration and evaluation text out of a corpus: passages spread evenly over all of its books.

    python evals/demo_model/excerpts.py CORPUS OUTPUT

CORPUS holds train.txt.xz and test.txt.xz, documents separated by a line `<|doc|>`, one paragraph a line.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

SEPARATOR = "<|doc|>"
SIZE = 300_000
PASSAGE = 9_000


def passages(text: str, size: int = SIZE, passage: int = PASSAGE) -> str:
    """About `size` characters of `text` in passages of whole paragraphs, separated as the documents are."""
    books = [book.strip() for book in text.split(f"\n{SEPARATOR}\n") if book.strip()]
    wanted = max(1, size // passage)
    picked = []
    for i in range(wanted):
        book = books[i * len(books) // wanted if wanted <= len(books) else i % len(books)]
        turn = i // len(books) + 1
        paragraphs = book.split("\n")
        turns = -(-wanted // len(books)) + 1
        start = len(paragraphs) * turn // (turns + 1)
        taken: list[str] = []
        while start < len(paragraphs) and sum(map(len, taken)) < passage:
            taken.append(paragraphs[start])
            start += 1
        picked.append("\n".join(taken).strip()[: passage + passage // 4])
    return f"\n{SEPARATOR}\n".join(picked) + "\n"


def main() -> None:
    """Write calibration.txt from the training split and evaluation.txt from the test split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "calibration"), ("test", "evaluation")):
        with lzma.open(arguments.corpus / f"{split}.txt.xz", "rt", encoding="utf-8") as file:
            text = file.read()
        (arguments.output / f"{name}.txt").write_text(passages(text), encoding="utf-8")


if __name__ == "__main__":
    main()
