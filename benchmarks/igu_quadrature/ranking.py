"""What the study finds about rankings of directions: how steady they are, and how right."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from benchmarks.igu_quadrature.collect import Measured
from benchmarks.igu_quadrature.scores import FORMS, Pool, estimators, split_half, spread
from torch import Tensor

from gradrank.allocation import keep_directions
from gradrank.ops.agreement import spearman

# The share of the stored parameters that rankings really leave.
KEPT = 0.25
# Those rankings: estimator (by its first word) and form.
_PRUNED = (
    ("unbiased drawn N=20", "ratio"),
    ("unbiased drawn N=8", "ratio"),
    ("unbiased drawn N=20", "ratio, signed"),
    ("stochastic", "ratio"),
    ("grid", "ratio"),
    ("instantaneous", "ratio"),
    ("instantaneous", "mean"),
    ("as-code", "ratio, λ by its own ratio"),
    ("instantaneous", "product"),
    ("unbiased drawn N=8", "product"),
    ("unbiased drawn N=8", "mean"),
    ("unbiased drawn N=8", "attribution"),
    ("grid", "attribution"),
    ("midpoint", "attribution"),
    ("instantaneous", "attribution"),
)
# What a longer run is not simulated of.
_SHORT_ONLY = ("stochastic", "unbiased always", "midpoint", "as-code")
_AT_BEST = ("ratio", "ratio, signed", "product", "mean", "attribution")


def rankings(measured: Measured, pool: Pool, segments: int = 20) -> dict[str, Any]:
    """Return split-half reliability at equal cost and at equal mini-batches, and agreements.

    Args:
        measured: The measurements.
        pool: Gradients of the pool.
        segments: N of the estimators that draw points.

    Returns:
        ``equal_cost``, ``equal_looks`` and ``long`` (equal cost, four times as many gradients, so
        that mini-batches of a half come again) by estimator and form; how much of each form is |λ|;
        and the agreement of scores from the whole pool with single removals.
    """
    nodes, count, splits = measured.nodes, len(pool.grads), measured.size.splits
    *compared, fine = estimators(nodes, segments)
    everything = list(range(count))
    best = pool.scores(fine, everything, 0)
    removal, noise = removed_one_by_one(measured)
    references = {
        "fine": best,
        "fine mean": dict.fromkeys(FORMS, best["mean"]),
        "removal": dict.fromkeys(FORMS, removal),
    }
    # These cost more gradients and vary less.
    few = max(2, 2 * splits // 5)
    short = [e for e in compared if e.aggregate == 1]
    long = [e for e in compared if not e.name.startswith(_SHORT_ONLY)]
    cost = split_half(pool, short, splits, count // 2, references)
    looks = split_half(pool, [*short, fine], few, None, references)
    again = split_half(pool, long, max(2, splits // 4), 2 * count, references)
    lam = _lam(pool)
    at = ~torch.isnan(removal)
    whole = {
        estimator.name: {
            form: spearman(value[at], removal[at])
            for form, value in pool.scores(estimator, everything, 0).items()
        }
        for estimator in (*short, fine)
    }
    return {
        "gradients": count // 2,
        "splits": splits,
        "equal_cost": _summary(cost),
        "equal_looks": _summary(looks),
        "long_gradients": 2 * count,
        "long": _summary(again),
        "agreement with |λ|": {form: spearman(best[form], lam) for form in FORMS},
        "removal": {
            "directions": int(at.sum()),
            "reliability": noise,
            "|λ|": spearman(lam[at], removal[at]),
            "whole pool": whole,
            "loss": removal[at].tolist(),
            "attribution": best["attribution"][at].tolist(),
        },
    }


def removed_one_by_one(measured: Measured) -> tuple[Tensor, float]:
    """Return the loss that taking out each chosen direction costs, and how reliable that is.

    Args:
        measured: The measurements.

    Returns:
        ``[directions]`` of the stored targets, NaN where none was taken out; and Spearman's
        correlation of the two halves of the held-out mini-batches.
    """
    layout = measured.rig.layout
    chosen, found = measured.ablated()
    start, places = 0, {}
    for target in layout.targets:
        places[target.name] = start
        start += layout.ranks[target.name]
    costs = found["losses"] - found["whole"]
    removal = torch.full((start,), float("nan"), dtype=torch.float64)
    for (name, index), cost in zip(chosen, costs.mean(1), strict=True):
        removal[places[name] + index] = cost
    return removal, spearman(costs[:, 0::2].mean(1), costs[:, 1::2].mean(1))


def pruned(measured: Measured, pool: Pool, segments: int = 20, draws: int = 2) -> dict[str, Any]:
    """Return held-out losses with a quarter of the stored parameters left, by various rankings.

    Nothing is trained afterwards. Each ranking had the gradients of one half of the pool, but for
    those of the fine integral, which had all of it.

    Args:
        measured: The measurements.
        pool: Gradients of the pool.
        segments: N of the estimators that draw points.
        draws: Halves per ranking.
    """
    count, layout = len(pool.grads), measured.rig.layout
    *compared, fine = estimators(measured.nodes, segments)
    best = pool.scores(fine, list(range(count)), 0)
    rows: dict[str, list[dict[str, float]]] = {
        "nothing removed": [measured.pruned("nothing", {})],
        "|λ|": [_remaining(measured, "|λ|", _lam(pool))],
    }
    rows |= {f"fine, {form}": [_remaining(measured, form, best[form])] for form in _AT_BEST}
    everything = {target.name: list(range(layout.ranks[target.name])) for target in layout.targets}
    rows["all stored removed"] = [measured.pruned("everything", everything)]
    generator = torch.Generator().manual_seed(measured.settings.seed)
    orders = [torch.randperm(count, generator=generator).tolist() for _ in range(draws)]
    rows["random"] = [
        _remaining(measured, "random", torch.rand(len(best["mean"]), generator=generator))
        for _ in range(3)
    ]
    for first, form in _PRUNED:
        estimator = next(e for e in compared if e.name.startswith(first))
        looks = max(1, count // 2 // estimator.cost)
        rows[f"{estimator.name}, {form}"] = [
            _remaining(measured, form, pool.scores(estimator, order[:looks], seed)[form])
            for seed, order in enumerate(orders)
        ]
    return rows


def _remaining(measured: Measured, form: str, scores: Tensor) -> dict[str, float]:
    """The loss once directions are kept by score for a share of the stored parameters."""
    layout = measured.rig.layout
    split = scores.split([layout.ranks[target.name] for target in layout.targets])
    by_cost = form == "attribution"
    listed = {
        target.name: (part / target.cost if by_cost else part).tolist()
        for target, part in zip(layout.targets, split, strict=True)
    }
    whole = sum(layout.ranks[target.name] * target.cost for target in layout.targets)
    kept = keep_directions(layout.targets, listed, int(KEPT * whole))
    removed = {
        target.name: [i for i in range(layout.ranks[target.name]) if i not in kept[target.name]]
        for target in layout.targets
    }
    return measured.pruned(form, {name: found for name, found in removed.items() if found})


def _lam(pool: Pool) -> Tensor:
    found = pool.layout.split(pool.weights)
    return torch.cat([found[target.name]["lam"].abs() for target in pool.layout.targets])


def _summary(
    found: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    return {
        name: {
            form: {key: spread(values) for key, values in row.items()}
            for form, row in table.items()
        }
        for name, table in found.items()
    }


def pool_of(measured: Measured) -> tuple[Pool, Tensor, Tensor]:
    """Return the pool's gradients, those of all λ ``[batches, nodes, directions]``, and all λ.

    Args:
        measured: The measurements.
    """
    found = [measured.at_nodes(index) for index in range(measured.size.pool)]
    flat, lam = measured.rig.flat_weights()
    grads = torch.stack([each["grads"] for each in found])
    return Pool(measured.rig.layout, grads, flat), torch.stack([e["lam"] for e in found]), lam
