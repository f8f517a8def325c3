"""Encode examples for one model: token blocks, padded texts, prompts, or pixel values."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from gradrank.core.errors import DataError, OptionError
from gradrank.lab.benchmarks.prompts import Parse, Prompt
from gradrank.lab.data import Examples
from gradrank.lab.instruct import PromptCollator, Prompts, encode_prompts
from gradrank.lab.models import LoadedModel, model_head
from gradrank.lab.pictures import Pictures, check_picture, collate_pictures
from gradrank.lab.splits import Split
from gradrank.lab.texts import Batch, Blocks, TextCollator, Texts, collate_blocks

_CHUNK = 1000


@dataclass(frozen=True)
class Answering:
    """How the answers of an instruction task are found.

    Attributes:
        prompts: The prompts of the evaluation split.
        tokenizer: The model's tokenizer.
        parse: Finds the answer in what was written.
        scoring: ``generate`` or ``likelihood``.
        max_new_tokens: Longest answer, tokens.
        max_length: Longest prompt, tokens.
    """

    prompts: Sequence[Prompt]
    tokenizer: Any
    parse: Parse
    scoring: str
    max_new_tokens: int
    max_length: int


@dataclass(frozen=True)
class TaskData:
    """Encoded data of both splits.

    Attributes:
        train: Training data set.
        eval: Evaluation data set.
        kind: ``lm``, ``classification``, ``image`` or ``instruct``.
        collate: Makes a batch of items: a dict of tensors that the model takes, with ``labels``.
        num_labels: Number of classes, or None.
        label_names: Names of the classes.
        metric: The metric that counts.
        describe: ``name``, ``source``, ``licence``, sizes and lengths, for the record.
        answering: How answers are found, where the task asks for them.
    """

    train: Dataset
    eval: Dataset
    kind: str
    collate: Callable[[list[dict[str, Any]]], Batch]
    num_labels: int | None
    label_names: tuple[str, ...]
    metric: str
    describe: dict[str, Any]
    answering: Answering | None = None

    @property
    def lengths(self) -> list[int] | None:
        """Tokens of each training example; None where all are equally long."""
        if isinstance(self.train, Texts | Prompts):
            return [len(ids) for ids in self.train.ids]
        return None

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


_Encoded = tuple[Dataset, Dataset, Callable[[list[dict[str, Any]]], Batch]]


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
    if loaded.head != model_head(examples.head):
        raise OptionError(
            f"the data needs the head '{examples.head}', but model '{loaded.name}' was loaded with "
            f"'{loaded.head}'."
        )
    length = checked_length(max_length, loaded, examples.head)
    train, held, collate = _ENCODERS[examples.head](examples, loaded, length)
    about = {**examples.describe, "train_examples": size_of(train), "eval_examples": size_of(held)}
    if isinstance(train, Blocks) and isinstance(held, Blocks):
        about |= {"train_tokens": train.ids.numel(), "eval_tokens": held.ids.numel()}
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
        answering=_answering(examples, loaded, length),
    )


def _encode_blocks(examples: Examples, loaded: LoadedModel, length: int) -> _Encoded:
    train = pack(examples.train.inputs, loaded.tokenizer, length, "training")
    held = pack(examples.eval.inputs, loaded.tokenizer, length, "evaluation")
    return train, held, collate_blocks


def _encode_texts(examples: Examples, loaded: LoadedModel, length: int) -> _Encoded:
    train, held = (_texts(split, loaded, length) for split in (examples.train, examples.eval))
    return train, held, TextCollator(loaded.tokenizer.pad_token_id)


def _encode_prompts(examples: Examples, loaded: LoadedModel, length: int) -> _Encoded:
    train, held = (
        encode_prompts(split.inputs, loaded.tokenizer, length)
        for split in (examples.train, examples.eval)
    )
    return train, held, PromptCollator(loaded.tokenizer.pad_token_id)


def _encode_pictures(examples: Examples, loaded: LoadedModel, _length: int) -> _Encoded:
    train, held = (_pictures(split, loaded) for split in (examples.train, examples.eval))
    return train, held, collate_pictures


_ENCODERS: dict[str, Callable[[Examples, LoadedModel, int], _Encoded]] = {
    "lm": _encode_blocks,
    "classification": _encode_texts,
    "instruct": _encode_prompts,
    "image": _encode_pictures,
}


def _answering(examples: Examples, loaded: LoadedModel, length: int) -> Answering | None:
    task = examples.task
    if task is None or task.parse is None:
        return None
    return Answering(
        prompts=examples.eval.inputs,
        tokenizer=loaded.tokenizer,
        parse=task.parse,
        scoring=examples.scoring,
        max_new_tokens=task.max_new_tokens,
        max_length=length,
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


def _texts(split: Split, loaded: LoadedModel, length: int) -> Texts:
    ids: list[list[int]] = []
    types: list[list[int]] = []
    paired = isinstance(split.inputs[0], tuple)
    for start in range(0, len(split.inputs), _CHUNK):
        chunk = list(split.inputs[start : start + _CHUNK])
        texts = [list(column) for column in zip(*chunk, strict=True)] if paired else [chunk]
        encoded = loaded.tokenizer(*texts, truncation=True, max_length=length, verbose=False)
        ids.extend(encoded["input_ids"])
        types.extend(encoded.get("token_type_ids", ()) if paired else ())
    empty = next((row for row, tokens in enumerate(ids) if not tokens), None)
    if empty is not None:
        raise DataError(f"the text {split.inputs[empty][:40]!r} has no tokens. Remove it.")
    return Texts(ids, split.labels or [], types or None)


def _pictures(split: Split, loaded: LoadedModel) -> Pictures:
    for picture in split.inputs:
        if isinstance(picture, str | Path):
            check_picture(Path(picture))
    return Pictures(split.inputs, split.labels or [], loaded.image_processor)
