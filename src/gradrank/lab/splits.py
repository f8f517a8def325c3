"""Splits of examples: held out, for validation, or smaller; drawn by seed, never overlapping."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradrank.core.errors import DataError, OptionError, nearest

SPLITS = ("test", "validation")
# Each choice has a stream of its own, so that one of them does not move another.
_VALIDATION, _TRAIN, _EVAL = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Split:
    """Examples of one split.

    Attributes:
        inputs: Texts, pairs of texts, prompts, or pictures (paths, PIL images, arrays ``[height,
            width, 3]``, or what :func:`gradrank.lab.pictures.open_picture` opens).
        labels: Class index of each input; None for ``lm`` and ``instruct``.
    """

    inputs: Sequence[Any]
    labels: Sequence[int] | None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which examples are trained on and which are evaluated.

    Attributes:
        split: ``test`` evaluates the reported split; ``validation`` a part of the training data.
        validation: Examples that are held out of the training data, whichever split is evaluated.
        train_examples: At most so many of the others are trained on; None: all.
        eval_examples: At most so many of the split are evaluated; None: all.
        seed: Seed of all choices.
    """

    split: str = "test"
    validation: int = 0
    train_examples: int | None = None
    eval_examples: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Check all that can be checked without the data.

        Raises:
            OptionError: If a value is unknown or out of range.
        """
        if self.split not in SPLITS:
            raise OptionError(f"unknown split '{self.split}'. {nearest(self.split, SPLITS)}")
        if self.validation < 0:
            raise OptionError(f"validation is {self.validation}; it counts examples, 0 or more.")
        if self.split == "validation" and self.validation == 0:
            raise OptionError(
                "split 'validation' needs validation examples, but validation is 0. Say how many "
                "are to be held out of the training data."
            )
        for name in ("train_examples", "eval_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}; at least 1 is needed (or leave it out).")


def choose(train: Split, reported: Split, choice: Choice, where: str) -> tuple[Split, Split]:
    """Return what is trained on and what is evaluated.

    The training part is the same for both values of ``split`` and never holds a validation
    example. A smaller part is contained in every larger one of the same seed.

    Args:
        train: All training examples.
        reported: The split that the benchmark reports.
        choice: What was asked for.
        where: Name of the data, for messages.

    Returns:
        Both parts, each in the order of the data.

    Raises:
        DataError: If nothing would be left to train on.
    """
    count = len(train.inputs)
    if choice.validation >= count:
        raise DataError(
            f"data '{where}' has {count} training examples, so that {choice.validation} cannot be "
            f"held out for validation. Choose at most {count - 1}."
        )
    held = _drawn(count, choice.validation, choice.seed, _VALIDATION)
    taken = set(held)
    rest = [index for index in range(count) if index not in taken]
    kept = _drawn(len(rest), choice.train_examples, choice.seed, _TRAIN)
    evaluated = take(train, held) if choice.split == "validation" else reported
    few = _drawn(len(evaluated.inputs), choice.eval_examples, choice.seed, _EVAL)
    return take(train, [rest[index] for index in kept]), take(evaluated, few)


def hold_out(split: Split, fraction: float, seed: int, where: str) -> tuple[Split, Split]:
    """Part a split in two, at random, the same way for the same seed.

    Args:
        split: All examples.
        fraction: Share of the second part, in (0, 1).
        seed: Seed of the choice.
        where: Name of the data, for messages.

    Returns:
        The larger part and the held-out part, both in the order of ``split``.

    Raises:
        DataError: If there are fewer than two examples.
    """
    count = len(split.inputs)
    if count < 2:
        raise DataError(
            f"data '{where}' has {count} example(s); at least 2 are needed to hold one out for "
            f"evaluation. Give more data or an evaluation file."
        )
    size = min(max(round(count * fraction), 1), count - 1)
    chosen = set(np.random.default_rng(seed).permutation(count)[:size].tolist())
    kept = [index for index in range(count) if index not in chosen]
    return take(split, kept), take(split, sorted(chosen))


def take(split: Split, indices: Sequence[int]) -> Split:
    """Return some examples of a split.

    Args:
        split: All examples.
        indices: Which, in the order wanted.
    """
    labels = None if split.labels is None else [split.labels[index] for index in indices]
    return Split([split.inputs[index] for index in indices], labels)


def _drawn(count: int, size: int | None, seed: int, stream: int) -> list[int]:
    if size is None or size >= count:
        return list(range(count))
    order = np.random.default_rng([seed, stream]).permutation(count)
    return sorted(order[:size].tolist())
