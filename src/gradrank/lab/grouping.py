"""Batches of examples of like length, so that little of a batch is padding."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from gradrank.core.errors import OptionError
from gradrank.lab.encode import TaskData
from gradrank.lab.settings import TrainSettings

# Batches that are cut from one random pool: sorted by length inside it, never across pools.
POOL = 50


def grouped_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Return an order of examples in which neighbours of one batch are of like length.

    The examples are shuffled, cut into pools of 50 batches and sorted by length inside each pool;
    the batches are then shuffled. What fills no batch is drawn at random, anew in each epoch, and
    comes last. The batch with the longest example comes first in the first epoch: if memory
    does not suffice, it shows at once.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples in a batch.
        seed: Seed of the order.
        epoch: Pass over the data, from 0; each has an order of its own.

    Returns:
        Every index once.
    """
    rng = np.random.default_rng([seed, epoch])
    sizes = np.asarray(lengths)
    order = rng.permutation(len(sizes))
    whole = len(order) - len(order) % batch_size
    batches: list[np.ndarray] = []
    for start in range(0, whole, POOL * batch_size):
        pool = order[start : min(start + POOL * batch_size, whole)]
        ranked = pool[np.argsort(-sizes[pool], kind="stable")]
        batches.extend(ranked.reshape(-1, batch_size))
    batches = [batches[place] for place in rng.permutation(len(batches))]
    if epoch == 0 and batches:
        first = max(range(len(batches)), key=lambda place: sizes[batches[place]].max())
        batches[0], batches[first] = batches[first], batches[0]
    return [int(index) for batch in (*batches, order[whole:]) for index in batch]


class GroupedSampler(Sampler[int]):
    """Deals out :func:`grouped_order`; the same seed and epoch give the same order.

    Attributes:
        epoch: The pass over the data that comes next; the Trainer sets it.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """Prepare.

        Args:
            lengths: Tokens of each example.
            batch_size: Examples in a batch.
            seed: Seed of the order.
        """
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data comes next.

        Args:
            epoch: The pass, from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Return the indices of one pass."""
        yield from grouped_order(self._lengths, self._batch_size, self._seed, self.epoch)


def sampler_for(data: TaskData, settings: TrainSettings) -> GroupedSampler | None:
    """Return what deals out the training examples.

    Args:
        data: Encoded data.
        settings: How to train.

    Returns:
        The sampler; None for a random order.

    Raises:
        OptionError: If the examples cannot be grouped by length.
    """
    if not settings.group_by_length:
        return None
    if data.lengths is None:
        same = "pictures of one size" if data.kind == "image" else "full blocks of max_length"
        raise OptionError(
            f"group_by_length has nothing to group: the head '{data.kind}' trains on {same}, "
            "without padding. Leave it out."
        )
    return GroupedSampler(data.lengths, settings.batch_size, settings.seed)
