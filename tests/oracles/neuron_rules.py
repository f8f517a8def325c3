"""Slow twins of the partition rules, and of trimming partitions to a budget."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

from gradrank.core.partition import NeuronPartition
from gradrank.core.targets import Target


def fewest_that_reach(shares: Sequence[float], threshold: float) -> int:
    """How many rows the smallest set has whose shares reach the threshold: every set is tried."""
    need = threshold * math.fsum(shares)
    for size in range(len(shares) + 1):
        sums = (math.fsum(chosen) for chosen in combinations(shares, size))
        if any(found >= need * (1 - 1e-9) for found in sums):
            return size
    raise AssertionError


def cost(d_in: int, mask: Sequence[bool], rank: int, supplementary: int) -> int:
    """``r (n + |M|) + r' (n + m - |M|)``, of groups that have rows."""
    dominant = sum(mask)
    rest = len(mask) - dominant
    upper = rank * (d_in + dominant) if dominant else 0
    return upper + (supplementary * (d_in + rest) if rest else 0)


def trim_one_by_one(
    targets: Sequence[Target],
    partitions: Mapping[str, NeuronPartition],
    strength: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    budget: int,
    within_target: bool = False,
) -> dict[str, list[bool]]:
    """Move the weakest dominant row of all, again and again, until the budget holds.

    ``within_target`` is the broken twin, which empties one target after the other.
    """
    masks = {t.name: list(partitions[t.name].mask) for t in targets}

    def spent() -> int:
        return sum(
            cost(
                t.d_in,
                masks[t.name],
                partitions[t.name].rank,
                partitions[t.name].supplementary_rank,
            )
            for t in targets
        )

    while spent() > budget:
        rows = [
            (float(strength[name][0][i]), float(strength[name][1][i]), name, i)
            for name, mask in masks.items()
            for i, dominant in enumerate(mask)
            if dominant
        ]
        weakest = min(rows, key=lambda row: row[2:]) if within_target else min(rows)
        masks[weakest[2]][weakest[3]] = False
    return masks
