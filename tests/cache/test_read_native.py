"""The C++ library reads every lane as torch does, with wide vectors and without; where it is missing, that is said."""

from __future__ import annotations

import logging
import shutil
import stat
from pathlib import Path

import pytest
import torch

from sinkquant.cache import read_native
from sinkquant.cache.read_native import NativeReads, native_or_why, reads_on
from sinkquant.cache.read_torch import TorchReads
from sinkquant.cache.store import Lane, PackedStates

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _lanes(width: int) -> list[tuple[PackedStates, PackedStates]]:
    """Keys and values of four heads in 1, 2, 3 and 8 bits, in all ways to hold a scale."""
    generator = torch.Generator().manual_seed(width)
    found = []
    for block, symmetric, scale_bits in ((32, False, 8), (64, True, 16), (64, True, 8), (128, False, 16)):
        pair = (PackedStates([1, 2, 3, 8], block, None, symmetric, scale_bits=scale_bits),
                PackedStates([1, 2, 3, 8], block, min(block, width), symmetric, scale_bits=scale_bits))
        for states in pair:
            states.append(torch.randn(2, 4, 18 * block, width, generator=generator) + 0.5, None)
        found.append(pair)
    return found


def _sums(lane: Lane, values: PackedStates, weights: torch.Tensor) -> torch.Tensor:
    """In float64, of the values that torch reads: its float32 sums of a thousand positive terms are 2e-5 off in the
    order of some processors."""
    alone = torch.eye(weights.shape[-1]).expand(2, 1, -1, -1)
    return (weights.double() @ TorchReads().sums(lane, values.block, alone).double()).float()


@pytest.mark.parametrize("flags", [read_native.FLAGS[0], ()], ids=["native", "any processor"])
def test_every_lane_is_read_as_torch_reads_it(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    monkeypatch.setattr(read_native, "FLAGS", (flags, *read_native.FLAGS))
    reads, slow = native_or_why.__wrapped__(), TorchReads()
    assert not isinstance(reads, str), reads
    generator = torch.Generator().manual_seed(0)
    for width in (24, 128):
        for keys, values in _lanes(width):
            for rows in (1, 3, 9):
                queries = torch.randn(2, 1, rows, width, generator=generator)
                weights = torch.rand(2, 1, rows, keys.blocks * keys.block, generator=generator)
                for key, value in zip(keys.lanes, values.lanes, strict=True):
                    torch.testing.assert_close(reads.scores(key, keys.block, queries),
                                               slow.scores(key, keys.block, queries), atol=1e-3, rtol=1e-5)
                    torch.testing.assert_close(reads.sums(value, values.block, weights), _sums(value, values, weights),
                                               atol=1e-3, rtol=1e-5)


def test_it_is_compiled_once_for_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(read_native, "_compile", lambda command, library: made.append(_some_library(library)))
    for processor in ("one", "one", "another"):
        monkeypatch.setattr(read_native, "_processor", lambda processor=processor: processor)
        assert isinstance(native_or_why.__wrapped__(), NativeReads)
    assert len(made) == len(set(made)) == 2


def _some_library(place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so", place))


def test_without_a_home_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number that no user has."""
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert "home directory" in str(native_or_why.__wrapped__())


FAILING = """#!/bin/sh
[ $1 = --version ] && echo 'c++ 1' && exit
echo no such flag >&2
exit 1
"""


@pytest.mark.parametrize("compiler", [None, FAILING], ids=["none", "failing"])
def test_without_a_compiler_torch_reads_and_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                       caplog: pytest.LogCaptureFixture, compiler: str | None) -> None:
    place = tmp_path / "c++"
    if compiler is not None:
        place.write_text(compiler)
        place.chmod(stat.S_IRWXU)
    monkeypatch.setattr(read_native.shutil, "which", lambda name: str(place) if place.is_file() else None)
    native_or_why.cache_clear()
    with caplog.at_level(logging.WARNING, "sinkquant"):
        assert isinstance(reads_on(CPU), TorchReads)
        assert isinstance(reads_on(CPU), TorchReads)
    native_or_why.cache_clear()
    (said,) = [record.getMessage() for record in caplog.records if record.name == "sinkquant"]
    assert ("no C++ compiler" if compiler is None else "no such flag") in said
