"""Encode examples for one model: token blocks, padded texts, or pixel values."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from gradrank.core.errors import DataError, OptionError
from gradrank.lab.data import Examples, Split
from gradrank.lab.models import LoadedModel
from gradrank.lab.pictures import Pictures, check_picture, collate_pictures

Batch = dict[str, torch.Tensor]
_CHUNK = 1000


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
        ids: Token ids of each text.
        labels: Class index of each text.
    """

    def __init__(self, ids: Sequence[Sequence[int]], labels: Sequence[int]) -> None:
        self.ids, self.labels = ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


@dataclass(frozen=True)
class TaskData:
    """Encoded data of both splits.

    Attributes:
        train: Training data set.
        eval: Evaluation data set.
        kind: ``lm``, ``classification`` or ``image``.
        collate: Makes a batch of items: a dict of tensors that the model takes, with ``labels``.
        num_labels: Number of classes, or None.
        label_names: Names of the classes.
        metric: The metric that counts.
        describe: ``name``, ``source``, ``licence``, sizes and lengths, for the record.
    """

    train: Dataset
    eval: Dataset
    kind: str
    collate: Callable[[list[dict[str, Any]]], Batch]
    num_labels: int | None
    label_names: tuple[str, ...]
    metric: str
    describe: dict[str, Any]

    def batches(self, count: int, batch_size: int, seed: int = 0) -> Iterator[Batch]:
        """Draw batches of the training data, for measuring.

        Args:
            count: Number of batches.
            batch_size: Examples in each.
            seed: Seed of the order.

        Yields:
            Batches; examples repeat only after all have been drawn once.
        """
        size, rng = size_of(self.train), np.random.default_rng(seed)
        order: list[int] = []
        for _ in range(count):
            while len(order) < batch_size:
                order.extend(rng.permutation(size).tolist())
            chosen, order = order[:batch_size], order[batch_size:]
            yield self.collate([self.train[index] for index in chosen])


def size_of(data: Dataset) -> int:
    """Return the number of examples.

    Args:
        data: A data set with a length.
    """
    return len(data)  # pyright: ignore[reportArgumentType]


def load_task_data(
    examples: Examples, loaded: LoadedModel, max_length: int | None = None
) -> TaskData:
    """Encode examples for a model.

    Args:
        examples: Checked examples.
        loaded: The model with its tokenizer or image processor.
        max_length: Longest sequence, tokens; None takes 256, or less if the model has fewer
            positions. Language modelling uses blocks of exactly this length.

    Returns:
        The encoded data.

    Raises:
        OptionError: If the model has another head, or ``max_length`` is out of its range.
    """
    if loaded.head != examples.head:
        raise OptionError(
            f"the data needs the head '{examples.head}', but model '{loaded.name}' was loaded with "
            f"'{loaded.head}'."
        )
    length = checked_length(max_length, loaded, examples.head)
    about = dict(examples.describe)
    if examples.head == "image":
        train, held = (_pictures(split, loaded) for split in (examples.train, examples.eval))
        collate = collate_pictures
    elif examples.head == "lm":
        train = pack(examples.train.inputs, loaded.tokenizer, length, "training")
        held = pack(examples.eval.inputs, loaded.tokenizer, length, "evaluation")
        collate = collate_blocks
        about |= {"train_tokens": train.ids.numel(), "eval_tokens": held.ids.numel()}
    else:
        train, held = (_texts(split, loaded, length) for split in (examples.train, examples.eval))
        collate = TextCollator(loaded.tokenizer.pad_token_id)
    about |= {"train_examples": len(train), "eval_examples": len(held)}
    if examples.head != "image":
        about["max_length"] = length
    return TaskData(
        train=train,
        eval=held,
        kind=examples.head,
        collate=collate,
        num_labels=len(examples.label_names) or None,
        label_names=examples.label_names,
        metric=examples.metric,
        describe=about,
    )


def checked_length(max_length: int | None, loaded: LoadedModel, head: str) -> int:
    """Return the sequence length to use.

    Args:
        max_length: What was asked for, tokens, or None.
        loaded: The model.
        head: The head; language modelling needs at least 2 tokens.

    Returns:
        Tokens.

    Raises:
        OptionError: If the length is too small, or above what the model has positions for.
    """
    limit = loaded.max_length
    if max_length is None:
        return min(256, limit or 256)
    least = 2 if head == "lm" else 1
    if max_length < least:
        raise OptionError(f"max_length is {max_length}; at least {least} is needed.")
    if head != "image" and limit is not None and max_length > limit:
        raise OptionError(
            f"max_length is {max_length}, but model '{loaded.name}' has positions for {limit} "
            f"tokens only. Choose at most {limit}."
        )
    return max_length


def pack(texts: Sequence[str], tokenizer: Any, length: int, split: str) -> Blocks:
    """Join texts with the end token between them, and cut the whole into blocks.

    Args:
        texts: The documents.
        tokenizer: The model's tokenizer.
        length: Tokens of a block. What is left at the end and fills no block is dropped.
        split: Name of the split, for messages.

    Returns:
        Blocks without padding.

    Raises:
        DataError: If there is no end token, or not one whole block.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end token to put between documents.")
    pieces = []
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        encoded = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.extend(np.asarray([*ids, end], dtype=np.int64) for ids in encoded)
    stream = np.concatenate(pieces)
    blocks = len(stream) // length
    if blocks == 0:
        raise DataError(
            f"the {split} data has {len(stream)} tokens, not one block of {length}. Give more text"
            f" or choose max_length at most {len(stream)}."
        )
    return Blocks(torch.from_numpy(stream[: blocks * length].reshape(blocks, length)))


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
        """Return ``input_ids``, ``attention_mask`` ``[batch, longest]``, ``labels`` ``[batch]``."""
        longest = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), longest), self.pad, dtype=torch.long)
        mask = torch.zeros((len(items), longest), dtype=torch.long)
        for row, item in enumerate(items):
            size = len(item["input_ids"])
            ids[row, :size] = torch.tensor(item["input_ids"], dtype=torch.long)
            mask[row, :size] = 1
        labels = torch.tensor([item["labels"] for item in items])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _texts(split: Split, loaded: LoadedModel, length: int) -> Texts:
    ids: list[list[int]] = []
    for start in range(0, len(split.inputs), _CHUNK):
        chunk = list(split.inputs[start : start + _CHUNK])
        encoded = loaded.tokenizer(chunk, truncation=True, max_length=length, verbose=False)
        ids.extend(encoded["input_ids"])
    empty = next((row for row, tokens in enumerate(ids) if not tokens), None)
    if empty is not None:
        raise DataError(f"the text {split.inputs[empty][:40]!r} has no tokens. Remove it.")
    return Texts(ids, split.labels or [])


def _pictures(split: Split, loaded: LoadedModel) -> Pictures:
    for picture in split.inputs:
        if isinstance(picture, str | Path):
            check_picture(Path(picture))
    return Pictures(split.inputs, split.labels or [], loaded.image_processor)
