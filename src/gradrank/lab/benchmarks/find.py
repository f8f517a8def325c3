"""Find public data: in the folder that the user named, in ``GRADRANK_DATA``, or on the hub."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from gradrank.core.errors import DataError
from gradrank.core.switches import switched_on
from gradrank.lab.benchmarks.task import Where

VARIABLE = "GRADRANK_DATA"
T = TypeVar("T")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def data_folders(where: Where) -> list[Path]:
    """Return the local folders to search, the first first.

    Args:
        where: What the user said.

    Returns:
        ``data_dir`` and the folder in the environment's ``GRADRANK_DATA``, as far as given.

    Raises:
        DataError: If one of them is no folder.
    """
    found = []
    for name, given in (("data_dir", where.data_dir), (VARIABLE, os.environ.get(VARIABLE))):
        if not given:
            continue
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise DataError(
                f"{name} '{given}' is no folder. Give the folder that holds the public data sets."
            )
        found.append(folder)
    return found


def find_file(where: Where, names: Sequence[str]) -> Path | None:
    """Look a file up.

    Args:
        where: What the user said.
        names: Paths relative to a data folder; each may also end in ``.gz``.

    Returns:
        The first that is there, or None.
    """
    for folder in data_folders(where):
        for name in names:
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    return path
    return None


def offline() -> bool:
    """Tell whether the environment forbids asking the hub."""
    return any(switched_on(name) for name in _OFFLINE)


def from_hub(task: str, hub: str, where: Where, wanted: str, read: Callable[[], T]) -> T:
    """Read the hub's copy of data that is in no local folder.

    Args:
        task: Name of the task.
        hub: Name of the data set on the hub.
        where: What the user said.
        wanted: What was looked for in local folders, and what of it was found.
        read: Reads it.

    Returns:
        What ``read`` returns.

    Raises:
        DataError: If the hub's copy cannot be had either; it says where all was looked for.
    """
    if where.say is not None:
        where.say(f"reading '{hub}' from the public hub or its local cache")
    try:
        return read()
    except DataError as error:
        folders = [f"'{folder}'" for folder in data_folders(where)]
        places = " and ".join(folders) or f"no local folder (data_dir and {VARIABLE} are not set)"
        raise DataError(
            f"the data of task '{task}' is not there. Looked in {places} for {wanted}. The public "
            f"hub: {error} Put the files into a folder and name it with --data-dir or {VARIABLE}, "
            f"or run once with the network and the package 'datasets' installed."
        ) from error
