"""Which output rows of a target are dominant, by what was seen of their importance. No torch."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradrank.core.errors import OptionError, nearest

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Shares are sums of rounded numbers, and so are multiples of a fraction.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class NeuronCounts:
    """What is known about the output rows of one target.

    Attributes:
        hits: Looks at which a row's importance was above the mean of all rows, ``[d_out]``.
        shares: Sum over looks of the row's share of the target's importance, ``[d_out]``; adds up
            to ``looks``.
        looks: Looks at which the target had any importance.
    """

    hits: Ints
    shares: Floats
    looks: int

    @property
    def frequency(self) -> Floats:
        """Share of the looks that were hits, ``[d_out]``; zero without a look."""
        return self.hits / max(self.looks, 1)

    @property
    def relative(self) -> Floats:
        """Mean importance in units of the target's mean row, ``[d_out]``; zero without a look."""
        return self.shares * (len(self.shares) / max(self.looks, 1))


@dataclass(frozen=True, slots=True)
class Rule:
    """How dominant rows are chosen.

    Attributes:
        name: One of :data:`RULES`.
        fraction: Share of the rows, of ``top_fraction`` and ``random``.
        threshold: Share of the importance, of ``cumulative``.
        seed: Seed of ``random``.
    """

    name: str = "majority"
    fraction: float = 0.5
    threshold: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise OptionError(f"rule '{self.name}' is unknown. {nearest(self.name, RULES)}")
        for name in ("fraction", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be in [0, 1].")

    def dominant(self, counts: NeuronCounts, target: str) -> Bools:
        """Return the dominant rows of one target.

        Where no importance was ever seen, no row is dominant, whatever the rule but ``random``.

        Args:
            counts: What is known about its rows.
            target: Its name, which only ``random`` looks at.

        Returns:
            Whether each row is dominant, ``[d_out]``.

        Source:
            PiLoRA, section 3.3 ("majority" is how this library reads "consistently engaged"),
            Table 4 (``top_fraction``, ``random``) and Figure 6 (``cumulative``).

        Examples:
            >>> counts = NeuronCounts(np.array([3, 2, 0]), np.array([2.4, 1.2, 0.4]), looks=4)
            >>> Rule("majority").dominant(counts, "q").tolist()
            [True, False, False]
        """
        return _CHOOSE[self.name](self, counts, target)

    def strength(self, counts: NeuronCounts, target: str) -> tuple[Floats, Floats]:
        """Return what rows are compared by when a budget cannot pay for all that are dominant.

        Args:
            counts: What is known about the rows.
            target: Name of their target.

        Returns:
            What counts first and what decides among equals, ``[d_out]`` each: the frequency of
            hits and the relative importance; of ``random``, which is to know nothing, its draws.
        """
        if self.name == "random":
            return _draws(len(counts.hits), self.seed, target), np.zeros(len(counts.hits))
        return counts.frequency, counts.relative


def _majority(_rule: Rule, counts: NeuronCounts, _target: str) -> Bools:
    return 2 * counts.hits > counts.looks


def _mean(_rule: Rule, counts: NeuronCounts, _target: str) -> Bools:
    return counts.hits * len(counts.hits) > counts.hits.sum()


def _top_fraction(rule: Rule, counts: NeuronCounts, _target: str) -> Bools:
    rows = math.ceil(rule.fraction * len(counts.hits) - _ROUNDING) if counts.shares.any() else 0
    return _rows(_strongest_first(counts)[:rows], len(counts.hits))


def _cumulative(rule: Rule, counts: NeuronCounts, _target: str) -> Bools:
    order = _strongest_first(counts)
    reached = np.cumsum(counts.shares[order])
    # A row without importance brings no sum closer to anything.
    least = rule.threshold * float(reached[-1]) * (1 - _ROUNDING)
    rows = int(np.searchsorted(reached, least)) + 1 if least > 0 else 0
    return _rows(order[:rows], len(order))


def _random(rule: Rule, counts: NeuronCounts, target: str) -> Bools:
    order = np.argsort(-_draws(len(counts.hits), rule.seed, target), kind="stable")
    return _rows(order[: math.floor(rule.fraction * len(order) + 0.5)], len(order))


_CHOOSE: Mapping[str, Callable[[Rule, NeuronCounts, str], Bools]] = {
    "majority": _majority,
    "mean": _mean,
    "top_fraction": _top_fraction,
    "cumulative": _cumulative,
    "random": _random,
}
RULES = tuple(_CHOOSE)
"""Rules by name.

``majority``: hit at more than half of the looks. ``mean``: hit more often than the mean row.
``top_fraction``: the rows of largest importance share, a fraction of all, rounded up.
``cumulative``: the fewest rows whose importance shares reach the threshold. ``random``: a fraction
of all rows, rounded, by seed and name of the target (the control). Of equal shares the row with
more hits comes first, then the one with the smaller number.
"""


def _strongest_first(counts: NeuronCounts) -> Ints:
    return np.lexsort((-counts.hits, -counts.shares))


def _rows(chosen: Ints, rows: int) -> Bools:
    mask = np.zeros(rows, dtype=np.bool_)
    mask[chosen] = True
    return mask


def _draws(rows: int, seed: int, target: str) -> Floats:
    """Numbers in ``[0, 1)`` that depend on seed, name and row only, in every NumPy version."""
    digest = hashlib.sha256(f"{int(seed)}\x00rows\x00{target}".encode()).digest()
    raw = np.random.PCG64(int.from_bytes(digest, "big")).random_raw(rows)
    return (raw >> np.uint64(11)) / 2.0**53
