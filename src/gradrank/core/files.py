"""Files written whole or not at all: temporary name, flush to disk, rename."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gradrank.core.errors import DataError, GradrankError, OutputError


def write_atomic(path: Path, write: Callable[[Path], None], overwrite: bool = True) -> None:
    """Write a file through a temporary neighbour and rename it into place.

    Args:
        path: Where the file shall stand.
        write: Called with the temporary path; writes the content there.
        overwrite: Whether an existing file may be replaced.

    Raises:
        OutputError: If the file exists and may not be replaced, or cannot be written (no space,
            no permission). The temporary file is removed and an existing file is left as it was.
        GradrankError: What ``write`` itself refused, unchanged.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise OutputError(f"'{path}' exists already. Choose another name or pass --overwrite.")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except GradrankError:
        raise
    except OSError as error:
        raise OutputError(explain_os_error(error, path)) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


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
    refuse_existing(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    except OSError as error:
        raise OutputError(explain_os_error(error, path)) from error
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except GradrankError:
        raise
    except OSError as error:
        raise OutputError(explain_os_error(error, path)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Refuse an output folder that would lose something.

    Args:
        path: The folder.
        overwrite: Whether it may be replaced.

    Raises:
        OutputError: If it is a file, or a folder with content that may not be replaced.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise OutputError(f"'{path}' is a file, but a folder is to be written there.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(
            f"folder '{path}' exists and is not empty. Choose another --out, or pass --overwrite."
        )


def explain_os_error(error: OSError, path: Path) -> str:
    """Return one sentence that says what went wrong with a path and what to do.

    Args:
        error: The error from the operating system.
        path: The file or folder that was to be written.

    Returns:
        The message.
    """
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"no space left while writing '{path}'. Free some space or choose another --out."
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"'{path}' may not be written ({error.strerror}). Choose another --out."
    return f"'{path}' could not be written: {error}."


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Args:
        path: The file.

    Returns:
        Hexadecimal digest.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, data: Any, overwrite: bool = True) -> None:
    """Write JSON (indented, sorted as given, no NaN) atomically.

    Args:
        path: Where the file shall stand.
        data: Plain data.
        overwrite: Whether an existing file may be replaced.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: _write_text(temporary, text), overwrite)


def write_text(path: Path, text: str, overwrite: bool = True) -> None:
    """Write UTF-8 text atomically.

    Args:
        path: Where the file shall stand.
        text: The content.
        overwrite: Whether an existing file may be replaced.
    """
    write_atomic(path, lambda temporary: _write_text(temporary, text), overwrite)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file with a clear error.

    Args:
        path: The file.
        what: What it should be ("plan", "record"), for the message.

    Returns:
        The parsed data.

    Raises:
        DataError: If the file is missing, too large, not text, not JSON, names a key twice or
            holds NaN or infinity.
    """
    path = Path(path)
    try:
        if path.stat().st_size > 512 * 2**20:
            raise DataError(f"{what} '{path}' is larger than 512 MiB and was not read.")
        return json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
        )
    except FileNotFoundError as error:
        raise DataError(f"{what} '{path}' does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} '{path}' could not be read: {error}.") from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} '{path}' is not valid JSON: {error}.") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
