"""Pictures as a data set: checked when listed, opened and normalised when asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from gradrank.core.errors import DataError


class Pictures(Dataset):
    """Pictures with a class each, opened and normalised when asked for.

    Attributes:
        pictures: Paths, PIL images or arrays ``[height, width, 3]``.
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
    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(_unreadable(path, error)) from error


def open_picture(picture: Any) -> Image.Image:
    """Return a picture in RGB.

    Args:
        picture: A path, a PIL image, or an array ``[height, width, 3]`` uint8.

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
        with Image.open(picture) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(_unreadable(picture, error)) from error


def _unreadable(path: Any, error: Exception) -> str:
    return f"picture '{path}' cannot be read ({error}). Replace or remove it."
