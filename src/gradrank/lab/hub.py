"""Public data sets by name, through the datasets library. Needs the network or its cache."""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from gradrank.core.errors import DataError
from gradrank.lab.pictures import StoredPicture
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
        DataError: If the data set cannot be had, or has no training split.
    """
    absent = "There is no such file here; a public data set needs the network or its local cache."
    loaded = _load(name, f"{absent} {hint}")
    if "train" not in loaded:
        raise DataError(
            f"data set '{name}' has no split 'train'. Known: {', '.join(map(str, loaded))}."
        )
    held = next((split for split in HELD_OUT if split in loaded), None)
    return _named_rows(loaded["train"]), None if held is None else _named_rows(loaded[held])


def read_splits(name: str, splits: Sequence[str], hint: str = "") -> list[list[Row]]:
    """Read splits of a public data set by their names.

    Args:
        name: ``name`` or ``name:configuration``.
        splits: Names of splits.
        hint: A sentence that is added when the data set cannot be had.

    Returns:
        The rows of each split, class numbers replaced by names.
    """
    return [_named_rows(split) for split in _splits(name, splits, hint)]


def read_picture_splits(
    name: str, splits: Sequence[str], image: str, label: str, hint: str = ""
) -> list[tuple[list[Any], list[Any]]]:
    """Read splits of a public data set of pictures; each picture is decoded when it is opened.

    Args:
        name: ``name`` or ``name:configuration``.
        splits: Names of splits.
        image: Column of the picture.
        label: Column of the class.
        hint: A sentence that is added when the data set cannot be had.

    Returns:
        Pictures and class names of each split.

    Raises:
        DataError: If the data set cannot be had or lacks a column.
    """
    found = []
    for split in _splits(name, splits, hint):
        for column in (image, label):
            if column not in split.features:
                raise DataError(
                    f"data set '{name}' has no column '{column}'. Known: "
                    f"{', '.join(split.features)}."
                )
        names = getattr(split.features[label], "names", None)
        labels = [names[value] if names else value for value in split[label]]
        found.append(([HubPicture(split, index, image) for index in range(len(split))], labels))
    return found


@dataclass(frozen=True, slots=True, repr=False)
class HubPicture(StoredPicture):
    """A picture of a public data set, decoded when it is opened.

    Attributes:
        split: The split.
        index: Its row.
        column: Its column.
    """

    split: Any
    index: int
    column: str

    def __repr__(self) -> str:
        return f"row {self.index} of a public data set"

    def open(self) -> Image.Image:
        """Return the decoded picture."""
        return self.split[self.index][self.column]


def _splits(name: str, splits: Sequence[str], hint: str) -> list[Any]:
    loaded = _load(name, hint)
    absent = [split for split in splits if split not in loaded]
    if absent:
        known = ", ".join(map(str, loaded))
        raise DataError(f"data set '{name}' has no split '{absent[0]}'. Known: {known}.")
    return [loaded[split] for split in splits]


def _load(name: str, hint: str) -> Any:
    """Return all splits of a public data set.

    Raises:
        DataError: If the library is missing or the data set cannot be had.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"public data set '{name}' needs the package 'datasets', which is not installed. Run: "
            f"pip install 'gradrank[train]'. {hint}".rstrip()
        )
    import datasets  # truly optional: an extra, and slow to import

    path, _, configuration = name.partition(":")
    try:
        with _no_bars(datasets):
            return datasets.load_dataset(path, configuration or None)
    except Exception as error:  # the library raises many kinds for "not there"
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise DataError(
            f"data set '{name}' could not be had ({reason}). {hint}".rstrip()
        ) from error


@contextlib.contextmanager
def _no_bars(datasets: Any) -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    try:
        datasets.disable_progress_bar()
        yield
    finally:
        if shown:
            datasets.enable_progress_bar()


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
