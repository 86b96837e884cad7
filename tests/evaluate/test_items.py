"""Task items from any text: what they hold, and one clear sentence where they cannot be made."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tiny_tokenizer import random_text

from sinkquant.errors import RequestError
from sinkquant.evaluate import LOCAL_TASKS, build_tasks
from sinkquant.evaluate.items import LONGEST, PASSAGES, cloze_items, perplexity_items, pieces, recall_items, sentences
from sinkquant.models import documents, read_text
from sinkquant.resources import task_folder

GREEK = ["Η θάλασσα ήταν ήρεμη και ο ουρανός καθαρός πάνω από το μικρό νησί εκείνο το πρωινό του φθινοπώρου. "
         "Οι ψαράδες γύριζαν αργά στο λιμάνι με τα δίχτυα γεμάτα και τραγουδούσαν όλοι μαζί για τη θάλασσα; "] * 60


@pytest.fixture(scope="module")
def prose() -> list[str]:
    return documents(read_text(None, "evaluation"))


def load(folder: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_packaged_tasks_are_what_the_builder_makes(tmp_path: Path, prose: list[str]) -> None:
    build_tasks(prose, tmp_path)
    for task in LOCAL_TASKS:
        for suffix in (".yaml", ".jsonl"):
            assert (tmp_path / f"{task}{suffix}").read_bytes() == (task_folder() / f"{task}{suffix}").read_bytes()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 600_000


def test_items_depend_on_the_seed_and_not_on_the_other_tasks(tmp_path: Path, prose: list[str]) -> None:
    build_tasks(prose, tmp_path / "all", 5)
    build_tasks(prose, tmp_path / "one", 5, tasks=["sink_recall", "of_someone_else"])
    build_tasks(prose, tmp_path / "other", 6)
    assert load(tmp_path / "all", "sink_recall") == load(tmp_path / "one", "sink_recall")
    assert load(tmp_path / "all", "sink_recall") != load(tmp_path / "other", "sink_recall")
    assert not (tmp_path / "one" / "sink_cloze.yaml").exists()


def test_passages_are_enough_for_a_bootstrap_and_cover_the_text(prose: list[str]) -> None:
    items = perplexity_items([" ".join(prose)[:60_000]])
    assert len(items) >= PASSAGES - 1
    many = perplexity_items(prose * 3)
    assert len(many) == 120
    assert many[-1]["text"] in prose[-1]


def test_pieces_lose_no_word() -> None:
    text = " ".join(f"word{i}" for i in range(999))
    assert " ".join(pieces(text, 200)).split() == text.split()
    assert max(map(len, pieces("x" * 5_000, 200))) <= 300


def test_cloze_choices_are_words_of_the_text_and_one_is_true(prose: list[str]) -> None:
    flat = " ".join(" ".join(prose).split())
    for item in cloze_items(prose, random.Random(0)):
        assert len(set(item["choices"])) == 4
        assert item["context"] + item["choices"][item["answer"]] in flat
        assert not item["context"].endswith(" ")
        assert 60 < len(item["context"]) <= 400


def test_recall_can_only_be_answered_from_the_far_sentence(prose: list[str]) -> None:
    items = recall_items(prose, random.Random(0))
    assert len(items) >= 100
    for item in items:
        right = item["openings"][item["answer"]]
        cue = item["middle"].rpartition("\n")[2]
        assert right == cue + item["end"]
        assert len(set(item["openings"])) == 4
        assert not any(opening in item["middle"] for opening in item["openings"])
        assert len(max(item["openings"], key=len)) + len(item["middle"] + item["end"]) <= LONGEST
    # No place is favoured; what differs between the four contexts is drawn alike for right and wrong ones.
    places = Counter(item["answer"] for item in items)
    assert max(places.values()) < 0.45 * len(items)


@pytest.mark.parametrize("characters", [630, 900])
def test_items_keep_to_the_budget(prose: list[str], characters: int) -> None:
    for item in recall_items(prose, random.Random(0), characters):
        assert max(map(len, item["openings"])) + len(item["middle"] + item["end"]) <= characters
    for item in cloze_items(prose, random.Random(0), 200):
        assert len(item["context"]) + max(map(len, item["choices"])) <= 200


def test_texts_in_other_letters_and_without_sentences_work() -> None:
    assert perplexity_items(GREEK)
    assert cloze_items(GREEK, random.Random(0))
    bare = [random_text(6_000, delimiters=False)]
    assert len(sentences(bare)) == 300
    assert recall_items(bare, random.Random(0))
    assert cloze_items(bare, random.Random(0))


@pytest.mark.parametrize("clause", ["天地玄黄宇宙洪荒日月盈昃辰宿列张。", "天地玄黄宇宙洪荒， 日月盈昃辰宿列张。 "])
def test_a_text_without_spaces_has_byte_perplexity_and_nothing_else(clause: str, tmp_path: Path) -> None:
    text = [clause * 800]
    build_tasks(text, tmp_path, tasks=["sink_perplexity"])
    task = yaml.safe_load((tmp_path / "sink_perplexity.yaml").read_text(encoding="utf-8"))
    assert [metric["metric"] for metric in task["metric_list"]] == ["byte_perplexity", "bits_per_byte"]
    for task in ("sink_cloze", "sink_recall"):
        with pytest.raises(RequestError, match="no spaces between words"):
            build_tasks(text, tmp_path, tasks=[task])


@pytest.mark.parametrize("task", LOCAL_TASKS)
@pytest.mark.parametrize("text", ["Too short.", "One sentence of a few words. " * 8])
def test_a_short_text_is_refused_by_name(tmp_path: Path, task: str, text: str) -> None:
    with pytest.raises(RequestError, match=rf"too short for {task}") as caught:
        build_tasks([text], tmp_path, tasks=[task])
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize("task", ["sink_cloze", "sink_recall"])
def test_a_short_context_is_refused_by_name(tmp_path: Path, prose: list[str], task: str) -> None:
    with pytest.raises(RequestError, match=f"context is too short for {task}"):
        build_tasks(prose, tmp_path, tasks=[task], max_characters=90)


@pytest.mark.parametrize("text", ["one sentence", "three"])
def test_a_text_that_repeats_itself_is_refused(text: str) -> None:
    one = "The quick brown fox number {} jumps over the lazy old dog beside the river and runs far away home. "
    content = "".join(one.format(place) for place in range(1 if text == "one sentence" else 3)) * 400
    with pytest.raises(RequestError, match="fewer than 4 different sentences that fit"):
        recall_items([content], random.Random(0))
