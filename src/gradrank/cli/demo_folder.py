"""The folder of a demo: a second demo may replace it, but only if nothing else is in it."""

from pathlib import Path

from gradrank.core.errors import DataError, OutputError
from gradrank.core.files import read_json, write_json

MARKER = ".gradrank-demo.json"
SCHEMA = "gradrank.demo/1"


def check_demo_folder(path: Path) -> None:
    """Refuse a folder that would lose something.

    Args:
        path: The folder.

    Raises:
        OutputError: If it is a file, no demo's folder, or holds files that the demo did not write.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"'{path}' is a file, but a folder is to be written there.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    try:
        data = read_json(path / MARKER, "marker")
        known = set(data["files"]) if data["schema"] == SCHEMA else None
    except (DataError, KeyError, TypeError):
        known = None
    if known is None:
        raise OutputError(
            f"folder '{path}' exists and no demo made it, so it is not replaced. Choose another "
            "--out."
        )
    foreign = sorted(_files(path) - known)
    if foreign:
        raise OutputError(
            f"folder '{path}' holds '{foreign[0]}', which the demo did not write ({len(foreign)} "
            "such files), so it is not replaced. Move that away, or choose another --out."
        )


def mark(path: Path) -> None:
    """Write down what a finished demo wrote.

    Args:
        path: Its folder.
    """
    write_json(path / MARKER, {"schema": SCHEMA, "files": sorted(_files(path))})


def _files(path: Path) -> set[str]:
    found = (item.relative_to(path).as_posix() for item in path.rglob("*") if not item.is_dir())
    return {name for name in found if name != MARKER}
