"""Reading and writing a checkpoint without the progress bars of the libraries that do it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import compressed_tensors.offload
import compressed_tensors.quantization
from tqdm import tqdm
from transformers.utils import logging


@contextlib.contextmanager
def no_transformers_bars() -> Iterator[None]:
    """While this is open, transformers draws no bar. It costs nothing, so that every block may be read under it."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Nor does compressed-tensors, which has no switch for it: the `tqdm` that its modules have imported is replaced in
    them, for which all modules are looked through."""
    modules: list[Any] = [module for name, module in sorted(sys.modules.items())
                          if name.split(".")[0] == compressed_tensors.__name__ and vars(module).get("tqdm") is tqdm]
    with no_transformers_bars():
        try:
            for module in modules:
                module.tqdm = _silent(tqdm)
            yield
        finally:
            for module in modules:
                module.tqdm = tqdm


def _silent(bar: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: bar(*args, **(kwargs | {"disable": True}))
