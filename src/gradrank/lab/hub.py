"""Public data sets by name, through the datasets library. Needs the network or its cache."""

import importlib.util
from typing import Any

from gradrank.core.errors import DataError
from gradrank.lab.readers import Row

HELD_OUT = ("validation", "valid", "dev")


def read_public(name: str, hint: str) -> tuple[list[Row], list[Row] | None]:
    """Read a public data set.

    Args:
        name: ``name`` or ``name:configuration``.
        hint: A sentence that is added when the data set cannot be had.

    Returns:
        Rows of the training split, and of its validation split if it has one. A test split is
        never touched.

    Raises:
        DataError: If the library is missing or the data set cannot be had.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"public data set '{name}' needs the package 'datasets', which is not installed. Run: "
            f"pip install 'gradrank[train]'. {hint}"
        )
    import datasets  # truly optional: an extra, and slow to import

    path, _, configuration = name.partition(":")
    bars = datasets.is_progress_bar_enabled()
    try:
        datasets.disable_progress_bar()
        loaded = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # the library raises many kinds for "not there"
        first = str(error).strip().splitlines()
        raise DataError(
            f"data set '{name}' could not be had ({first[0] if first else error!r}). There is no "
            f"such file here; a public data set needs the network or its local cache. {hint}"
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bar()
    if "train" not in loaded:
        raise DataError(
            f"data set '{name}' has no split 'train'. Known: {', '.join(map(str, loaded))}."
        )
    held = next((split for split in HELD_OUT if split in loaded), None)
    return _named_rows(loaded["train"]), None if held is None else _named_rows(loaded[held])


def _named_rows(split: Any) -> list[Row]:
    """Return rows with class numbers replaced by their names."""
    names = {
        column: feature.names
        for column, feature in split.features.items()
        if getattr(feature, "names", None)
    }
    rows = []
    for row in split:
        for column, known in names.items():
            value = row[column]
            row[column] = known[value] if isinstance(value, int) and value >= 0 else None
        rows.append(row)
    return rows
