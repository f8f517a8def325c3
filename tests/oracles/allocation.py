"""Slow, obviously right allocators: enumeration and scans, in exact rational arithmetic."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise, product
from math import floor, gcd

from gradrank.allocation import Candidate
from gradrank.core.targets import Target

Groups = Mapping[str, Sequence[Candidate]]
Rounding = Callable[[Fraction], int]


def best_choice(groups: Groups, budget: int) -> dict[str, Candidate] | None:
    """Try every combination: largest gain, then lowest cost, then lowest costs in name order."""
    names = sorted(groups)
    best = None
    for places in product(*(range(len(groups[name])) for name in names)):
        chosen = [groups[name][place] for name, place in zip(names, places, strict=True)]
        cost = sum(candidate.cost for candidate in chosen)
        if cost > budget:
            continue
        gain = sum((Fraction(candidate.gain) for candidate in chosen), Fraction(0))
        key = (-gain, cost, tuple(candidate.cost for candidate in chosen), places)
        if best is None or key < best[0]:
            best = (key, dict(zip(names, chosen, strict=True)))
    return None if best is None else best[1]


def best_gain_by_table(groups: Groups, budget: int) -> Fraction:
    """Fill the textbook table, one entry per parameter of budget."""
    table: list[Fraction | None] = [Fraction(0)] * (budget + 1)
    for candidates in groups.values():
        following: list[Fraction | None] = [None] * (budget + 1)
        for money in range(budget + 1):
            for candidate in candidates:
                before = table[money - candidate.cost] if candidate.cost <= money else None
                if before is None:
                    continue
                gain, known = before + Fraction(candidate.gain), following[money]
                if known is None or gain > known:
                    following[money] = gain
        table = following
    assert table[budget] is not None
    return table[budget]


def total_gain(chosen: Mapping[str, Candidate]) -> Fraction:
    """Sum the gains without rounding."""
    return sum((Fraction(candidate.gain) for candidate in chosen.values()), Fraction(0))


def hull_steps(groups: Groups, budget: int) -> list[tuple[Fraction, str, int, Fraction, Candidate]]:
    """Return (efficiency, name, cost, gain, candidate) of every upper hull step, best first.

    A candidate that would not fit beside the cheapest ones of the other groups does not exist.
    """
    spare = budget - sum(min(c.cost for c in candidates) for candidates in groups.values())
    steps = []
    for name in sorted(groups):
        at = cheapest(groups[name])
        limit = at.cost + spare
        while True:
            better = [
                (Fraction(c.gain) - Fraction(at.gain), c)
                for c in groups[name]
                if at.cost < c.cost <= limit and c.gain > at.gain
            ]
            if not better:
                break
            slope, cost, _ = min((-gain / (c.cost - at.cost), c.cost, 0) for gain, c in better)
            to = max((c for _, c in better if c.cost == cost), key=lambda c: c.gain)
            steps.append(
                (-slope, name, to.cost - at.cost, Fraction(to.gain) - Fraction(at.gain), to)
            )
            at = to
    return sorted(steps, key=lambda step: (-step[0], step[1], step[4].cost))


def cheapest(candidates: Sequence[Candidate]) -> Candidate:
    """Return the cheapest candidate, the best of equally cheap ones."""
    return min(candidates, key=lambda c: (c.cost, -c.gain))


def spendable(groups: Groups, budget: int) -> int:
    """Return what may be spent beyond the cheapest candidates, in whole gcd units."""
    start = {name: cheapest(candidates) for name, candidates in groups.items()}
    left = budget - sum(candidate.cost for candidate in start.values())
    unit = 0
    for name, candidates in groups.items():
        for c in candidates:
            useless = any(d.cost <= c.cost and d.gain >= c.gain and d != c for d in candidates)
            twin = any(d.cost == c.cost and d.gain == c.gain and d != c for d in candidates)
            if c.cost - start[name].cost <= left and (twin or not useless):
                unit = gcd(unit, c.cost - start[name].cost)
    return left // unit * unit if unit else 0


def lp_value(groups: Groups, budget: int) -> Fraction:
    """Take hull steps, the last one in part."""
    left = spendable(groups, budget)
    value = sum((Fraction(cheapest(cs).gain) for cs in groups.values()), Fraction(0))
    for _, _, cost, gain, _ in hull_steps(groups, budget):
        part = min(Fraction(1), Fraction(left, cost))
        value += part * gain
        left -= min(left, cost)
    return value


def greedy_choice(groups: Groups, budget: int, fill: bool = True) -> dict[str, Candidate]:
    """Take whole hull steps that fit, then the largest single improvements that fit."""
    chosen = {name: cheapest(candidates) for name, candidates in groups.items()}
    left = budget - sum(candidate.cost for candidate in chosen.values())
    stuck = set()
    for _, name, cost, _, candidate in hull_steps(groups, budget):
        if name in stuck or cost > left:
            stuck.add(name)
            continue
        chosen[name] = candidate
        left -= cost
    while fill:
        moves = [
            (Fraction(chosen[name].gain) - Fraction(c.gain), c.cost - chosen[name].cost, name, c)
            for name in sorted(groups)
            for c in groups[name]
            if c.cost - chosen[name].cost <= left and c.gain > chosen[name].gain
        ]
        if not moves:
            break
        _, cost, name, candidate = min(moves, key=lambda move: move[:3])
        chosen[name] = candidate
        left -= cost
    return chosen


def round_half_up(value: Fraction) -> int:
    """Round to the nearest whole number, halves up."""
    return floor(value + Fraction(1, 2))


def ranks_at(
    factor: Fraction,
    scores: Mapping[str, Fraction],
    low: Mapping[str, int],
    high: Mapping[str, int],
    rounding: Rounding = round_half_up,
) -> dict[str, int]:
    """Return ``clip(round(low + factor * score), low, high)``."""
    return {
        name: min(high[name], max(low[name], rounding(low[name] + factor * score)))
        for name, score in scores.items()
    }


def bounds_of(
    targets: Sequence[Target], r_min: int, r_max: int | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Return rank bounds per name, clipped to what a target can carry."""
    low = {t.name: min(r_min, t.d_in, t.d_out) for t in targets}
    high = {t.name: min(t.d_in, t.d_out, *([] if r_max is None else [r_max])) for t in targets}
    return low, high


def parameters(ranks: Mapping[str, int], targets: Sequence[Target]) -> int:
    """Count adapter parameters."""
    return sum(ranks[target.name] * (target.d_in + target.d_out) for target in targets)


def largest_factor(
    targets: Sequence[Target],
    scores: Mapping[str, Fraction],
    budget: int,
    r_min: int = 0,
    r_max: int | None = None,
) -> tuple[Fraction, dict[str, int]]:
    """Scan all break points of the rule; return the supremum of what fits, and the ranks there.

    Ranks are constant between two break points, so that one look into every gap sees all. The
    last gap is open; its supremum is given as one past the last break point.
    """
    low, high = bounds_of(targets, r_min, r_max)
    breaks = {Fraction(0)}
    for name, score in scores.items():
        if score > 0:
            breaks |= {
                (k - low[name] - Fraction(1, 2)) / score
                for k in range(low[name] + 1, high[name] + 1)
            }
    ordered = sorted(breaks)
    ordered.append(ordered[-1] + 1)
    found = None
    for start, end in pairwise(ordered):
        ranks = ranks_at((start + end) / 2, scores, low, high)
        if parameters(ranks, targets) <= budget:
            found = (end, ranks)
    assert found is not None
    return found


def proportional_ranks(
    targets: Sequence[Target],
    scores: Mapping[str, Fraction],
    budget: int,
    r_min: int = 0,
    r_max: int | None = None,
    spend_leftover: bool = True,
) -> dict[str, int]:
    """Return the rule's ranks, then one more rank at a time to the target cut most."""
    factor, ranks = largest_factor(targets, scores, budget, r_min, r_max)
    low, high = bounds_of(targets, r_min, r_max)
    while spend_leftover:
        slack = budget - parameters(ranks, targets)
        open_targets = [
            (
                -(low[t.name] + factor * scores[t.name] - ranks[t.name]),
                -scores[t.name],
                t.cost,
                t.name,
            )
            for t in targets
            if scores[t.name] > 0 and ranks[t.name] < high[t.name] and t.cost <= slack
        ]
        if not open_targets:
            break
        ranks[min(open_targets)[-1]] += 1
    return ranks


def best_ranks(
    targets: Sequence[Target],
    gains: Mapping[str, Sequence[float]],
    budget: int,
    r_min: int = 0,
    r_max: int | None = None,
) -> Fraction:
    """Try every rank vector; return the largest total gain within the budget."""
    low, high = bounds_of(targets, r_min, r_max)
    choices = [
        range(low[t.name], max(low[t.name], min(high[t.name], len(gains[t.name]))) + 1)
        for t in targets
    ]
    values = []
    for vector in product(*choices):
        ranks = {target.name: rank for target, rank in zip(targets, vector, strict=True)}
        if parameters(ranks, targets) <= budget:
            values.append(gain_of(ranks, gains))
    return max(values)


def gain_of(ranks: Mapping[str, int], gains: Mapping[str, Sequence[float]]) -> Fraction:
    """Sum the marginal gains of the ranks without rounding."""
    return sum(
        (Fraction(step) for name, rank in ranks.items() for step in gains[name][:rank]), Fraction(0)
    )
