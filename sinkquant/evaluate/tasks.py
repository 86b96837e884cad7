"""lm-eval tasks from any held-out text: YAML and jsonl, deterministic by seed.

`sink_perplexity`: passages for rolling perplexity. `sink_cloze`: the last word of a sentence against three words of
similar frequency. `sink_recall`: a passage of the text, other prose, and the passage's last sentence begun again: its
true end against the ends of other sentences; the answer stands only far back.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from sinkquant.errors import RequestError

ITEMS = 120
PASSAGE = 3_000
CONTEXT = 400
FILLER = 1_200
CHOICES = 4
SENTENCE = re.compile(r"[^.!?\n]+[.!?]")
WORD = re.compile(r"\w+")


def build_tasks(documents: list[str], folder: Path, seed: int = 0) -> list[str]:
    """Write the three tasks made of `documents` into `folder`. Returns their names.

    Raises:
        RequestError: the text is too short, or has too few sentences, for one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    made = {"sink_perplexity": perplexity_items(documents), "sink_cloze": cloze_items(documents, generator),
            "sink_recall": recall_items(documents, generator)}
    for name, items in made.items():
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition(name, f"{name}.jsonl"), sort_keys=False),
                                             encoding="utf-8")
    return list(made)


def definition(name: str, data: str) -> dict[str, Any]:
    """The lm-eval task definition of that name over a jsonl file."""
    common: dict[str, Any] = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}},
                              "test_split": "test", "metadata": {"version": 1.0}}
    if name == "sink_perplexity":
        metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
        return common | {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                         "metric_list": [{"metric": metric} for metric in metrics]}
    return common | {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
                     "doc_to_target": "{{answer}}", "target_delimiter": "",
                     "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                                     for metric in ("acc", "acc_norm")]}


def perplexity_items(documents: list[str]) -> list[dict[str, Any]]:
    """Passages of about PASSAGE characters."""
    items = [{"text": text.strip()} for document in documents for text in _pieces(document, PASSAGE)]
    if len(items) < 2:
        raise RequestError(f"the evaluation text is too short: sink_perplexity needs {2 * PASSAGE} characters; "
                           "give more text.")
    return items[:ITEMS]


def cloze_items(documents: list[str], generator: random.Random) -> list[dict[str, Any]]:
    """A few sentences whose last word is missing, and four words for it."""
    counts = Counter(word for document in documents for word in WORD.findall(document))
    common = [word for word, count in counts.most_common() if count >= 2 and len(word) >= 3 and word.islower()]
    rank = {word: i for i, word in enumerate(common)}
    found = []
    for document in documents:
        for match in SENTENCE.finditer(document):
            words = WORD.findall(match.group())
            if len(words) >= 6 and match.start() >= CONTEXT and words[-1] in rank:
                end = match.start() + match.group().rindex(words[-1])
                found.append((document[end - CONTEXT:end].rstrip(), words[-1]))
    items = []
    for context, word in _sample(found, generator, "sink_cloze"):
        near = common[max(0, rank[word] - 20):rank[word] + 20]
        others = [other for other in near if other != word]
        if len(others) >= CHOICES - 1:
            items.append(_item(context, f" {word}", [f" {o}" for o in generator.sample(others, CHOICES - 1)], generator))
    return items


def recall_items(documents: list[str], generator: random.Random) -> list[dict[str, Any]]:
    """A sentence, FILLER characters of other prose, the sentence's beginning again, and four ends for it."""
    sentences = []
    fillers = []
    for index, document in enumerate(documents):
        fillers += [(index, piece) for piece in _pieces(document, FILLER)]
        sentences += [(index, sentence) for match in SENTENCE.finditer(document)
                      if 60 <= len(sentence := match.group().strip()) <= 160 and len(sentence.split()) >= 10]
    items = []
    for index, sentence in _sample(sentences, generator, "sink_recall"):
        words = sentence.split()
        half = len(words) // 2
        elsewhere = [text for place, text in fillers if place != index or len(documents) == 1]
        others = generator.sample([text for _, text in sentences if text != sentence], CHOICES - 1)
        ends = [" " + " ".join(other.split()[-(len(words) - half):]) for other in others]
        context = f"{sentence}\n{generator.choice(elsewhere)}\n{' '.join(words[:half])}"
        items.append(_item(context, " " + " ".join(words[half:]), ends, generator))
    return items


def _item(context: str, right: str, wrong: list[str], generator: random.Random) -> dict[str, Any]:
    choices = [right, *wrong]
    generator.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(right)}


def _pieces(document: str, size: int) -> list[str]:
    """Pieces of at least half the size, cut at spaces."""
    pieces, start = [], 0
    while start < len(document):
        end = min(start + size, len(document))
        while end < len(document) and not document[end].isspace():
            end += 1
        if end - start >= size // 2:
            pieces.append(document[start:end])
        start = end + 1
    return pieces


def _sample(found: list[tuple[Any, Any]], generator: random.Random, task: str) -> list[tuple[Any, Any]]:
    if len(found) < 2 * CHOICES:
        raise RequestError(f"the evaluation text is too short for {task}: it has {len(found)} sentences that fit and "
                           f"{2 * CHOICES} are needed; give more text or leave the task out.")
    return generator.sample(found, min(ITEMS, len(found)))
