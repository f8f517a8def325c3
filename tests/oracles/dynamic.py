"""Slow twin of dynamic GARD: exact fractions, plain loops, every break point of the rule tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from gradrank.core.targets import Target
from oracles.allocation import parameters, round_half_up
from oracles.spectra import effective_rank

Spectra = Mapping[str, Sequence[int]]
Ranks = dict[str, int]


@dataclass(frozen=True)
class Settings:
    budget: int
    energy: Fraction = Fraction(9, 10)
    beta: Fraction = Fraction(1, 2)
    r_min: int = 1
    r_max: int = 8
    max_delta: int = 2
    spend_leftover: bool = True


def smoothed(history: Sequence[Mapping[str, int]], beta: Fraction) -> dict[str, Fraction]:
    """``e_1 = n_1`` and ``e_t = β e_{t-1} + (1 - β) n_t``, written out."""
    ema = {name: Fraction(value) for name, value in history[0].items()}
    for found in history[1:]:
        ema = {name: beta * ema[name] + (1 - beta) * found[name] for name in ema}
    return ema


def bounds(target: Target, now: int, settings: Settings) -> tuple[int, int]:
    """Smallest and largest rank that one decision may give a target, by trying all of them."""
    ceiling = min(settings.r_max, target.d_in, target.d_out)
    floor = min(settings.r_min, target.d_in, target.d_out)
    near = range(now - settings.max_delta, now + settings.max_delta + 1)
    legal = [rank for rank in near if floor <= rank <= ceiling]
    if not legal:
        # Outside its bounds altogether: as far towards them as one decision may go.
        closest = near[0] if now > ceiling else near[-1]
        return closest, closest
    return min(legal), max(legal)


def allocate(
    targets: Sequence[Target],
    scores: Mapping[str, Fraction],
    now: Mapping[str, int],
    settings: Settings,
) -> Ranks:
    """GARD's rule for ranks that may only move a little: the largest factor that fits, then rest.

    Between two break points no rank changes, so that one look into every gap sees all.
    """
    base = {t.name: min(settings.r_min, t.d_in, t.d_out) for t in targets}
    low, high = {}, {}
    for target in targets:
        low[target.name], high[target.name] = bounds(target, now[target.name], settings)

    def at(factor: Fraction) -> Ranks:
        wished = {name: round_half_up(base[name] + factor * scores[name]) for name in base}
        return {name: min(high[name], max(low[name], wished[name])) for name in base}

    breaks = {Fraction(0)}
    for name, score in scores.items():
        for rank in range(base[name] + 1, high[name] + 1):
            if score > 0:
                breaks.add((rank - base[name] - Fraction(1, 2)) / score)
    ordered = [*sorted(breaks), max(breaks) + 1]
    fitting = [
        (end, at((start + end) / 2))
        for start, end in pairwise(ordered)
        if parameters(at((start + end) / 2), targets) <= settings.budget
    ]
    factor, ranks = fitting[-1]
    while settings.spend_leftover:
        slack = settings.budget - parameters(ranks, targets)
        wishes = [
            (
                ranks[t.name] - base[t.name] - factor * scores[t.name],
                -scores[t.name],
                t.cost,
                t.name,
            )
            for t in targets
            if scores[t.name] > 0 and ranks[t.name] < high[t.name] and t.cost <= slack
        ]
        if not wishes:
            break
        ranks[min(wishes)[-1]] += 1
    return ranks


def course(
    targets: Sequence[Target], start: Mapping[str, int], windows: Sequence[Spectra], s: Settings
) -> list[Ranks]:
    """Ranks after each decision, given the eigenvalues of each window."""
    ranks, taken, history = dict(start), [], []
    for window in windows:
        history.append({name: effective_rank(v, s.energy) for name, v in window.items()})
        ema = smoothed(history, s.beta)
        total = sum(ema.values())
        if total:
            scores = {name: value / total for name, value in ema.items()}
            ranks = allocate(targets, scores, ranks, s)
        taken.append(dict(ranks))
    return taken
