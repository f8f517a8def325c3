"""Metrics as pairs of functions: what is summed over items, and what follows from the sums.

``NAME_terms`` takes items to ``[n, F]``; ``NAME`` takes sums ``[..., F]`` to values ``[...]``. A
quotient with the denominator 0 is 0.
"""

import numpy as np

from gradrank.evidence.items import Items

_LARGEST_LOSS = 700.0
"""Beyond this a perplexity is no number worth printing, and exp() would overflow."""


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide, with 0 where the denominator is 0."""
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), 0.0)


def _one_hot(codes: np.ndarray, size: int) -> np.ndarray:
    return (codes[:, None] == np.arange(size)).astype(float)


def _pair(items: Items) -> tuple[np.ndarray, np.ndarray]:
    """Return one-hot expected and predicted classes, ``[n, C]``, of the classes that occur."""
    both = np.concatenate([np.asarray(items.expected), np.asarray(items.predicted)])
    present, codes = np.unique(both, return_inverse=True)
    hot = _one_hot(codes, len(present))
    return hot[: items.size], hot[items.size :]


def loss_terms(items: Items) -> np.ndarray:
    """Return nats and predicted tokens."""
    return np.stack([np.asarray(items.nll), items.count], axis=1)


def loss(sums: np.ndarray) -> np.ndarray:
    """Return nats per token."""
    return _ratio(sums[..., 0], sums[..., 1])


def perplexity(sums: np.ndarray) -> np.ndarray:
    """Return the exponential of nats per token."""
    nats = loss(sums)
    return np.where(nats >= _LARGEST_LOSS, np.inf, np.exp(np.minimum(nats, _LARGEST_LOSS)))


def accuracy_terms(items: Items) -> np.ndarray:
    """Return for each part of the task what is right in it, and what is in it."""
    part = _one_hot(items.group, int(items.group.max()) + 1)
    return np.concatenate([part * np.asarray(items.right)[:, None], part], axis=1)


def accuracy(sums: np.ndarray) -> np.ndarray:
    """Return the mean over parts that have items of the share that is right."""
    right, count = np.split(sums, 2, axis=-1)
    return _ratio(right, count).sum(axis=-1) / (count > 0).sum(axis=-1)


def f1_terms(items: Items) -> np.ndarray:
    """Return true positives of class 1, and where it is expected and predicted."""
    expected, predicted = np.asarray(items.expected) == 1, np.asarray(items.predicted) == 1
    return np.stack([expected & predicted, expected, predicted], axis=1).astype(float)


def f1(sums: np.ndarray) -> np.ndarray:
    """Return F1 of class 1."""
    return _ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def accuracy_f1_terms(items: Items) -> np.ndarray:
    """Return the terms of F1, what is right, and ones."""
    right = np.asarray(items.right)[:, None]
    return np.concatenate([f1_terms(items), right, np.ones_like(right)], axis=1)


def accuracy_f1(sums: np.ndarray) -> np.ndarray:
    """Return the mean of accuracy and F1 of class 1."""
    return (f1(sums) + _ratio(sums[..., 3], sums[..., 4])) / 2


def macro_f1_terms(items: Items) -> np.ndarray:
    """Return for each class true positives, and how often it is expected or predicted."""
    expected, predicted = _pair(items)
    return np.concatenate([expected * predicted, expected + predicted], axis=1)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Return the mean of F1 over the classes that occur in the sums."""
    right, occurs = np.split(sums, 2, axis=-1)
    return _ratio(2 * right, occurs).sum(axis=-1) / (occurs > 0).sum(axis=-1)


def mcc_terms(items: Items) -> np.ndarray:
    """Return what is right, and for each class where it is expected and predicted."""
    return np.concatenate([np.asarray(items.right)[:, None], *_pair(items)], axis=1)


def mcc(sums: np.ndarray) -> np.ndarray:
    """Return the Matthews correlation of several classes.

    Args:
        sums: What is right, then per class how often it is expected, then predicted.

    Returns:
        Values from -1 to 1.

    Source:
        Gorodkin, Computational Biology and Chemistry 28 (2004), equation 2.
    """
    right = sums[..., 0]
    rows, columns = np.split(sums[..., 1:], 2, axis=-1)
    count = rows.sum(axis=-1)
    above = right * count - (rows * columns).sum(axis=-1)
    below = (count**2 - (columns**2).sum(axis=-1)) * (count**2 - (rows**2).sum(axis=-1))
    return _ratio(above, np.sqrt(np.maximum(below, 0.0)))
