"""Shared by the tests of sensitivities."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_tokenizer import random_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random words, enough for every row that these tests ask for."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(random_text(1200))
    return path
