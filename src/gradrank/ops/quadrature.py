"""Points and weights along the path from the pre-trained model to the trained adapter.

Every estimator of a path integral of gradients is a :class:`Rule`: at which α to take a gradient,
and with which weight. Which interior points a run draws is stratified: each run of as many draws
as there are strata visits every one of them once, in a random order.
"""

import random
from dataclasses import dataclass

from gradrank.ops.sketch import seed_of


@dataclass(frozen=True, slots=True)
class Rule:
    """A weighted sum of gradients along the path.

    Attributes:
        points: α in [0, 1], ascending.
        weights: The weight of each gradient.
    """

    points: tuple[float, ...]
    weights: tuple[float, ...]


def trapezoid(segments: int) -> Rule:
    """Return the composite trapezoid rule, ``segments + 1`` gradients.

    Args:
        segments: N, at least 1.

    Returns:
        Weights ``1/N``, at both ends ``1/(2N)``; their sum is 1.

    Source:
        IGU-LoRA, equation 5.
    """
    ends, inner = 1 / (2 * segments), 1 / segments
    points = tuple(k / segments for k in range(segments + 1))
    return Rule(points, (ends, *[inner] * (segments - 1), ends))


def as_printed(segments: int, interior: int) -> Rule:
    """Return the paper's rule with one interior point: ``[g(0) + 2 g(α) + g(1)] / (2N)``.

    Its expectation over the interior points is **not** the trapezoid rule: a factor ``N - 1`` is
    missing, so that the weights sum to ``2/N`` and half of them lies on the two ends.

    Args:
        segments: N, at least 2.
        interior: k in ``1..N-1``; α is ``k/N``.

    Returns:
        Three points.

    Source:
        IGU-LoRA, equation 6.
    """
    return Rule((0.0, interior / segments, 1.0), tuple(w / (2 * segments) for w in (1, 2, 1)))


def with_interior_weighted(segments: int, interior: int) -> Rule:
    """Return the same with the factor: ``[g(0) + 2 (N-1) g(α) + g(1)] / (2N)``.

    Its expectation over the interior points is the trapezoid rule.

    Args:
        segments: N, at least 2.
        interior: k in ``1..N-1``; α is ``k/N``.

    Returns:
        Three points, weights that sum to 1.

    Source:
        IGU-LoRA, equation 6, with the factor that its own derivation needs.
    """
    weights = (1 / (2 * segments), (segments - 1) / segments, 1 / (2 * segments))
    return Rule((0.0, interior / segments, 1.0), weights)


def one_of_grid(segments: int, draw: int) -> Rule:
    """Return one point of the whole grid, which takes a single gradient.

    The ``2N`` draws are equally likely. Segment ``draw // 2`` contributes its left or its right
    end, so that an interior point is drawn with probability ``1/N`` and either end of the path with
    ``1/(2N)``: the expectation is the trapezoid rule.

    Args:
        segments: N, at least 1.
        draw: In ``0..2N-1``.

    Returns:
        One point of weight 1.

    Source:
        gradrank.
    """
    segment, right = divmod(draw, 2)
    return Rule(((segment + right) / segments,), (1.0,))


def stratum(strata: int, seed: int, index: int) -> int:
    """Return an element of an endless sequence that visits every stratum once per round.

    Args:
        strata: Number of strata.
        seed: Seed.
        index: Which element, from 0.

    Returns:
        A stratum in ``0..strata-1``.
    """
    around, place = divmod(index, strata)
    order = list(range(strata))
    random.Random(seed_of("stratified", strata, seed, around)).shuffle(order)
    return order[place]
