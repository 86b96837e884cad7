"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from sinkquant.errors import RequestError

LOG = logging.getLogger("sinkquant")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder where it is not there yet, and keep all other runs out of it. The lock is the folder's own (flock),
    so that it goes with the process, however that ends, and moves with the folder.

    Raises:
        RequestError: another run holds it, or the folder cannot be made.
    """
    handle = _open(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # where nothing came of it
        os.close(handle)


def _open(folder: Path) -> int:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise RequestError(f"cannot write into {folder}: {error.strerror}; name another output folder.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise RequestError(f"another run is writing into {folder}; wait for it or name another output "
                               "folder.") from error
        except OSError as error:
            LOG.warning("%s cannot be locked (%s): start no other run into it", folder, error.strerror)
        if folder.is_dir() and os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
        os.close(handle)  # the run that held it has given the folder its place meanwhile
