"""Folders that appear whole or not at all, and what is left of those whose writer was killed."""

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gradrank.core.errors import OutputError
from gradrank.core.files import TEMPORARY, explain_os_error, raise_output_error, refuse_existing
from gradrank.core.locks import held

_OLD = f"-old{TEMPORARY}"
# Seconds in which a new temporary folder is not taken for one that was left behind.
_FRESH = 600


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Make a folder that appears whole or not at all.

    Args:
        path: Where the folder shall stand.
        overwrite: Whether an existing folder may be replaced, once the new one is complete.

    Yields:
        A temporary neighbour to fill; it is renamed into place at the end, or removed on error.

    Raises:
        OutputError: If the folder exists (and is not empty) and may not be replaced, or cannot
            be written.
        GradrankError: What the block itself refused, unchanged.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()  # the link stays, and what it points to is replaced
    _clear_up(path)
    refuse_existing(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        )
    except OSError as error:
        raise OutputError(explain_os_error(error, path)) from error
    try:
        with held(temporary):
            yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        _swap(temporary, path, overwrite)
    except Exception as error:
        raise_output_error(error, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, path: Path, overwrite: bool) -> None:
    """Rename a folder into place; whoever is killed in between leaves no half of either."""
    if not overwrite or not path.exists():
        try:
            temporary.replace(path)  # refused if another process has filled the folder
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise
            raise OutputError(
                f"'{path}' was written by another process in the meantime. Choose another --out, "
                "or pass --overwrite."
            ) from error
        return
    aside = temporary.with_name(temporary.name.removesuffix(TEMPORARY) + _OLD)
    with held(path):
        path.rename(aside)
        try:
            temporary.replace(path)
        except BaseException:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _clear_up(path: Path) -> None:
    """Remove what writers of a folder left that were killed; put back what they had put aside."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????*{TEMPORARY}"):
        old = left.name.endswith(_OLD)
        with contextlib.suppress(OSError):
            if not left.is_dir() or (not old and abs(time.time() - left.stat().st_mtime) < _FRESH):
                continue  # of a file, or of a writer that may not hold it yet
            with held(left):
                if old and not path.exists():
                    left.rename(path)
                else:
                    shutil.rmtree(left)
