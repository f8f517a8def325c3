"""Which directions of which targets to keep under a budget in parameters."""

from collections.abc import Mapping, Sequence

from gradrank.allocation.problem import check_names
from gradrank.core.errors import BudgetError
from gradrank.core.targets import Target


def keep_directions(
    targets: Sequence[Target],
    scores: Mapping[str, Sequence[float]],
    budget: int,
    r_min: int = 0,
) -> dict[str, tuple[int, ...]]:
    """Keep the directions with the highest scores, over all targets, that the budget can pay.

    Directions are taken in descending order of their scores; one that no longer fits is passed
    over, and cheaper ones behind it may still fit. A direction costs ``d_in + d_out`` parameters,
    so that grouped-query targets are charged what they really take. Of equal scores the direction
    that comes first in its target is taken first, then the target whose name comes first: the
    outcome does not depend on the order of the targets.

    Args:
        targets: The targets.
        scores: Score per direction and target; larger is kept longer. NaN is refused by whoever
            makes the scores.
        budget: Parameters that may be kept.
        r_min: Directions that every target keeps at least (as many as it has, if fewer).

    Returns:
        Indices of the directions kept, ascending, per target; may be empty.

    Raises:
        BudgetError: If the budget cannot pay ``r_min`` directions of every target.

    Source:
        IGU-LoRA, section 3 ("top b"); the budget in parameters is gradrank's.
    """
    check_names(targets, scores, "direction scores")
    ranked = {
        t.name: sorted(range(len(scores[t.name])), key=lambda i, t=t: (-scores[t.name][i], i))
        for t in targets
    }
    costs = {target.name: target.cost for target in targets}
    kept = {name: order[:r_min] for name, order in ranked.items()}
    left = budget - sum(len(found) * costs[name] for name, found in kept.items())
    if left < 0:
        raise BudgetError(
            f"keeping {r_min} direction(s) of each of {len(targets)} targets takes "
            f"{budget - left:,} parameters, and the budget is {budget:,}. Lower r_min, or raise "
            "the budget."
        )
    rest = [(-scores[n][i], i, n) for n, order in ranked.items() for i in order[r_min:]]
    for _, index, name in sorted(rest):
        if costs[name] <= left:
            kept[name].append(index)
            left -= costs[name]
    return {name: tuple(sorted(found)) for name, found in kept.items()}
