"""Where the hidden states of all rows live while they walk through a model: in RAM, or in a file that is mapped."""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from sinkquant.errors import SinkquantError


@dataclass(frozen=True)
class ActivationStore:
    """Gives buffers in RAM up to `limit` bytes each, and maps a file in `folder` for larger ones.

    Pages of a mapped file that memory has no room for go to disk. The file has no name: it goes with its buffer.
    """

    folder: Path | None = None
    limit: int = 1 << 62

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A buffer with undefined contents, on the CPU.

        Raises:
            SinkquantError: the folder has no room for the file.
        """
        count = math.prod(shape)
        size = count * dtype.itemsize
        if self.folder is None or size <= self.limit or not count:
            return torch.empty(shape, dtype=dtype)
        handle, path = tempfile.mkstemp(dir=self.folder, prefix=".activations.")
        try:
            if sys.platform == "darwin":
                os.truncate(handle, size)
            else:
                os.posix_fallocate(handle, 0, size)  # a page of a sparse file that finds the disk full ends the process
            return torch.from_file(path, shared=True, size=count, dtype=dtype).reshape(shape)
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            raise SinkquantError(f"{self.folder} has {free} bytes free, but {size} bytes of hidden states have to go "
                                 "there; free some space or lower calibration.rows.") from error
        finally:
            os.close(handle)
            os.unlink(path)
