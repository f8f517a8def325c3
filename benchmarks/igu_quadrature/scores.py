"""How steady the scores of directions are: the methods' own importance on measured gradients.

Each estimator looks at a few mini-batches; what it would have computed follows from gradients that
were measured before. Its looks go through :class:`gradrank.methods.pruning.ElementImportance`, as
in a run, and two disjoint halves of the mini-batches give two rankings to compare.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from benchmarks.igu_quadrature.layout import Layout
from benchmarks.igu_quadrature.study import exact_weights, weights_of
from torch import Tensor

from gradrank.methods.importance import ElementImportance
from gradrank.ops.agreement import spearman
from gradrank.ops.quadrature import Rule
from gradrank.ops.sketch import seed_of
from gradrank.signals.sensitivity import Observation, PathGradient

# How the looks of an estimator become a score per direction; see `Pool.scores`.
FORMS = (
    "ratio",
    "ratio, signed",
    "ratio without |λ|",
    "ratio, λ by its own ratio",
    "product with |λ|",
    "product",
    "product, signed",
    "mean",
    "mean, signed",
    "attribution",
)
_SIZED = "product with |λ|"


@dataclass(frozen=True)
class Estimator:
    """One way to look at a mini-batch.

    Attributes:
        name: Its name.
        cost: Gradients per mini-batch.
        rule: ``rule(seed, index)`` gives weights over the nodes, ``[nodes]``.
        code: Whether the ratio is that of the published code.
        aggregate: Looks that are averaged before mean and deviation take them in.
    """

    name: str
    cost: int
    rule: Callable[[int, int], Tensor]
    code: bool = False
    aggregate: int = 1


def estimators(
    nodes: Sequence[float], segments: int = 20, few: int = 8, grid: int = 4
) -> tuple[Estimator, ...]:
    """Return the estimators that are compared.

    Args:
        nodes: Where gradients are known.
        segments: N of all that draw points.
        few: N of another one that draws points, from fewer strata.
        grid: N of the whole grid.

    Returns:
        The estimators, the fine integral last.
    """

    def path(rule: str, n: int, endpoints: str = "drawn") -> Callable[[int, int], Tensor]:
        signal = PathGradient(rule, n, endpoints)
        return lambda seed, index: weights_of(signal.draw(seed, index), nodes)

    def code(seed: int, index: int) -> Tensor:
        # As gradrank.signals.scoring.RandomScaleScorer draws; the chain rule leaves the factor.
        scale = ((1 + seed_of("alpha", seed, index) % segments) / segments) ** 3
        return scale * weights_of(Rule((scale,), (1.0,)), nodes)

    last = weights_of(Rule((1.0,), (1.0,)), nodes)
    middle = weights_of(Rule((0.5,), (1.0,)), nodes)
    exact = exact_weights(nodes)
    return (
        Estimator(f"grid N={grid}", grid + 1, path("grid", grid)),
        Estimator(f"stochastic N={segments}", 3, path("stochastic", segments)),
        Estimator(f"unbiased always N={segments}", 3, path("unbiased", segments, "always")),
        Estimator(f"unbiased drawn N={segments}", 1, path("unbiased", segments)),
        Estimator(f"unbiased drawn N={few}", 1, path("unbiased", few)),
        Estimator(f"{few} drawn together", 1, path("unbiased", few), aggregate=few),
        Estimator("midpoint", 1, lambda _seed, _index: middle),
        Estimator(f"as-code N={segments}", 1, code, code=True),
        Estimator("instantaneous", 1, lambda _seed, _index: last),
        Estimator("fine integral", len(nodes), lambda _seed, _index: exact),
    )


@dataclass(frozen=True)
class Pool:
    """Measured gradients of a pool of mini-batches.

    Attributes:
        layout: What is stored.
        grads: ``[batches, nodes, size]``, float32.
        weights: The factors themselves, ``[size]``.
    """

    layout: Layout
    grads: Tensor
    weights: Tensor

    def scores(self, estimator: Estimator, batches: Sequence[int], seed: int) -> dict[str, Tensor]:
        """Return the score of every stored direction after looks at some mini-batches.

        Args:
            estimator: How it looks.
            batches: The mini-batches, in the order in which they are looked at.
            seed: Seed of the points.

        Returns:
            ``[directions]`` by form: *ratio* (IGU-LoRA's: magnitude of each look's integral; |λ|
            in the place of λ's ratio), *signed* (the formula as printed), *without |λ|* (P and Q
            alone), *product* (AdaLoRA's, λ by its own product; *with |λ|*: |λ| in its place, as
            ``igu`` with ``combine=product``), *mean* (magnitude of the mean over
            all looks, no uncertainty) and *attribution* (minus λ times the mean, which may be
            negative). For an estimator with ``code``, *ratio* has the code's constants.
        """
        eps, both = (1e-6, True) if estimator.code else (1e-12, False)

        def importance(how: str, signed: bool, by_size: bool) -> ElementImportance:
            found = eps if how == "ratio" else 0.0
            return ElementImportance(
                0.85, 0.85, how, found, both, by_size, estimator.aggregate, signed
            )

        watched = {
            signed: importance("ratio", signed, not estimator.code) for signed in (False, True)
        }
        weights = self.layout.split(self.weights)
        total = torch.zeros_like(self.weights)
        for index, batch in enumerate(batches):
            row = estimator.rule(seed, index).to(self.grads.dtype)
            flat = row @ self.grads[batch]
            total += flat
            look = Observation(self.layout.split(flat), weights)
            for each in watched.values():
                each.take(look)
        return self._forms(watched, importance, total / len(batches))

    def _forms(
        self,
        watched: Mapping[bool, ElementImportance],
        importance: Callable[[str, bool, bool], ElementImportance],
        mean: Tensor,
    ) -> dict[str, Tensor]:
        targets = self.layout.targets
        lam = {name: found["lam"] for name, found in self.layout.split(self.weights).items()}
        none = {name: torch.zeros_like(value) for name, value in lam.items()}

        def joined(of: ElementImportance, by: Mapping[str, Tensor]) -> Tensor:
            found = of.scores(targets, by)
            return torch.cat([found[target.name] for target in targets])

        forms: dict[str, Tensor] = {}
        for signed, name in ((False, ""), (True, ", signed")):
            forms[f"ratio{name}"] = joined(watched[signed], lam)
            for how in ("ratio", "product"):
                own = importance(how, signed, False)
                own.restore(watched[signed].state())
                forms[f"{how}, own{name}"] = joined(own, lam)
            term = self.weights.abs() * mean
            forms[f"mean{name}"] = self._directions(term if signed else term.abs())
        for how, by, name in (("ratio", none, "ratio without |λ|"), ("product", lam, _SIZED)):
            sized = importance(how, False, True)
            sized.restore(watched[False].state())
            forms[name] = joined(sized, by)
        forms["ratio, λ by its own ratio"] = forms["ratio, own"]
        forms |= {f"product{name}": forms[f"product, own{name}"] for name in ("", ", signed")}
        split = self.layout.split(self.weights * mean)
        forms["attribution"] = -torch.cat([split[target.name]["lam"] for target in targets])
        return {name: forms[name] for name in FORMS}

    def _directions(self, flat: Tensor) -> Tensor:
        """The score of a direction: that of λ, plus the means over its column and its row."""
        found = self.layout.split(flat)
        rows = [
            found[t.name]["lam"] + found[t.name]["B"].mean(0) + found[t.name]["A"].mean(1)
            for t in self.layout.targets
        ]
        return torch.cat(rows)


def split_half(
    pool: Pool,
    compared: Sequence[Estimator],
    splits: int,
    gradients: int | None,
    references: Mapping[str, Mapping[str, Tensor]],
    seed: int = 0,
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return agreements between scores from disjoint halves, and of halves with references.

    Args:
        pool: Measured gradients.
        compared: The estimators.
        splits: Random splits of the pool.
        gradients: Gradients that each half may cost; None looks at every mini-batch of it. Where
            that is more looks than it has mini-batches, they come again in another order.
        references: Further scores ``[directions]`` to compare each half with, by name and form;
            NaN where there is none.
        seed: Seed.

    Returns:
        By estimator and form: Spearman's correlation of every split under ``halves``, and the mean
        of both halves' correlations under each reference's name.
    """
    count = pool.grads.shape[0]
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for estimator in compared:
        table = found[estimator.name] = {
            form: {name: [] for name in ("halves", *references)} for form in FORMS
        }
        for split in range(splits):
            rng = np.random.default_rng([seed, split])
            order = rng.permutation(count).tolist()
            looks = count // 2 if gradients is None else max(1, gradients // estimator.cost)
            halves = (order[: count // 2], order[count // 2 : 2 * (count // 2)])
            sides = [_repeated(half, looks, rng) for half in halves]
            both = [
                pool.scores(estimator, side, seed_of(seed, split, place))
                for place, side in enumerate(sides)
            ]
            for form in FORMS:
                first, second = (scores[form] for scores in both)
                table[form]["halves"].append(spearman(first, second))
                for name, by_form in references.items():
                    value = by_form[form]
                    at = ~torch.isnan(value)
                    each = [spearman(side[at], value[at]) for side in (first, second)]
                    table[form][name].append(statistics.fmean(each))
    return found


def _repeated(half: Sequence[int], looks: int, rng: np.random.Generator) -> list[int]:
    found = list(half)
    while len(found) < looks:
        found += rng.permutation(half).tolist()
    return found[:looks]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, and the 5th and 95th percentile over splits, of what is finite.

    Args:
        values: Correlations.
    """
    kept = [value for value in values if not math.isnan(value)]
    if not kept:
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan")}
    low, high = np.quantile(kept, [0.05, 0.95]).tolist()
    return {"mean": statistics.fmean(kept), "low": low, "high": high}
