"""Token blocks and tokenised texts as data sets, and how they become batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

Batch = dict[str, torch.Tensor]


class Blocks(Dataset):
    """Token blocks of equal length for language modelling.

    Attributes:
        ids: Token ids, ``[blocks, max_length]``.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Texts(Dataset):
    """Tokenised texts of various lengths with a class each.

    Attributes:
        ids: Token ids of each text, or pair of texts.
        labels: Class index of each.
        types: Which text of its pair each token belongs to, for models that are told; or None.
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        labels: Sequence[int],
        types: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.ids, self.labels, self.types = ids, labels, types

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"input_ids": self.ids[index], "labels": self.labels[index]}
        return item if self.types is None else {**item, "token_type_ids": self.types[index]}


def collate_blocks(items: list[dict[str, Any]]) -> Batch:
    """Stack token blocks.

    Args:
        items: Items of :class:`Blocks`.

    Returns:
        ``input_ids`` and ``labels``, both ``[batch, length]``. No attention mask: nothing is
        padded, and models are quicker without one.
    """
    ids = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": ids, "labels": ids.clone()}


@dataclass(frozen=True)
class TextCollator:
    """Pad texts on the right to the longest of the batch.

    Attributes:
        pad: Id of the padding token.
    """

    pad: int

    def __call__(self, items: list[dict[str, Any]]) -> Batch:
        """Return ``input_ids``, ``attention_mask`` ``[batch, longest]``, ``labels`` ``[batch]``.

        For pairs of texts and models that are told, also ``token_type_ids`` ``[batch, longest]``.
        """
        sizes = torch.tensor([len(item["input_ids"]) for item in items])
        longest = int(sizes.max())
        batch = {
            "input_ids": _padded([item["input_ids"] for item in items], longest, self.pad),
            "attention_mask": (torch.arange(longest) < sizes[:, None]).long(),
        }
        if "token_type_ids" in items[0]:
            types = [item["token_type_ids"] for item in items]
            batch["token_type_ids"] = _padded(types, longest, 0)
        return {**batch, "labels": torch.tensor([item["labels"] for item in items])}


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    full = torch.full((len(rows), length), value, dtype=torch.long)
    for place, row in enumerate(rows):
        full[place, : len(row)] = torch.tensor(row, dtype=torch.long)
    return full
