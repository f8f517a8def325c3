"""Folders that are known to be whole: a marker with checksums is written last.

A checkpoint is many files, written one after another; a process that dies in between leaves a
folder that looks like one. Only a folder whose marker matches every file counts.
"""

from pathlib import Path

from gradrank.core.errors import DataError
from gradrank.core.files import read_json, sha256_of, write_json

MARKER = "complete.json"
PREFIX = "checkpoint-"


def seal(folder: Path) -> None:
    """Mark a folder as whole, once everything in it is written.

    Args:
        folder: The folder.
    """
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }
    write_json(folder / MARKER, {"files": files})


def is_complete(folder: Path, needs: str = "") -> bool:
    """Tell whether a folder is whole.

    Args:
        folder: The folder.
        needs: A file that must be among those the marker names.

    Returns:
        Whether its marker is there and matches every file it names.
    """
    try:
        files = read_json(folder / MARKER, "marker")["files"]
        return (not needs or needs in files) and all(
            _inside(folder, name)
            and (folder / name).stat().st_size == expected["bytes"]
            and sha256_of(folder / name) == expected["sha256"]
            for name, expected in files.items()
        )
    except (DataError, OSError, KeyError, TypeError, AttributeError, ValueError):
        return False


def _inside(folder: Path, name: str) -> bool:
    """Whether a name is that of an ordinary file of the folder; others may never end."""
    path = folder / name
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def last_complete(folder: Path, needs: str = "") -> Path | None:
    """Find the newest whole checkpoint.

    Args:
        folder: The folder that holds ``checkpoint-<step>`` folders.
        needs: A file that it must hold.

    Returns:
        The one with the most steps, or None.
    """
    found = [
        path
        for path in folder.glob(f"{PREFIX}*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    ]
    ordered = sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in ordered if is_complete(path, needs)), None)
