"""Things that take turns, the seconds that each turn took, and ratios of them with intervals.

Machines have slow minutes. So whatever is compared runs in one process, turn by turn, in an order
that moves on with every round, and only ratios of seconds from the same rounds are reported.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

LEAST_PAIRS = 5
_RESAMPLES = 4000


def synchronise() -> None:
    """Wait until the accelerator, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call took, work on the accelerator included, and its result."""
    synchronise()
    started = time.perf_counter()
    result = call()
    synchronise()
    return time.perf_counter() - started, result


Turn = Callable[[int], Any]


def take_turns(
    turns: Mapping[str, Turn],
    rounds: int,
    warmup: int = 0,
    before: Mapping[str, Turn] | None = None,
) -> dict[str, list[float]]:
    """Let everything take its turn in every round; return seconds per round.

    Args:
        turns: By name, what is called with the number of the round, from 0 (those of the warm-up
            included).
        rounds: Rounds that count.
        warmup: Rounds before them that do not.
        before: By name, what makes a turn ready; not timed.

    Returns:
        For each name ``rounds`` times, in seconds; the i-th of two names are a pair.
    """
    names = list(turns)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            if before and name in before:
                before[name](number)
            taken, _ = timed(partial(turns[name], number))
            if number >= warmup:
                seconds[name].append(taken)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """A ratio of sums, and how far chance may have moved it.

    Attributes:
        value: Sum over sum.
        interval: Ends of the 95 % interval; None where pairs are too few to say.
        pairs: How many pairs there were.
        least: Smallest ratio of a single pair.
        most: Largest ratio of a single pair.
    """

    value: float
    interval: tuple[float, float] | None
    pairs: int
    least: float
    most: float


def ratio(
    mine: Sequence[float], base: Sequence[float], kinds: Sequence[object] | None = None
) -> Ratio:
    """Compare two series that took turns.

    Args:
        mine: Seconds of each turn.
        base: Seconds of the other's turn in the same round.
        kinds: What kind of work each round was (with a decision, without one, ...). Rounds are
            drawn again within their kind, so that every resample holds as many of each as the run
            did: that a decision falls into every fiftieth step is no accident to average over.

    Returns:
        The ratio of the sums, with the percentile interval of a paired bootstrap.
    """
    pairs = np.array([mine, base], dtype=float)
    count = pairs.shape[1]
    single = pairs[0] / pairs[1]
    interval = None
    if count >= LEAST_PAIRS:
        labels = [0] * count if kinds is None else list(kinds)
        sums = np.sum([_resampled_sums(pairs[:, places]) for places in _places(labels)], axis=0)
        low, high = np.quantile(sums[0] / sums[1], [0.025, 0.975])
        interval = (float(low), float(high))
    total = pairs.sum(axis=1)
    value = float(total[0] / total[1])
    return Ratio(value, interval, count, float(single.min()), float(single.max()))


def _places(labels: Sequence[object]) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for place, label in enumerate(labels):
        groups.setdefault(label, []).append(place)
    return list(groups.values())


def _resampled_sums(pairs: np.ndarray) -> np.ndarray:
    """Return sums over bootstrap resamples of the columns, ``[2, resamples]``."""
    count = pairs.shape[1]
    rng = np.random.default_rng([0, count])
    times = rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    return pairs @ times.T
