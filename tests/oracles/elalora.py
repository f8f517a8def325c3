"""A slow, obviously right round of ElaLoRA: one direction at a time, searched for afresh."""

from collections.abc import Mapping, Sequence

from gradrank.core.targets import Target

Ranked = Mapping[str, Sequence[float]]


def one_round(
    targets: Sequence[Target],
    scores: Ranked,
    budget: int,
    moves: int,
    most_new: int,
    r_min: int = 1,
    r_max: int = 10**9,
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Return the directions kept and the new ones by target."""
    kept = {t.name: list(range(len(scores[t.name]))) for t in targets}
    for _ in range(moves):
        free = [(scores[n][i], n, i) for n in kept for i in kept[n] if len(kept[n]) > r_min]
        if free:
            lowest = min(score for score, _, _ in free)
            # Of equal ones the latest place, then the last name.
            _, index, name = max((0, i, n) for score, n, i in free if score == lowest)
            kept[name].remove(index)
    new = {t.name: 0 for t in targets}
    losers = {n for n in kept if len(kept[n]) < len(scores[n])}
    votes = [(-scores[n][i], i, n) for n in kept if n not in losers for i in kept[n]]
    for _, _, name in sorted(votes):
        target = next(t for t in targets if t.name == name)
        new[name] += 1
        used = sum(t.cost * (len(kept[t.name]) + new[t.name]) for t in targets)
        rank = len(kept[name]) + new[name]
        if used > budget or new[name] > most_new or rank > min(r_max, target.max_rank):
            new[name] -= 1
    return {n: tuple(i) for n, i in kept.items()}, new


def round_by_ranks(
    targets: Sequence[Target], scores: Ranked, budget: int, moves: int, most_new: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """The broken twin: as many ranks come as go, whatever they cost."""
    alike = [Target(target.name, 50, 50) for target in targets]
    count = 100 * sum(len(found) for found in scores.values())
    return one_round(alike, scores, count, moves, most_new)


def round_with_open_losers(
    targets: Sequence[Target], scores: Ranked, budget: int, moves: int, most_new: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """The other broken twin: a target that lost directions gets new ones in the same round."""
    kept, _ = one_round(targets, scores, budget, moves, most_new)
    survivors = {n: [scores[n][i] for i in found] for n, found in kept.items()}
    _, new = one_round(targets, survivors, budget, 0, most_new)
    return kept, new
