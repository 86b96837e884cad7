"""Shared by all tests: one tiny model, its tokenizer, its folder, and a text that it has tokens for.

The process that hands out tests runs none: torch and transformers are imported where they are needed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# The same examples in every run: a failure is found again, and no run fails by chance.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


# What tests import stays to the end: the garbage collector need not look through it, now or after every test.
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny() -> PreTrainedModel:
    """A random Llama in float32: 3 layers, 4 heads, width 64, 256 positions. Read it, never change it."""
    from families import tiny_model

    return tiny_model("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, 128 ids, `<s>` (id 1) in front once."""
    from tiny_tokenizer import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tiny: PreTrainedModel, tokenizer: PreTrainedTokenizerFast,
                tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` and `tokenizer` as a model folder. Read it, never change it; copy it first."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_folder`, of 2 layers and 128 positions: for whole runs, which take as much text as there are positions.
    Read it, never change it."""
    from small_runs import model_folder

    return model_folder(tmp_path_factory.mktemp("small") / "model", num_hidden_layers=2, max_position_embeddings=128)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of words that the tiny tokenizer knows, some 90,000 characters."""
    from tiny_tokenizer import random_text

    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(random_text(20_000), encoding="utf-8")
    return path
