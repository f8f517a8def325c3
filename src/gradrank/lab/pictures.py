"""Pictures as a data set: checked when listed, opened and normalised when asked for."""

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from gradrank.core.errors import DataError

FAULTS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class StoredPicture(ABC):
    """A picture that is no file of its own."""

    __slots__ = ()

    @abstractmethod
    def open(self) -> Image.Image:
        """Return the decoded picture."""


@dataclass(frozen=True, slots=True)
class PackedPicture(StoredPicture):
    """A picture inside a file that holds many, one after another.

    Attributes:
        path: The file.
        start: Position of its first byte.
        size: Bytes.
        name: What it is called in messages.
    """

    path: Path
    start: int
    size: int
    name: str

    def open(self) -> Image.Image:
        """Return the decoded picture."""
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            data = stream.read(self.size)
        picture = Image.open(io.BytesIO(data))
        picture.load()
        return picture


class Pictures(Dataset):
    """Pictures with a class each, opened and normalised when asked for.

    Attributes:
        pictures: Paths, PIL images, arrays ``[height, width, 3]`` or stored pictures.
        labels: Class index of each picture.
        processor: The model's image processor.
    """

    def __init__(self, pictures: Sequence[Any], labels: Sequence[int], processor: Any) -> None:
        self.pictures, self.labels, self.processor = pictures, labels, processor

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = open_picture(self.pictures[index])
        pixels = self.processor(picture, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.labels[index]}


def collate_pictures(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack pictures.

    Args:
        items: Items of :class:`Pictures`.

    Returns:
        ``pixel_values`` ``[batch, channels, height, width]`` and ``labels`` ``[batch]``.
    """
    pixels = torch.stack([item["pixel_values"] for item in items])
    return {"pixel_values": pixels, "labels": torch.tensor([item["labels"] for item in items])}


def check_picture(path: Path) -> None:
    """Check that a file is a picture, without decoding all of it.

    Args:
        path: The file.

    Raises:
        DataError: If it is not there or not a picture.
    """
    if not path.is_file():
        # A pipe would be waited for, and a device never ends.
        raise DataError(
            _unreadable(path, OSError("no such file" if not path.exists() else "no file"))
        )
    try:
        with Image.open(path) as picture:
            picture.verify()
    except FAULTS as error:
        raise DataError(_unreadable(path, error)) from error


def open_picture(picture: Any) -> Image.Image:
    """Return a picture in RGB.

    Args:
        picture: A path, a PIL image, an array ``[height, width, 3]`` uint8, or a stored picture.

    Returns:
        The picture.

    Raises:
        DataError: If a file cannot be read.
    """
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    try:
        if isinstance(picture, StoredPicture):
            return picture.open().convert("RGB")
        with Image.open(picture) as opened:
            return opened.convert("RGB")
    except FAULTS as error:
        raise DataError(_unreadable(picture, error)) from error


def _unreadable(path: Any, error: Exception) -> str:
    return f"picture '{path}' cannot be read ({error}). Replace or remove it."
