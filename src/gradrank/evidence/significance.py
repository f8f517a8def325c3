"""Which of many differences are evidence: correction for how many were tested, and verdicts.

The test of a single difference is the one that belongs to its interval
(:meth:`gradrank.evidence.bootstrap.Spread.p_value`). Tests over seeds alone are not enough: a
paired t-test or Wilcoxon test over seeds takes the items for the whole world, and an exact
sign-flip test of five pairs cannot get below 2 / 32 = 0.0625, of two pairs not below one half, so
it never finds anything however large the effect.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from gradrank.evidence.findings import Contrast, Pooled, Verdict

LEVEL = 0.05
Row = TypeVar("Row", Contrast, Pooled)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for how many there are, by Holm's step-down method.

    The chance of any false positive among all of them stays below the level, whatever their
    dependence (they share the reference's runs, so they are dependent).

    Args:
        p_values: P-values of one family of tests.

    Returns:
        Corrected p-values in the same order: at most 1, never below the given ones.

    Source:
        Holm, Scandinavian Journal of Statistics 6 (1979), section 3.

    Examples:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    count = len(p_values)
    corrected, largest = [0.0] * count, 0.0
    for place, which in enumerate(sorted(range(count), key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, (count - place) * p_values[which]))
        corrected[which] = largest
    return corrected


def verdict(difference: float, low: float, high: float, p_corrected: float) -> Verdict:
    """Return what a difference is evidence of.

    Args:
        difference: Mean difference, positive where the method is better.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p_corrected: Its p-value, corrected for all tests of the family.

    Returns:
        ``better`` or ``worse`` if the corrected p-value is below 0.05 and the interval excludes 0,
        else ``no evidence``.
    """
    if p_corrected < LEVEL and (low > 0 or high < 0):
        return "better" if difference > 0 else "worse"
    return "no evidence"


def judge(rows: Sequence[Row]) -> list[Row]:
    """Correct the p-values of a family of differences and pass the verdicts.

    Args:
        rows: All differences of the family, with intervals and p-values where they were tested.

    Returns:
        The same with corrected p-values and verdicts. Those that were not tested are as before and
        do not count for the correction.
    """
    tested = [place for place, row in enumerate(rows) if row.p is not None]
    judged = list(rows)
    for place, p in zip(tested, holm([rows[place].p or 0.0 for place in tested]), strict=True):
        old = rows[place]
        found = verdict(old.difference or 0.0, old.low or 0.0, old.high or 0.0, p)
        # Who lost seeds was compared on those where it survived.
        if (found == "better" and old.lost[0]) or (found == "worse" and old.lost[1]):
            found = "no evidence"
        judged[place] = replace(old, p_corrected=p, verdict=found)
    return judged
