"""Reads packed blocks in C++ on a CPU, where there is a compiler: `read_native.cpp`, compiled at the first read.

The library stands in the user's cache folder under a name that holds the source, the compiler and the processor. What
it computes differs from `read_torch` by rounding only.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from sinkquant.cache.read_torch import TorchReads
from sinkquant.cache.store import Lane

LOG = logging.getLogger("sinkquant")
COMPILERS = ("c++", "g++", "clang++")
COMMON = ("-O3", "-std=c++17", "-shared", "-fPIC")
FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""What is tried in turn: a compiler may have no OpenMP, or not know its own processor."""
SECONDS = 120
"""After which a compiler is given up."""
BLOCKS_PER_SUM = 16
"""Blocks whose values are added up by one thread."""


class _Lane(ctypes.Structure):
    """`Lane` of the C++ file."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("data", "scale", "zero", "ends")),
                *((name, ctypes.c_int64) for name in ("heads", "blocks", "size", "width", "groups", "bits")))


@dataclass(frozen=True)
class NativeReads:
    """See `TorchReads`. `library`: what was compiled; `made_by`: the compiler and its flags."""

    library: ctypes.CDLL
    made_by: str

    def scores(self, lane: Lane, block: int, queries: torch.Tensor) -> torch.Tensor:
        """See `TorchReads.scores`."""
        held, queries = _contiguous(lane), queries.contiguous()
        scores = queries.new_empty(*queries.shape[:3], held[0].shape[2] * block)
        self.library.packed_scores(_lane(held, lane.bits, block, 0), _pointer(queries), _pointer(scores),
                                   ctypes.c_int64(queries.shape[2]), torch.get_num_threads())
        return scores

    def sums(self, lane: Lane, block: int, weights: torch.Tensor) -> torch.Tensor:
        """See `TorchReads.sums`."""
        held, weights = _contiguous(lane), weights.contiguous()
        batch, heads, blocks, _, width = held[0].shape
        parts = weights.new_empty(batch, heads, -(-blocks // BLOCKS_PER_SUM), weights.shape[2], width)
        self.library.packed_sums(_lane(held, lane.bits, block, held[1].shape[-1]), _pointer(weights), _pointer(parts),
                                 ctypes.c_int64(weights.shape[2]), ctypes.c_int64(BLOCKS_PER_SUM),
                                 torch.get_num_threads())
        return parts.sum(2)


def _contiguous(lane: Lane) -> list[torch.Tensor]:
    """Codes, scales, zeros and ends, an empty tensor for what there is not; to be kept as long as pointers are used."""
    assert lane.data is not None
    nothing = lane.data.new_empty(0)
    return [nothing if one is None else one.contiguous() for one in (lane.data, lane.scale, lane.zero, lane.ends)]


def _lane(held: list[torch.Tensor], bits: int, block: int, groups: int) -> object:
    batch, heads, blocks, _, width = held[0].shape
    return ctypes.byref(_Lane(*(_pointer(one) for one in held), batch * heads, blocks, block, width, groups, bits))


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() or None)


@functools.cache
def native_or_why() -> NativeReads | str:
    """What was compiled for this machine, now or before; or why there is nothing, which is logged once."""
    found = _compiled()
    if isinstance(found, str):
        LOG.warning("Packed blocks of the KV cache are read with torch, which takes longer: %s.", found)
    return found


def _compiled() -> NativeReads | str:
    source = Path(__file__).with_suffix(".cpp")
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return f"no C++ compiler ({', '.join(COMPILERS)}) was found"
    said = ""
    for flags in FLAGS:
        try:
            version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS,
                                     check=True).stdout.splitlines()[0]
            command = [compiler, *COMMON, *flags]
            key = "\n".join([source.read_text(), version, *command, platform.machine(), _processor()])
            library = _folder() / f"read_{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
            if not library.is_file():
                _compile([*command, str(source)], library)
            return NativeReads(ctypes.CDLL(str(library)), " ".join([version, *flags]))
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "it said nothing").strip().splitlines()[0]
        except (OSError, subprocess.TimeoutExpired, IndexError, RuntimeError) as error:  # the last: there is no home
            said = str(error)
    return f"{compiler} does not compile what reads them faster: {said}"


def _compile(command: list[str], library: Path) -> None:
    """Compile beside its place and move it there whole, because other processes may do the same."""
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder, library.name)
        subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, timeout=SECONDS, check=True)
        os.replace(made, library)


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sinkquant"


def _processor() -> str:
    """What tells processors apart that differ in their instructions: a home may be shared by several machines."""
    about = Path("/proc/cpuinfo")
    if not about.is_file():
        return platform.processor()
    return next((line for line in about.read_text().splitlines() if line.lower().startswith(("flags", "features"))), "")


def reads_on(device: torch.device) -> TorchReads | NativeReads:
    """What reads packed blocks on a device."""
    found = native_or_why() if device.type == "cpu" else ""
    return TorchReads() if isinstance(found, str) else found
