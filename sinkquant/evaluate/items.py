"""Documents -> the items of the three tasks, as plain dictionaries.

All three need words between spaces; where a text has no sentence marks, runs of words stand in for sentences.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sinkquant.errors import RequestError

ITEMS = 120
CHOICES = 4
PASSAGE = 3_000
"""Characters of a perplexity passage; shorter where the text would give fewer than PASSAGES of them."""
SHORTEST_PASSAGE = 1_000
PASSAGES = 40
SHORTEST_DOCUMENT = 100
CONTEXT = 400
"""Characters before the missing word of a cloze item."""
SHORTEST_CONTEXT = 60
FILLER = 1_300
"""Characters between a recalled sentence and its repetition: about 230 words, 430 tokens of the demo model."""
SHORTEST_FILLER = 300
SENTENCE_LENGTH = (80, 160)
CUE = 3
"""Words of the repeated sentence that are given."""
LONGEST = FILLER + 2 * SENTENCE_LENGTH[1] + 2
"""Characters of the longest item that has to fit into a context as a whole."""
RUN = 20
"""Words that stand in for a sentence in a text without sentence marks."""
MARKS = ".!?…。！？؟।"
SENTENCE = re.compile(rf"[^{MARKS}]+[{MARKS}]+[\"'”’»)\]]*")
CLOSERS = 16
"""Characters after the last mark that may close its sentence."""
WORD = re.compile(r"\S+")
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
"""Letters of scripts that put spaces between clauses: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


@dataclass(frozen=True)
class Sentence:
    """A sentence of a document whose white space is all single spaces. `start` counts characters."""

    document: int
    start: int
    text: str


def has_words(documents: list[str]) -> bool:
    """Whether spaces stand between words: fewer than 40 characters to one, on average, and most of a script that has
    them there."""
    words = [word for document in documents for word in document.split()]
    unspaced = sum(UNSPACED.search(word) is not None for word in words)
    return len(words) * 40 > sum(map(len, documents)) and 2 * unspaced < len(words)


def perplexity_items(documents: list[str]) -> list[dict[str, Any]]:
    """Passages of one to three thousand characters, or short documents as they are, spread evenly over the text.

    Raises:
        RequestError: there are fewer than two of them.
    """
    size = min(PASSAGE, max(SHORTEST_PASSAGE, sum(map(len, documents)) // PASSAGES))
    parts = [piece.strip() for document in documents for piece in pieces(document, size) or [document]]
    items = [{"text": text} for text in parts if len(text) >= SHORTEST_DOCUMENT]
    if len(items) < 2:
        raise RequestError(f"the evaluation text is too short for sink_perplexity, which needs {2 * SHORTEST_PASSAGE} "
                           "characters; give more text.")
    return [items[i * len(items) // ITEMS] for i in range(ITEMS)] if len(items) > ITEMS else items


def cloze_items(documents: list[str], generator: random.Random,
                characters: int | None = None) -> list[dict[str, Any]]:
    """The last word of a sentence among three others that are about as frequent in the same text.

    Args:
        characters: at most so many in an item.

    Raises:
        RequestError: the text or the budget is too small.
    """
    flat = _flat(documents, "sink_cloze")
    room = min(CONTEXT, CONTEXT if characters is None else characters - 40)
    if room < SHORTEST_CONTEXT:
        raise RequestError("the model's context is too short for sink_cloze, which needs about 100 characters; "
                           "leave it out of evaluate.tasks.")
    counts = Counter(word for document in flat for token in WORD.findall(document) if (word := _bare(token)))
    ranked = [word for word, count in counts.most_common() if count >= 2]
    rank = {word: place for place, word in enumerate(ranked)}
    found = []
    for sentence in sentences(flat):
        last = sentence.text.rstrip().rpartition(" ")[2]
        word = _bare(last)
        # A sentence that ends in a space and a mark has its word one place further left.
        if not word and len(parts := sentence.text.split()) > 1 and not any(c.isalnum() for c in last):
            word = _bare(parts[-2])
        end = sentence.start + sentence.text.rfind(f" {word}") if word in rank else 0
        long_enough = end >= SHORTEST_CONTEXT and end > sentence.start and len(sentence.text.split()) >= 6
        if word in rank and long_enough:
            document = flat[sentence.document]
            # Words are not cut in two: the context begins after the first space inside the window.
            begin = 0 if end <= room else document.index(" ", end - room) + 1
            found.append((document[begin:end], word))
    items = []
    for context, word in _sample(found, generator, "sink_cloze"):
        near = [other for other in ranked[max(0, rank[word] - 20):rank[word] + 20] if other != word]
        if len(near) >= CHOICES - 1:
            choices = [f" {other}" for other in (word, *generator.sample(near, CHOICES - 1))]
            generator.shuffle(choices)
            items.append({"context": context, "choices": choices, "answer": choices.index(f" {word}")})
    if len(items) < 2:
        raise RequestError("the evaluation text is too short for sink_cloze: too few of its words occur twice; "
                           "give more text or leave the task out of evaluate.tasks.")
    return items


def recall_items(documents: list[str], generator: random.Random,
                 characters: int | None = None) -> list[dict[str, Any]]:
    """A sentence that is repeated after other prose, and four sentences that may have stood first.

    The scored text is the end of the repetition, the same after all four; what differs is the sentence far back. So
    neither the likelihood of the end by itself nor its fit to its beginning tells the answer: without the far
    sentence all four scores are equal. (Among four ENDS after one context, a small model chooses by how likely each
    is by itself, and the far text changes nothing.)

    Args:
        characters: at most so many in an item.

    Raises:
        RequestError: the text or the budget is too small.
    """
    flat = _flat(documents, "sink_recall")
    low, high = SENTENCE_LENGTH
    size = FILLER if characters is None else min(FILLER, characters - 2 * high - 2)
    if size < SHORTEST_FILLER:
        raise RequestError(f"the model's context is too short for sink_recall, which needs about "
                           f"{SHORTEST_FILLER + 2 * high} characters; leave it out of evaluate.tasks.")
    known = [s for s in sentences(flat) if low <= len(s.text) <= high and len(s.text.split()) >= 10]
    fillers = [(place, piece[:size].rpartition(" ")[0] or piece[:size])
               for place, document in enumerate(flat) for piece in pieces(document, size) if len(piece) >= size]
    items = []
    distinct = list(dict.fromkeys(s.text for s in known))
    for sentence in _sample(known, generator, "sink_recall") if len(distinct) >= CHOICES else []:
        others = generator.sample([s.text for s in known if s.text != sentence.text], CHOICES - 1)
        if len(set(others)) < len(others):
            others = generator.sample([text for text in distinct if text != sentence.text], CHOICES - 1)
        openings = [sentence.text, *others]
        generator.shuffle(openings)
        apart = [text for place, text in fillers if place != sentence.document] or [text for _, text in fillers]
        apart = [text for text in apart if not any(opening in text for opening in openings)]
        if not apart:
            continue
        words = sentence.text.split(" ")
        items.append({"openings": openings, "middle": f"\n{generator.choice(apart)}\n{' '.join(words[:CUE])}",
                      "end": f" {' '.join(words[CUE:])}", "answer": openings.index(sentence.text)})
    if len(items) < 2:
        lacks = f"no {size} characters of other prose to put between" if len(distinct) >= CHOICES else (
            f"fewer than {CHOICES} different sentences that fit")
        raise RequestError(f"the evaluation text is too short for sink_recall: it has {lacks}; give more text or leave "
                           "the task out of evaluate.tasks.")
    return items


def sentences(flat: list[str]) -> list[Sentence]:
    """The sentences of documents; runs of RUN words of a document that has next to no sentence marks."""
    found = []
    for place, document in enumerate(flat):
        # What comes after the last mark is no sentence, and looking for one there takes the square of its length.
        last = max(document.rfind(mark) for mark in MARKS)
        spans = [match.span() for match in SENTENCE.finditer(document, 0, last + 1 + CLOSERS)] if last >= 0 else []
        words = [match.span() for match in WORD.finditer(document)]
        if len(spans) * 100 < len(words):
            spans = [(words[i][0], words[min(i + RUN, len(words)) - 1][1]) for i in range(0, len(words), RUN)]
        for start, end in spans:
            text = document[start:end]
            found.append(Sentence(place, start + len(text) - len(text.lstrip()), text.strip()))
    return found


def pieces(document: str, size: int) -> list[str]:
    """Pieces of `size` characters and the rest of a word; a last one of less than half the size is dropped."""
    parts, start = [], 0
    while start < len(document):
        end = min(start + size, len(document))
        stop = min(end + 100, len(document))  # a text without spaces is cut anyway
        while end < stop and not document[end].isspace():
            end += 1
        if end - start >= size // 2:
            parts.append(document[start:end])
        start = end + 1 if end < len(document) and document[end].isspace() else end
    return parts


def _flat(documents: list[str], task: str) -> list[str]:
    if not has_words(documents):
        raise RequestError(f"{task} cannot be made from the evaluation text: it has no spaces between words; "
                           "leave the task out of evaluate.tasks.")
    return [" ".join(document.split()) for document in documents]


def _bare(token: str) -> str:
    """The word of a token without the marks around it; empty where it is a name, a number, short or a compound."""
    end = len(token)
    while end and not token[end - 1].isalnum():
        end -= 1
    word = token[:end]
    return word if len(word) >= 3 and word.isalnum() and not word.isdigit() and not word[0].isupper() else ""


def _sample(found: list[Any], generator: random.Random, task: str) -> list[Any]:
    if len(found) < 2 * CHOICES:
        raise RequestError(f"the evaluation text is too short for {task}: it has {len(found)} sentences that fit and "
                           f"{2 * CHOICES} are needed; give more text or leave the task out of evaluate.tasks.")
    return generator.sample(found, min(ITEMS, len(found)))
