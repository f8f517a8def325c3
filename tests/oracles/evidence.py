"""Slow twins of the evidence: loops over items, textbook formulas, explicit pairs."""

import math
from collections.abc import Sequence
from typing import Any


def accuracy(expected: Sequence[Any], predicted: Sequence[Any], group: Sequence[str] | None = None):
    parts: dict[str, list[bool]] = {}
    for place, (wanted, found) in enumerate(zip(expected, predicted, strict=True)):
        parts.setdefault(group[place] if group else "", []).append(found == wanted and found != "")
    return sum(sum(right) / len(right) for right in parts.values()) / len(parts)


def f1_of(label: int, expected: Sequence[int], predicted: Sequence[int]) -> float:
    pairs = list(zip(expected, predicted, strict=True))
    true = sum(e == label and p == label for e, p in pairs)
    if true == 0:
        return 0.0
    precision = true / sum(p == label for _, p in pairs)
    recall = true / sum(e == label for e, _ in pairs)
    return 2 * precision * recall / (precision + recall)


def macro_f1(expected: Sequence[int], predicted: Sequence[int]) -> float:
    labels = sorted({*expected, *predicted})
    return sum(f1_of(label, expected, predicted) for label in labels) / len(labels)


def mcc(expected: Sequence[int], predicted: Sequence[int]) -> float:
    """Correlation of one-hot columns, covariances summed over classes (Gorodkin, equation 2)."""
    labels, n = sorted({*expected, *predicted}), len(expected)

    def covariance(first: Sequence[int], second: Sequence[int]) -> float:
        total = 0.0
        for label in labels:
            a, b = [float(x == label) for x in first], [float(x == label) for x in second]
            mean_a, mean_b = sum(a) / n, sum(b) / n
            total += sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / n
        return total

    below = covariance(expected, expected) * covariance(predicted, predicted)
    return covariance(expected, predicted) / math.sqrt(below) if below > 1e-15 else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """By the definition: the least level at which Holm's procedure rejects each hypothesis."""
    levels = sorted(
        {0.0, 1.0, *(min(1.0, p * k) for p in p_values for k in range(1, len(p_values) + 1))}
    )

    def rejected(level: float) -> set[int]:
        order = sorted(range(len(p_values)), key=lambda i: p_values[i])
        found: set[int] = set()
        for place, which in enumerate(order):
            if p_values[which] * (len(order) - place) > level:
                break
            found.add(which)
        return found

    return [
        next((level for level in levels if which in rejected(level)), 1.0)
        for which in range(len(p_values))
    ]


def paired_replicates(
    index: Sequence[Sequence[int]],
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
) -> list[list[float]]:
    """Mean difference per seed on every resample, the same items for both methods and all seeds."""
    return [
        [
            sum(a[i] for i in row) / len(row) - sum(b[i] for i in row) / len(row)
            for a, b in zip(ours, theirs, strict=True)
        ]
        for row in index
    ]


def unpaired_replicates(
    index: Sequence[Sequence[int]],
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
) -> list[list[float]]:
    """A broken twin: the other method gets other items."""
    return [
        [
            sum(a[i] for i in row) / len(row) - sum(b[i] for i in other) / len(other)
            for a, b in zip(ours, theirs, strict=True)
        ]
        for row, other in zip(index, [*index[1:], index[0]], strict=True)
    ]


def item_variance(replicates: Sequence[Sequence[float]], n: int) -> float:
    """Mean over pairs of different seeds of the covariance over resamples."""
    count, seeds = len(replicates), len(replicates[0])
    means = [sum(row[s] for row in replicates) / count for s in range(seeds)]
    total, pairs = 0.0, 0
    for a in range(seeds):
        for b in range(seeds):
            if a != b:
                pairs += 1
                total += sum((row[a] - means[a]) * (row[b] - means[b]) for row in replicates)
    return max(0.0, total / pairs / (count - 1) * n / (n - 1))
