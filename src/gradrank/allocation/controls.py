"""Control allocations: what a measured allocation must beat at the same budget."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from gradrank.allocation.problem import check_budget, check_names, rank_bounds, rank_costs
from gradrank.core.errors import BudgetError, OptionError
from gradrank.core.targets import Target

T = TypeVar("T")

_GOLDEN = (math.sqrt(5) - 1) / 2


def uniform(targets: Sequence[Target], budget: int) -> dict[str, int]:
    """Return the same rank everywhere, and what does not divide spread evenly over depth.

    Args:
        targets: The targets.
        budget: Budget in parameters.

    Returns:
        Rank per target name, in the order of ``targets``, clipped to ``max_rank``. The
        parameters never exceed the budget, and the slack is smaller than one rank on any target
        below its ``max_rank``.

    Raises:
        BudgetError: If the budget is below rank 1 on every target, or above ``max_rank`` on
            every target.
        TargetError: If there is no target, or one is listed twice.

    **Notes**: the remainder goes to targets in the order of multiples of the golden ratio, modulo
    1, over their places by stack, depth and name. However long the remainder is, the places that
    it reaches have at most three different gaps.

    Examples:
        >>> layers = [Target(f"layers.{i}.q", 4, 4) for i in range(5)]
        >>> list(uniform(layers, budget=8 * 7).values())
        [1, 2, 1, 1, 2]
    """
    costs = rank_costs(targets)
    one = int(costs.sum())
    if budget < one:
        raise BudgetError(
            f"budget {budget:,} is below the floor of {one:,} parameters (uniform rank 1 on "
            f"each of {len(targets)} targets). Raise the budget to at least {one:,}, choose fewer "
            "targets by hand (for example attention only), or use a method that may drop targets."
        )
    low, high = rank_bounds(targets)
    check_budget(targets, low, high, budget)
    below, above = 1, int(high.max()) + 1
    while above - below > 1:
        middle = (below + above) // 2
        fits = int((np.minimum(high, middle) * costs).sum()) <= budget
        below, above = (middle, above) if fits else (below, middle)
    ranks = np.minimum(high, below)
    slack = budget - int((ranks * costs).sum())
    order = _spread_order(targets)
    while (open_ := [i for i in order if ranks[i] < high[i] and costs[i] <= slack]) != []:
        for i in open_:
            if costs[i] <= slack:
                ranks[i] += 1
                slack -= int(costs[i])
    return dict(zip((target.name for target in targets), ranks.tolist(), strict=True))


def _spread_order(targets: Sequence[Target]) -> list[int]:
    """Return the places of the targets so that every beginning is spread over depth."""
    canonical = sorted(range(len(targets)), key=lambda i: _place(targets[i]))
    phase = [(place + 1) * _GOLDEN % 1.0 for place in range(len(targets))]
    return [canonical[place] for place in sorted(range(len(targets)), key=phase.__getitem__)]


def _place(target: Target) -> tuple[str, int, str]:
    return target.stack, -1 if target.depth is None else target.depth, target.name


def random_scores(targets: Sequence[Target], seed: int, salt: str = "") -> dict[str, float]:
    """Return random scores: independent exponential draws.

    Args:
        targets: The targets.
        seed: Seed; each draw depends on it and on the target's name only, so that neither the
            order of the targets nor the process matters.
        salt: Who draws. Controls that are to be independent at the same seed need different ones.

    Returns:
        Positive score per target name, mean 1.

    Examples:
        >>> random_scores([Target("a", 3, 5)], seed=0) == random_scores([Target("a", 9, 9)], seed=0)
        True
    """
    scores = {}
    for target in targets:
        # The top 53 bits, centred in their cell, so that the draw is in the open (0, 1).
        draw = ((_hash(seed, target.name, salt) >> 203) + 0.5) / 2**53
        scores[target.name] = -math.log(draw)
    return scores


def depth_scores(
    targets: Sequence[Target], first: float = 0.5, last: float = 1.5
) -> dict[str, float]:
    """Return scores that are linear in the block index.

    Args:
        targets: The targets.
        first: Score of the first block that the targets have in a stack.
        last: Score of the last one. Stacks (encoder, decoder) are scaled each by itself.

    Returns:
        Score per target name. Targets without a block index, or with the only one in their
        stack, get the mean of ``first`` and ``last``.

    Raises:
        OptionError: If ``first`` or ``last`` is negative or not finite, or both are 0.

    Examples:
        >>> depth_scores([Target(f"layers.{i}.q", 4, 4) for i in (0, 1, 2)], 1.0, 3.0)
        {'layers.0.q': 1.0, 'layers.1.q': 2.0, 'layers.2.q': 3.0}
    """
    if not (0 <= first < math.inf and 0 <= last < math.inf) or first + last == 0:
        raise OptionError(
            f"depth scores from first={first} to last={last} are not allowed; both must be finite "
            "and 0 or more, and one above 0."
        )
    blocks: dict[str, list[int]] = {}
    for target in targets:
        if target.depth is not None:
            blocks.setdefault(target.stack, []).append(target.depth)
    scores = {}
    for target in targets:
        part = 0.5
        if target.depth is not None:
            start, end = min(blocks[target.stack]), max(blocks[target.stack])
            part = (target.depth - start) / (end - start) if end > start else 0.5
        scores[target.name] = (1 - part) * first + part * last
    return scores


def permute_within_shape(
    targets: Sequence[Target], values: Mapping[str, T], seed: int
) -> dict[str, T]:
    """Return the values after a random permutation among targets of the same shape and kind.

    Costs are the same within a shape, so permuted ranks cost exactly what they did.

    Args:
        targets: The targets.
        values: Rank, score or anything else per target name.
        seed: Seed; the permutation depends on it and on the names only.

    Returns:
        Value per target name, in the order of ``targets``.

    Raises:
        OptionError: If ``values`` lacks a target or names an unknown one.

    Examples:
        >>> layers = [Target("a", 4, 4), Target("b", 4, 4), Target("c", 4, 8)]
        >>> sorted(permute_within_shape(layers, {"a": 1, "b": 2, "c": 3}, seed=0).values())
        [1, 2, 3]
    """
    check_names(targets, values, "value")
    shapes: dict[tuple[int, int, str], list[str]] = {}
    for target in targets:
        shapes.setdefault((target.d_in, target.d_out, target.kind), []).append(target.name)
    donor: dict[str, str] = {}
    for names in shapes.values():
        shuffled = sorted(names, key=lambda name: (_hash(seed, name), name))
        donor.update(zip(sorted(names), shuffled, strict=True))
    return {target.name: values[donor[target.name]] for target in targets}


def reverse_order(values: Mapping[str, float], targets: Sequence[Target]) -> dict[str, str]:
    """Return from whom each target receives, so that the most important gets the least.

    Args:
        values: Score per target name.
        targets: The targets.

    Returns:
        Donor's name per target name, in the order of ``targets``: the target with the i-th
        largest score receives from the one with the i-th smallest. Ties are ordered by name.

    Raises:
        OptionError: If ``values`` lacks a target or names an unknown one.

    Examples:
        >>> reverse_order({"a": 3.0, "b": 1.0}, [Target("a", 4, 4), Target("b", 4, 4)])
        {'a': 'b', 'b': 'a'}
    """
    check_names(targets, values, "score")
    falling = sorted((t.name for t in targets), key=lambda name: (-values[name], name))
    donor = dict(zip(falling, reversed(falling), strict=True))
    return {target.name: donor[target.name] for target in targets}


def _hash(seed: int, name: str, salt: str = "") -> int:
    """Return 256 random bits for a seed and a name, the same in every process."""
    text = f"{int(seed)}\x00{name}" + (f"\x00{salt}" if salt else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
