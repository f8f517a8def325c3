"""Folders that one process has to itself, until it lets go or dies."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from gradrank.core.errors import OutputError

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def held(path: Path, told: Path | None = None) -> Iterator[None]:
    """Keep every other run out of a folder; a run that is killed lets go of it.

    Args:
        path: The folder; without one there is nothing to hold.
        told: What the message calls it.

    Yields:
        Nothing.

    Raises:
        OutputError: If another run has it.
    """
    if sys.platform == "win32":
        yield  # there is no lock on a folder there
        return
    handle = -1
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES} and handle >= 0:
            os.close(handle)
            raise OutputError(
                f"another run writes to '{told or path}'. Wait for it, or choose another --out."
            ) from None  # nothing is broken: the call is refused
        # Some network file systems have no such lock; a folder that is missing needs none.
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)
