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
def no_progress_bars() -> Iterator[None]:
    """While this is open, transformers and compressed-tensors draw no bar. transformers has a switch for it;
    compressed-tensors has none, so the `tqdm` that its modules have imported is replaced in them."""
    modules: list[Any] = [module for name, module in sorted(sys.modules.items())
                          if name.split(".")[0] == compressed_tensors.__name__ and vars(module).get("tqdm") is tqdm]
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        for module in modules:
            module.tqdm = _silent(tqdm)
        yield
    finally:
        for module in modules:
            module.tqdm = tqdm
        if shown:
            logging.enable_progress_bar()


def _silent(bar: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: bar(*args, **(kwargs | {"disable": True}))
