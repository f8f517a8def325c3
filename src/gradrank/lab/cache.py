"""A cache folder whose entries are whole or absent, and are checked before each use.

An entry is built in a temporary neighbour, gets a manifest with the checksum of every file, and is
renamed into place under a lock. A process that dies in between leaves only a temporary folder,
which the next builder removes.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from gradrank.core.errors import DataError, GradrankError, OutputError
from gradrank.core.files import read_json, sha256_of, write_json

SCHEMA = "gradrank.asset/1"
MANIFEST = "manifest.json"

# What this process has verified: folder -> (size, modification time) of every file. A demo that
# loads the same weights for three methods hashes them once.
_VERIFIED: dict[Path, dict[str, tuple[int, int]]] = {}


def cache_root() -> Path:
    """Return the cache folder: ``GRADRANK_CACHE``, or ``gradrank`` in the user's cache folder."""
    given = os.environ.get("GRADRANK_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "gradrank"


def problem(folder: Path) -> str | None:
    """Check an entry against its manifest.

    Args:
        folder: The entry.

    Returns:
        None if every file is there with its checksum, else what is wrong, in a few words.
    """
    try:
        files = read_json(folder / MANIFEST, "manifest")["files"]
        if not files or not all(Path(name).name == name for name in files):
            return "its manifest is malformed"
        stamps = {name: stamp(folder / name) for name in files}
        for name, expected in files.items() if _VERIFIED.get(folder) != stamps else ():
            same = stamps[name][0] == expected["bytes"]
            if not same or sha256_of(folder / name) != expected["sha256"]:
                return f"'{name}' does not match its checksum"
    except FileNotFoundError as error:
        return f"'{Path(error.filename).name}' is missing"
    except (DataError, KeyError, TypeError, AttributeError, OSError):
        return "its manifest or a file cannot be read"
    _VERIFIED[folder] = stamps
    return None


def stamp(path: Path) -> tuple[int, int]:
    """Return size (bytes) and modification time (nanoseconds) of a file.

    Args:
        path: The file.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def ensure_entry(
    folder: Path,
    build: Callable[[Path, Path], dict[str, object]],
    say: Callable[[str], None],
    space: int = 0,
) -> None:
    """Make sure that an entry is there and whole; build it if not.

    Args:
        folder: Where the entry stands; its parent is created.
        build: ``build(scratch, target)`` writes the files of the entry into ``target`` (existing,
            empty) and returns what the manifest shall say beside the checksums.
        say: Receives one line for each thing that takes time or went wrong.
        space: Bytes that building needs on disk at its peak.
    """
    wrong = problem(folder) if folder.exists() else "absent"
    if wrong is None:
        return
    if wrong != "absent":
        say(f"cached '{folder.name}' is damaged ({wrong}); building it again")
    with _explained(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_space(folder.parent, space)
        with entry_lock(folder, say):
            if problem(folder) is not None:  # another process may have built it meanwhile
                _build(folder, build)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except GradrankError:
        raise
    except OSError as error:
        raise OutputError(
            f"the cache '{folder}' cannot be written: {error.strerror or error}. Free some space, "
            f"or set GRADRANK_CACHE to another folder."
        ) from error


def check_space(folder: Path, space: int) -> None:
    """Check that a folder's disk has room, before anything is fetched.

    Args:
        folder: An existing folder.
        space: Bytes needed.

    Raises:
        OutputError: If there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < space:
        raise OutputError(
            f"the cache '{folder}' needs {space / 1e9:.2f} GB but its disk has {free / 1e9:.2f} GB "
            f"left. Free some space, or set GRADRANK_CACHE to a folder on another disk."
        )


@contextlib.contextmanager
def entry_lock(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of an entry; say so if another process has it.

    Args:
        folder: The entry.
        say: Receives one line if there is something to wait for.

    Yields:
        Nothing.
    """
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        say(f"another process is preparing '{folder.name}'; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, build: Callable[[Path, Path], dict[str, object]]) -> None:
    # Only the holder of the lock is here, so temporary folders of this entry are left-overs.
    prefix = f".{folder.name}.tmp-"
    for stale in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        target = scratch / "entry"
        target.mkdir()
        about = build(scratch, target)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(target.iterdir())
        }
        write_json(target / MANIFEST, {"schema": SCHEMA, **about, "files": files})
        if folder.exists():
            folder.rename(scratch / "damaged")
        target.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _VERIFIED.pop(folder, None)
