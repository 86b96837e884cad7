"""Programs in processes of their own that do not import torch and transformers anew: each is forked from one process
that has, and that has imported nothing of sinkquant. They have pids, limits and exit codes as any other; what they say
goes into files. This module imports the standard library only, so that a program finds the process as it would be."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "torch", "safetensors.torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
    "transformers.quantizers.quantizer_compressed_tensors", "compressed_tensors.quantization", "accelerate"])


@dataclass
class Program:
    """One that was started."""

    process: ForkServerProcess
    out: Path
    err: Path

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait_for(self, path: Path) -> None:
        """Until the program makes a file."""
        while not path.exists():
            assert self.process.is_alive(), self.communicate()
            time.sleep(0.005)

    def communicate(self) -> tuple[int, str, str]:
        """Wait for its end. Returns the exit code, negative where a signal ended it, and what it said."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode, self.out.read_text(encoding="utf-8"), self.err.read_text(encoding="utf-8")


def start(place: Path, program: Callable[..., Any], *arguments: Any, argv: tuple[str, ...] = (),
          environment: dict[str, str] | None = None, limit: int | None = None) -> Program:
    """Start a function of a module.

    Args:
        place: a folder for what the program says.
        argv: its `sys.argv`. limit: no file may grow over so many bytes, as on a disk that is full.
    """
    place.mkdir(parents=True, exist_ok=True)
    number = len(list(place.glob("*.out")))
    out, err = place / f"{number}.out", place / f"{number}.err"
    process = CONTEXT.Process(target=_begin, args=(out, err, program, arguments, argv, environment or {}, limit))
    process.start()
    return Program(process, out, err)


def script(path: str) -> None:
    """A program: what `python PATH` does."""
    runpy.run_path(path, run_name="__main__")


def command_line() -> None:
    """A program: what `python -m sinkquant.cli` does."""
    from sinkquant.cli import main

    main()


def _begin(out: Path, err: Path, program: Callable[..., Any], arguments: tuple[Any, ...], argv: tuple[str, ...],
           environment: dict[str, str], limit: int | None) -> None:
    for number, path in ((1, out), (2, err)):
        with path.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), number)
    if argv:
        sys.argv = list(argv)
    os.environ |= environment
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    program(*arguments)
