"""Metrics of benchmarks, as functions of sums over items.

Every metric here is a smooth function of a few sums: accuracy of how many are right, F1 of true
positives and of what was predicted and expected, perplexity of log-likelihoods and tokens. A
bootstrap needs thousands of evaluations on resampled items, and each is then one row of a matrix
product ``weights [R, n] @ terms [n, F]``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradrank.core.errors import DataError, OptionError, nearest
from gradrank.evidence import sums
from gradrank.evidence.items import Items, read_items

_ENTRIES = 1 << 22
"""Most entries of a matrix of weights at a time: 32 MiB."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Attributes:
        name: Name in recipes, records and tables.
        higher_is_better: Its direction.
        kinds: Kinds of items that it is defined for.
        describe: What it is, in a sentence.
        lowest: Least possible value.
        highest: Largest possible value.
        terms: From items to what is summed over them, ``[n, F]``.
        finish: From sums ``[..., F]`` to values ``[...]``.
        binary: Whether it needs class indices 0 and 1 only.
    """

    name: str
    higher_is_better: bool
    kinds: tuple[str, ...]
    describe: str
    lowest: float
    highest: float
    terms: Callable[[Items], np.ndarray] = field(repr=False)
    finish: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    binary: bool = False

    def applies(self, items: Items) -> bool:
        """Tell whether the metric is defined for these items.

        Args:
            items: The items.

        Returns:
            Whether they are of its kind and hold what it needs.
        """
        if items.kind not in self.kinds:
            return False
        if self.name in {"eval_loss", "perplexity"}:
            return items.nll is not None
        return not self.binary or bool(_max_class(items) <= 1)


def find_metric(name: str) -> Metric:
    """Return a metric by name.

    Args:
        name: Its name.

    Returns:
        The metric.

    Raises:
        OptionError: If there is none of that name.
    """
    if name not in METRICS:
        raise OptionError(f"metric '{name}' is unknown. {nearest(name, METRICS)}")
    return METRICS[name]


def metric_value(
    name: str, items: Mapping[str, Any] | Items, index: np.ndarray | None = None
) -> float:
    """Evaluate a metric on a run's items.

    Args:
        name: Name of the metric.
        items: The record's ``items``.
        index: Which items, repeats allowed, ``[m]``; None takes each once.

    Returns:
        The value, NaN or infinite for a run that diverged. Where a metric is undefined it has the
        value that its entry in :data:`METRICS` states.
    """
    read = read_items(items)
    chosen = np.arange(read.size) if index is None else np.asarray(index)
    return float(metric_over(name, read, chosen[None, :])[0])


def metric_over(name: str, items: Mapping[str, Any] | Items, index: np.ndarray) -> np.ndarray:
    """Evaluate a metric on many resamples of a run's items.

    Args:
        name: Name of the metric.
        items: The record's ``items``.
        index: Which items, repeats allowed, ``[R, m]``.

    Returns:
        Values, ``[R]``.
    """
    return metric_of_runs(name, [read_items(items)], index)[:, 0]


def metric_of_runs(name: str, runs: Sequence[Items], index: np.ndarray) -> np.ndarray:
    """Evaluate a metric on the same resamples of the items of many runs.

    Args:
        name: Name of the metric.
        runs: Items of each run, all of one size n.
        index: Which items, the same for all runs, ``[R, m]``.

    Returns:
        Values, ``[R, runs]``.

    Raises:
        DataError: If the runs differ in size, or the metric is not defined for one of them.
    """
    metric, sizes = find_metric(name), sorted({run.size for run in runs})
    if len(sizes) != 1:
        raise DataError(f"runs of {sizes} items share no resample; they must be of one size.")
    values = np.empty((len(index), len(runs)))
    step = max(1, _ENTRIES // sizes[0])
    for start in range(0, len(index), step):
        weights = _weights(index[start : start + step], sizes[0])
        values[start : start + step] = _weighted(metric, runs, weights)
    return values


def metric_values(items: Mapping[str, Any] | Items) -> dict[str, float]:
    """Evaluate every metric that is defined for the items.

    Args:
        items: The record's ``items``.

    Returns:
        Values by name.
    """
    read = read_items(items)
    return {
        name: metric_value(name, read) for name, metric in METRICS.items() if metric.applies(read)
    }


def _terms(metric: Metric, items: Items) -> np.ndarray:
    if metric.applies(items):
        return metric.terms(items)
    if metric.binary and items.kind in metric.kinds:
        raise DataError(
            f"metric '{metric.name}' is about class 1 of two classes, and class "
            f"{_max_class(items)} occurs. Take 'macro_f1' or 'accuracy'."
        )
    raise DataError(
        f"metric '{metric.name}' is not defined for items of kind '{items.kind}'"
        f"{'' if items.kind not in metric.kinds else ' without nll'}."
    )


def _weighted(metric: Metric, runs: Sequence[Items], weights: np.ndarray) -> np.ndarray:
    """Return values, ``[rows, runs]``; several runs share a product while they fit."""
    found: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    for place, run in enumerate(runs):
        waiting.append(_terms(metric, run))
        entries = sum(part.size for part in waiting)
        if entries < _ENTRIES and place + 1 < len(runs):
            continue
        ends = np.cumsum([part.shape[1] for part in waiting])[:-1]
        # A diverged run (NaN, infinity) shows in its value, not in a warning.
        with np.errstate(invalid="ignore", over="ignore"):
            totals = np.split(weights @ np.concatenate(waiting, axis=1), ends, axis=1)
            found.extend(metric.finish(part) for part in totals)
        waiting = []
    return np.stack(found, axis=1)


def _weights(index: np.ndarray, n: int) -> np.ndarray:
    """Return how often each resample has each item, ``[rows, n]``."""
    flat = (index + np.arange(len(index))[:, None] * n).ravel()
    return np.bincount(flat, minlength=len(index) * n).reshape(len(index), n).astype(float)


def _max_class(items: Items) -> int:
    if items.expected is None or items.predicted is None:
        return 0
    return int(max(items.expected.max(), items.predicted.max()))


_ALL, _LABELLED = ("tokens", "classes", "answers"), ("classes", "answers")
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "eval_loss",
            False,
            _ALL,
            "mean cross-entropy, nats per predicted token (or per example, for classes)",
            0.0,
            np.inf,
            sums.loss_terms,
            sums.loss,
        ),
        Metric(
            "perplexity",
            False,
            ("tokens",),
            "exponential of the mean cross-entropy per token",
            1.0,
            np.inf,
            sums.loss_terms,
            sums.perplexity,
        ),
        Metric(
            "accuracy",
            True,
            _LABELLED,
            "share of items that are right (answers: the exact text); where a task has parts, "
            "the mean over parts",
            0.0,
            1.0,
            sums.accuracy_terms,
            sums.accuracy,
        ),
        Metric(
            "f1",
            True,
            ("classes",),
            "F1 of class 1 of two classes; 0 where class 1 is neither expected nor predicted",
            0.0,
            1.0,
            sums.f1_terms,
            sums.f1,
            binary=True,
        ),
        Metric(
            "accuracy_f1",
            True,
            ("classes",),
            "mean of accuracy and F1 of class 1",
            0.0,
            1.0,
            sums.accuracy_f1_terms,
            sums.accuracy_f1,
            binary=True,
        ),
        Metric(
            "mcc",
            True,
            ("classes",),
            "Matthews correlation of expected and predicted classes; 0 where only one class is "
            "expected or predicted",
            -1.0,
            1.0,
            sums.mcc_terms,
            sums.mcc,
        ),
        Metric(
            "macro_f1",
            True,
            ("classes",),
            "mean of the F1 of all classes that are expected or predicted",
            0.0,
            1.0,
            sums.macro_f1_terms,
            sums.macro_f1,
        ),
    )
}
"""Metrics by name. GLUE reports ``accuracy_f1`` for MRPC and QQP, and ``mcc`` for CoLA."""
