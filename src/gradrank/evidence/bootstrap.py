"""Intervals for a mean over runs, about new seeds and new items.

Runs of several seeds are evaluated on the same items, so a mean over them errs for two reasons:
other seeds would have given other runs, and another sample of items other values. The two are
crossed. With values ``d_s`` of K seeds (of one method, or differences of two), the variance of
their mean is ``V_seed / K + V_both / (K n) + V_item / n``, where ``V_both`` is what a seed does to
single items. The sample variance over seeds divided by K estimates the first two terms; the
covariance of two seeds over bootstrap resamples of the items, which all seeds and methods share,
estimates the third.

The interval adds the squares of two half-widths: Student's t over seeds, with K - 1 degrees of
freedom, and the item part. Plain percentiles of a bootstrap over both cover 54 to 84 percent
instead of 95 with two to five seeds that differ much, and nearly 100 where training flips single
items; ``benchmarks/study_coverage.py`` compares this and other intervals.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special

from gradrank.core.errors import DataError
from gradrank.evidence.items import Items
from gradrank.evidence.metrics import metric_of_runs

_CHUNK = 1 << 22
_SMALLEST_P = 1e-15


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over runs, and how far it may be from that of all seeds and items.

    Attributes:
        value: The mean.
        seeds: Variance of the mean that the sample of seeds causes.
        seed_freedom: Degrees of freedom of that variance.
        items: Variance of the mean that the sample of items causes, alike for all seeds.
        item_freedom: Degrees of freedom of that variance.
        floor: Variance of the mean over samples of items with these very seeds. The whole variance
            is at least this; it keeps an interval from closing when few seeds agree by chance.
    """

    value: float
    seeds: float
    seed_freedom: float
    items: float
    item_freedom: float
    floor: float

    @property
    def constant(self) -> bool:
        """Whether nothing varies, neither over seeds nor over items."""
        return self.seeds + self.items + self.floor == 0

    def half_width(self, alpha: float = 0.05) -> float:
        """Return half the width of the interval of level ``1 - alpha``.

        Args:
            alpha: Share of intervals that may miss.

        Returns:
            Half-width, in the unit of the mean.

        Source:
            Zou and Donner, Statistics in Medicine 27 (2008), section 2: limits of a sum from the
            limits of its parts (recovery of variance estimates).
        """
        over_seeds = -float(special.stdtrit(self.seed_freedom, alpha / 2))
        over_items = -float(special.stdtrit(self.item_freedom, alpha / 2))
        both = over_seeds**2 * self.seeds + over_items**2 * self.items
        return float(np.sqrt(max(both, over_items**2 * self.floor)))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the interval.

        Args:
            level: Share of intervals that shall hold the true mean.

        Returns:
            Its ends.
        """
        half = self.half_width(1 - level)
        return self.value - half, self.value + half

    def p_value(self) -> float:
        """Return the two-sided p-value of a true mean of 0.

        It is the level at which the interval begins to hold 0, so test and interval never
        disagree.

        Returns:
            A number from 1e-15 to 1; 1 where the mean is 0.
        """
        distance = abs(self.value)
        if distance == 0:
            return 1.0
        if distance >= self.half_width(_SMALLEST_P):
            return _SMALLEST_P

        def beyond(log_alpha: float) -> float:
            return self.half_width(float(np.exp(log_alpha))) - distance

        root: Any = optimize.brentq(beyond, np.log(_SMALLEST_P), 0.0, xtol=1e-12)
        return float(np.exp(root))


def resampled(
    metric: str, runs: Sequence[Items], resamples: int, seed: int, stream: str = ""
) -> np.ndarray:
    """Evaluate a metric on bootstrap resamples of the items, the same for all runs.

    Args:
        metric: Name of the metric.
        runs: Items of each run, all of one size n and of the same items.
        resamples: How many resamples, R.
        seed: Seed of the resampling.
        stream: Name of an independent stream of numbers (the task).

    Returns:
        Values, ``[R, runs]``; a column does not depend on which other runs there are.
    """
    n = runs[0].size
    rng = np.random.default_rng([seed, zlib.crc32(stream.encode())])
    step = max(1, _CHUNK // n)
    return np.concatenate(
        [
            metric_of_runs(metric, runs, rng.integers(0, n, (min(step, resamples - start), n)))
            for start in range(0, resamples, step)
        ]
    )


def spread(values: np.ndarray, replicates: np.ndarray, items: int) -> Spread:
    """Return the mean over runs of different seeds, and its variance over seeds and items.

    Args:
        values: A value per seed, ``[K]``: of a metric, or of the difference of two methods.
        replicates: The same values on resampled items, ``[R, K]``.
        items: How many items there are, n.

    Returns:
        Mean and parts of its variance.

    Raises:
        DataError: With fewer than two seeds or two resamples: they tell nothing about variance.
    """
    seeds = len(values)
    if seeds < 2 or len(replicates) < 2 or replicates.shape[1] != seeds:
        raise DataError(
            f"a variance needs two seeds and two resamples of each; found {seeds} seeds and "
            f"resamples of shape {replicates.shape}."
        )
    # A bootstrap of n items has (n - 1) / n of the variance of a sample.
    table = np.cov(replicates, rowvar=False) * items / max(items - 1, 1)
    common = (table.sum() - np.trace(table)) / (seeds * (seeds - 1))
    return Spread(
        value=float(np.mean(values)),
        seeds=float(np.var(values, ddof=1)) / seeds,
        seed_freedom=seeds - 1,
        items=max(0.0, float(common)),
        item_freedom=max(items - 1, 1),
        floor=max(0.0, float(table.mean())),
    )


def pooled(spreads: Sequence[Spread], scales: Sequence[float]) -> Spread:
    """Return the mean of independent means, each divided by its scale.

    Args:
        spreads: Means of different tasks.
        scales: A positive scale per task, taken as known.

    Returns:
        Mean over tasks, about new seeds and new items of these same tasks.

    Source:
        Satterthwaite, Biometrics Bulletin 2 (1946), equation 17: degrees of freedom of a sum of
        variances.
    """
    weights = [1 / (scale * len(spreads)) for scale in scales]
    pairs = list(zip(weights, spreads, strict=True))
    over_seeds = [(w * w * part.seeds, part.seed_freedom) for w, part in pairs]
    over_items = [(w * w * part.items, part.item_freedom) for w, part in pairs]
    return Spread(
        value=sum(w * part.value for w, part in pairs),
        seeds=sum(variance for variance, _ in over_seeds),
        seed_freedom=_freedom(over_seeds),
        items=sum(variance for variance, _ in over_items),
        item_freedom=_freedom(over_items),
        floor=sum(w * w * part.floor for w, part in pairs),
    )


def _freedom(parts: Sequence[tuple[float, float]]) -> float:
    below = sum(variance**2 / freedom for variance, freedom in parts)
    least = min(freedom for _, freedom in parts)
    return max(least, sum(variance for variance, _ in parts) ** 2 / below) if below else least
