"""A hub id offline: the cache of huggingface_hub is all there is."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from sinkquant.models import Decoder, Walk, load_model, load_tokenizer, open_model, resolve
from sinkquant.models.source import folder_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_cached_model_is_opened_without_network(cache: Path, tiny_folder: Path) -> None:
    repository = cache / "models--owner--tiny"
    shutil.copytree(tiny_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    folder = resolve("owner/tiny")
    assert folder == repository / "snapshots" / COMMIT
    assert load_tokenizer(folder).bos_token_id == 1
    walk = Walk(Decoder.of(open_model(folder)), torch.arange(8, 40)[None], 1)
    assert len(list(walk.steps())) == 3


def test_a_model_of_another_revision_takes_its_files_along(cache: Path, tiny_folder: Path) -> None:
    repository, other = cache / "models--owner--tiny", COMMIT[::-1]
    for commit in (COMMIT, other):
        shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    model = load_model(tiny_folder)
    model.name_or_path, model.config._commit_hash = "owner/tiny", other  # as from_pretrained(..., revision=) leaves it
    assert folder_of(model) == repository / "snapshots" / other
