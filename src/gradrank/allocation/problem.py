"""What every rank allocator shares: bounds on ranks, checks of scores and budget."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradrank.core.errors import BudgetError, MeasurementError, OptionError, TargetError, nearest
from gradrank.core.targets import Target

Ints = NDArray[np.int64]


def rank_costs(targets: Sequence[Target]) -> Ints:
    """Return the parameters of one rank per target.

    Args:
        targets: The targets.

    Returns:
        ``d_in + d_out`` per target, ``[n]``.

    Raises:
        TargetError: If there is no target, or two have the same name.

    Examples:
        >>> rank_costs([Target("a", 3, 5)]).tolist()
        [8]
    """
    if not targets:
        raise TargetError("there is no target to give a rank to. Choose at least one.")
    seen: set[str] = set()
    for target in targets:
        if target.name in seen:
            raise TargetError(f"target '{target.name}' is listed twice. List every target once.")
        seen.add(target.name)
    return np.array([target.cost for target in targets], dtype=np.int64)


def rank_bounds(
    targets: Sequence[Target], r_min: int = 0, r_max: int | None = None
) -> tuple[Ints, Ints]:
    """Return the smallest and largest rank that each target may get.

    Args:
        targets: The targets.
        r_min: Smallest rank, 0 or more.
        r_max: Largest rank, at least 1 and ``r_min``; None allows every rank that adds directions.

    Returns:
        Smallest and largest rank per target, ``[n]`` each, clipped to the target's ``max_rank``.

    Raises:
        OptionError: If the bounds are no whole numbers or contradict each other.

    Examples:
        >>> low, high = rank_bounds([Target("a", 3, 5), Target("head", 3, 1)], 2, 8)
        >>> low.tolist(), high.tolist()
        ([2, 1], [3, 1])
    """
    for name, value, least in (("r_min", r_min, 0), ("r_max", 1 if r_max is None else r_max, 1)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise OptionError(f"{name} is {value!r}; it must be a whole number, {least} or more.")
    if r_max is not None and r_max < r_min:
        raise OptionError(
            f"r_max={r_max} is below r_min={r_min}, so no rank is allowed. Raise r_max or lower "
            "r_min."
        )
    most = np.array([target.max_rank for target in targets], dtype=np.int64)
    return np.minimum(most, r_min), most if r_max is None else np.minimum(most, r_max)


def narrow(
    targets: Sequence[Target], low: Ints, high: Ints, within: Mapping[str, tuple[int, int]]
) -> tuple[Ints, Ints]:
    """Return rank bounds narrowed by further ones, which win where the two have nothing in common.

    Args:
        targets: The targets.
        low: Smallest rank per target, ``[n]``.
        high: Largest rank per target, ``[n]``.
        within: Smallest and largest rank by target name.

    Returns:
        The bounds, ``[n]`` each.

    Raises:
        OptionError: If a target is missing or its bounds contradict each other.

    Examples:
        >>> low, high = np.array([1]), np.array([8])
        >>> low, high = narrow([Target("a", 16, 16)], low, high, {"a": (3, 5)})
        >>> low.tolist(), high.tolist()
        ([3], [5])
    """
    bounds = {t.name: within.get(t.name, (1, 0)) for t in targets}
    wrong = [name for name, (least, most) in bounds.items() if least > most]
    if wrong:
        raise OptionError(
            f"'within' must hold (smallest, largest) for every target; that of '{wrong[0]}' is "
            f"{within.get(wrong[0])}."
        )
    smallest = np.array([within[target.name][0] for target in targets], dtype=np.int64)
    largest = np.array([within[target.name][1] for target in targets], dtype=np.int64)
    return np.clip(low, smallest, largest), np.clip(high, smallest, largest)


def check_budget(
    targets: Sequence[Target],
    r_min: ArrayLike,
    r_max: ArrayLike,
    budget: int,
    live: ArrayLike | None = None,
) -> None:
    """Refuse a budget that cannot be met or cannot be spent.

    Args:
        targets: The targets.
        r_min: Smallest rank per target, ``[n]`` (or one for all).
        r_max: Largest rank per target, ``[n]`` (or one for all).
        budget: Budget in parameters.
        live: Which targets may rise above ``r_min``, ``[n]``; None means all.

    Raises:
        BudgetError: If the budget is below the floor (``r_min`` on every target, or the cheapest
            single rank), or above the ceiling (``r_max`` on every live target).

    Examples:
        >>> check_budget([Target("a", 3, 5)], 0, 2, budget=16)
    """
    costs = rank_costs(targets)
    low = np.broadcast_to(np.asarray(r_min, np.int64), costs.shape)
    high = np.broadcast_to(np.asarray(r_max, np.int64), costs.shape)
    may_rise = np.broadcast_to(np.asarray(True if live is None else live, np.bool_), costs.shape)
    floor = int((low * costs).sum())
    if budget < floor:
        raise BudgetError(
            f"budget {budget:,} is below the floor of {floor:,} parameters (rank "
            f"{int(low.max())} on each of {len(targets)} targets). Raise the budget to at least "
            f"{floor:,}, or lower r_min (r_min=0 lets targets be dropped) or choose fewer targets."
        )
    rising = may_rise & (high > low)
    cheapest = int(costs[rising].min()) if rising.any() else 0
    if floor == 0 and budget < cheapest:
        raise BudgetError(
            f"budget {budget:,} is below the floor of {cheapest:,} parameters, the cheapest "
            f"single rank among {len(targets)} targets. Raise the budget to at least "
            f"{cheapest:,}, or choose smaller targets."
        )
    ceiling = int((np.where(may_rise, high, low) * costs).sum())
    if budget > ceiling:
        raise BudgetError(
            f"budget {budget:,} is above the ceiling of {ceiling:,} parameters: "
            f"{int(may_rise.sum())} of {len(targets)} targets may rise (a score above 0), and "
            f"ranks end at r_max, min(d_in, d_out) or the directions measured (at most "
            f"{int(high.max())} here). Lower the budget to {ceiling:,} or less, or raise r_max, "
            "measure more directions or add targets."
        )


def score_array(targets: Sequence[Target], scores: Mapping[str, float]) -> NDArray[np.float64]:
    """Return the scores in the order of the targets, checked.

    Args:
        targets: The targets.
        scores: Score per target name, 0 or more, in any unit.

    Returns:
        Scores, ``[n]``.

    Raises:
        OptionError: If a target has no score or a score no target.
        MeasurementError: If a score is negative or not finite, or all are zero.

    Examples:
        >>> score_array([Target("a", 3, 5)], {"a": 2.0}).tolist()
        [2.0]
    """
    check_names(targets, scores, "score")
    values = np.array([scores[target.name] for target in targets], dtype=np.float64)
    for target, value in zip(targets, values.tolist(), strict=True):
        if not 0 <= value < np.inf:
            raise MeasurementError(
                f"target '{target.name}' has the score {value}; a score must be finite and 0 or "
                "more. Measure again, or look at this target's gradients."
            )
    if not values.any():
        raise MeasurementError(
            f"all {len(targets)} targets have the score 0: there is nothing to place ranks by. "
            "Check that the loss depends on the targets, or use method 'uniform'."
        )
    return values


def check_names(targets: Sequence[Target], given: Iterable[str], what: str) -> None:
    """Refuse a mapping whose names are not those of the targets.

    Args:
        targets: The targets.
        given: Names in the mapping.
        what: What the mapping holds ("score"), for the message.

    Raises:
        OptionError: If a target is missing, or a name is no target.
    """
    known, names = {target.name: None for target in targets}, set(given)
    missing = [name for name in known if name not in names]
    if missing:
        raise OptionError(
            f"{len(missing)} of {len(known)} targets have no {what}, the first is "
            f"'{missing[0]}'. Give every target a {what} (0 if it shall have no share)."
        )
    unknown = sorted(names - set(known))
    if unknown:
        raise OptionError(
            f"there is a {what} for '{unknown[0]}', which is no target. "
            f"{nearest(unknown[0], known)}"
        )


def refuse_empty(ranks: Mapping[str, int], budget: int, advice: str) -> None:
    """Refuse an allocation that drops every target.

    Args:
        ranks: Rank per target name.
        budget: Budget in parameters, for the message.
        advice: What to do beside raising the budget.

    Raises:
        BudgetError: If every rank is 0.
    """
    if not any(ranks.values()):
        raise BudgetError(
            f"with budget {budget:,} every one of {len(ranks)} targets ends at rank 0, so nothing "
            f"would be trained. Raise the budget, or {advice}."
        )
