"""Files written whole or not at all: temporary name, flush to disk, rename."""

import contextlib
import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gradrank.core.errors import DataError, GradrankError, OutputError
from gradrank.core.text import json_text, parse_json

TEMPORARY = ".tmp"
_LARGEST = 512 * 2**20
# Rust libraries (safetensors) put the number of a system error into the text of their own.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


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
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        _place(temporary, path, overwrite)
    except Exception as error:
        raise_output_error(error, path)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _place(temporary: Path, path: Path, overwrite: bool) -> None:
    """Rename a file into place; without ``overwrite`` the first of several writers wins."""
    if not overwrite:
        try:
            os.link(temporary, path)
            return
        except FileExistsError as error:
            raise OutputError(
                f"'{path}' was written by another process in the meantime. Choose another name or "
                "pass --overwrite."
            ) from error
        except OSError:
            pass  # a file system without hard links
    temporary.replace(path)


def raise_output_error(error: Exception, path: Path) -> NoReturn:
    """Raise what the system refused as an OutputError, and anything else as it is.

    Args:
        error: What was raised while writing.
        path: What was written.

    Raises:
        OutputError: For an error of the system.
    """
    cause = system_error(error)
    if isinstance(error, GradrankError) or cause is None:
        raise error
    raise OutputError(explain_os_error(cause, path)) from cause


def system_error(error: BaseException) -> OSError | None:
    """Return the error of the operating system that stands behind an error.

    Args:
        error: What a library raised while it wrote a file.

    Returns:
        The error itself, or one of the same number where a library tells it in words; None if
        the system had no part in it.

    Examples:
        >>> system_error(RuntimeError("I/O error: No space left on device (os error 28)")).errno
        28
    """
    if isinstance(error, OSError):
        return error
    found = _OS_ERROR.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def is_temporary(name: str) -> bool:
    """Tell whether a name is that of a file or folder whose writing was cut off.

    Args:
        name: The name, without its folder.

    Returns:
        Whether it is a leftover.
    """
    return name.startswith(".") and name.endswith(TEMPORARY)


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
    # PyTorch's own writer does not pass on what the system said.
    hint = " Is the disk full?" if error.errno is None else ""
    return f"'{path}' could not be written: {str(error).rstrip('.')}.{hint}"


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
    write_text(path, json_text(data), overwrite)


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


def read_text(path: Path, what: str, largest: int = _LARGEST) -> str:
    """Read a text file of unknown origin, and no more of it than can be meant.

    Args:
        path: The file.
        what: What it should be ("plan", "record"), for the message.
        largest: Bytes that it may have.

    Returns:
        The text.

    Raises:
        DataError: If the file is missing, too large, no ordinary file, or not UTF-8 text.
    """
    path = Path(path)
    try:
        # A pipe or a device would never end, and a folder has no text.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DataError(f"{what} '{path}' is no ordinary file and was not read.")
        if path.stat().st_size > largest:
            raise DataError(f"{what} '{path}' is larger than {_size(largest)} and was not read.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{what} '{path}' does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} '{path}' could not be read: {error}.") from error
    except DataError:
        raise
    except ValueError as error:  # a name with a zero byte in it
        raise DataError(f"{what} {str(path)!r} could not be read: {error}.") from error


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >> 20 else f"{count >> 10} KiB"


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file with a clear error.

    Args:
        path: The file.
        what: What it should be ("plan", "record"), for the message.

    Returns:
        The parsed data.

    Raises:
        DataError: If the file is missing, too large, not text, not JSON, names a key twice, or
            holds what could not be written again: NaN, infinity, half a character.
    """
    text = read_text(path, what)
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} '{path}' is not valid JSON: {error}.") from error
