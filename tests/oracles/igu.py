"""Slow twins of path integrals, their estimators, smoothing, direction scores and pruning.

Closed forms and loops in float64 or exact fractions. The functions whose names say what is wrong
with them are the broken twins: the tests show that they are told apart.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from gradrank.core.targets import Target

Factors = dict[str, Tensor]

# --- losses whose path integral has a closed form ------------------------------------------------


@dataclass(frozen=True)
class PolynomialLoss:
    """``L(D) = sum c D + 1/2 D^T H D + 1/4 sum q D^4`` of an update D ``[d_out, d_in]``.

    H couples all entries; q does not.
    """

    linear: Tensor
    hessian: Tensor
    quartic: Tensor

    def __call__(self, update: Tensor) -> Tensor:
        flat = update.reshape(-1)
        quadratic = flat @ self.hessian @ flat / 2
        return (self.linear * update).sum() + quadratic + (self.quartic * update**4).sum() / 4

    def mean_gradient(self, update: Tensor) -> Tensor:
        """``∫ G(α D) dα`` over [0, 1]: ``c + H D / 2 + q D^3 / 4``."""
        coupled = (self.hessian @ update.reshape(-1)).view(update.shape)
        return self.linear + coupled / 2 + self.quartic * update**3 / 4

    def mean_gradient_with_chain_factor(self, update: Tensor) -> Tensor:
        """The broken twin ``∫ α G(α D) dα``, which takes the gradient with respect to ``α w``."""
        coupled = (self.hessian @ update.reshape(-1)).view(update.shape)
        return self.linear / 2 + coupled / 3 + self.quartic * update**3 / 5

    def gradient(self, update: Tensor, alpha: float) -> Tensor:
        """``G(α D)``."""
        coupled = (self.hessian @ update.reshape(-1)).view(update.shape)
        return self.linear + alpha * coupled + self.quartic * (alpha * update) ** 3


def random_loss(d_out: int, d_in: int, seed: int = 0, quartic: bool = True) -> PolynomialLoss:
    generator = torch.Generator().manual_seed(seed)
    size = d_out * d_in
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    shape = (d_out, d_in)
    return PolynomialLoss(
        torch.randn(shape, generator=generator, dtype=torch.float64),
        root @ root.T / size,
        torch.randn(shape, generator=generator, dtype=torch.float64) * float(quartic),
    )


def update_of(factors: Mapping[str, Tensor], scaling: float) -> Tensor:
    """``scaling * sum_i lam_i p_i q_i^T``, one component after the other."""
    P, Q = factors["B"], factors["A"]
    lam = factors.get("lam", torch.ones(P.shape[1], dtype=P.dtype))
    total = torch.zeros(P.shape[0], Q.shape[1], dtype=torch.float64)
    for i in range(len(lam)):
        total += scaling * float(lam[i]) * torch.outer(P[:, i].double(), Q[i].double())
    return total


def by_factor(G: Tensor, factors: Mapping[str, Tensor], scaling: float) -> Factors:
    """The gradient of every element of the factors, entry by entry, from that of the update."""
    P, Q = factors["B"].double(), factors["A"].double()
    lam = factors["lam"].double() if "lam" in factors else torch.ones(P.shape[1]).double()
    found = {"A": torch.zeros_like(Q), "B": torch.zeros_like(P), "lam": torch.zeros_like(lam)}
    for i in range(len(lam)):
        for row in range(P.shape[0]):
            for column in range(Q.shape[1]):
                g = scaling * G[row, column]
                found["B"][row, i] += g * lam[i] * Q[i, column]
                found["A"][i, column] += g * lam[i] * P[row, i]
                found["lam"][i] += g * P[row, i] * Q[i, column]
    return {name: found[name] for name in factors}


# --- gradients on the path, from explicit copies of a whole model --------------------------------


def at_dense_weights(
    base: Any,
    updates: Mapping[str, Tensor],
    alpha: float,
    loss_of: Callable[[Any], Tensor],
    transposed: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and its gradient by dense weight, in a copy without adapter at ``W0 + α ΔW``.

    ``transposed``: for layers that store their weight ``[d_in, d_out]``.
    """
    model = copy.deepcopy(base)
    weights = {name: model.get_submodule(name).weight for name in updates}
    with torch.no_grad():
        for name, weight in weights.items():
            update = updates[name].T if transposed else updates[name]
            weight.add_(alpha * update.to(weight.dtype))
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = loss_of(model)
    found = torch.autograd.grad(loss, list(weights.values()))
    grads = {n: (g.T if transposed else g) for n, g in zip(weights, found, strict=True)}
    return float(loss.detach()), grads


# --- estimators ----------------------------------------------------------------------------------

Path = Callable[[Fraction], Fraction]


def trapezoid_sum(g: Path, segments: int) -> Fraction:
    """The mean of both ends of every segment, added up segment by segment."""
    total = Fraction(0)
    for k in range(segments):
        left, right = Fraction(k, segments), Fraction(k + 1, segments)
        total += (g(left) + g(right)) / 2 * (right - left)
    return total


def expected_as_printed(g: Path, segments: int) -> Fraction:
    """Equation 6 as it is printed, enumerated over its interior points."""
    total = Fraction(0)
    for k in range(1, segments):
        term = g(Fraction(0)) + 2 * g(Fraction(k, segments)) + g(Fraction(1))
        total += term / (2 * segments)
    return total / (segments - 1)


def expected_as_derived(g: Path, segments: int) -> Fraction:
    """The same with the factor ``N - 1`` on the interior."""
    total = Fraction(0)
    for k in range(1, segments):
        inside = 2 * (segments - 1) * g(Fraction(k, segments))
        total += (g(Fraction(0)) + inside + g(Fraction(1))) / (2 * segments)
    return total / (segments - 1)


def polynomial(coefficients: Sequence[int]) -> Path:
    return lambda a: sum((c * a**i for i, c in enumerate(coefficients)), start=Fraction(0))


def integral(coefficients: Sequence[int]) -> Fraction:
    return sum((Fraction(c, i + 1) for i, c in enumerate(coefficients)), start=Fraction(0))


# --- smoothing and scores ------------------------------------------------------------------------


def smoothed(scores: Sequence[float], beta1: float, beta2: float) -> tuple[float, float]:
    """Mean and deviation of one element after its scores, one after the other."""
    mean = deviation = 0.0
    for score in scores:
        mean = beta1 * mean + (1 - beta1) * score
        deviation = beta2 * deviation + (1 - beta2) * abs(score - mean)
    return mean, deviation


def smoothed_by_old_mean(
    scores: Sequence[float], beta1: float, beta2: float
) -> tuple[float, float]:
    """The broken twin, whose deviation is from the mean before this score."""
    mean = deviation = 0.0
    for score in scores:
        deviation = beta2 * deviation + (1 - beta2) * abs(score - mean)
        mean = beta1 * mean + (1 - beta1) * score
    return mean, deviation


@dataclass(frozen=True)
class Scoring:
    """How the scores of one element, over time, become its importance."""

    beta1: float = 0.85
    beta2: float = 0.85
    how: str = "ratio"
    eps: float = 1e-12
    in_both: bool = False

    def importance(self, scores: Sequence[float]) -> float:
        mean, deviation = smoothed(scores, self.beta1, self.beta2)
        if self.how == "product":
            return mean * deviation
        if self.in_both:
            return (mean + self.eps) / (deviation + self.eps)
        return mean / (deviation + self.eps)


def direction_scores(
    history: Sequence[Mapping[str, Tensor]],
    scoring: Scoring,
    lam: Tensor | None = None,
    broken: bool = False,
) -> list[float]:
    """Equation 3 by loops over elements, given every element's score at each look.

    ``lam`` is given where the size of λ takes the place of its importance. ``broken`` adds
    columns and rows up instead of averaging them.
    """
    rows, rank = history[0]["B"].shape
    columns = history[0]["A"].shape[1]

    def importance(factor: str, *where: int) -> float:
        return scoring.importance([float(look[factor][where]) for look in history])

    found = []
    for i in range(rank):
        of_p = math.fsum(importance("B", k, i) for k in range(rows))
        of_q = math.fsum(importance("A", i, k) for k in range(columns))
        if not broken:
            of_p, of_q = of_p / rows, of_q / columns
        first = importance("lam", i) if lam is None else abs(float(lam[i]))
        found.append(first + of_p + of_q)
    return found


# --- pruning -------------------------------------------------------------------------------------


def keep_one_by_one(
    targets: Sequence[Target],
    scores: Mapping[str, Sequence[float]],
    budget: int,
    r_min: int = 0,
    stops: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Take the best direction that can still be paid, again and again.

    ``stops`` is the broken twin, which ends at the first direction that is too dear.
    """
    cost = {t.name: t.d_in + t.d_out for t in targets}
    kept: dict[str, list[int]] = {t.name: [] for t in targets}

    def free(name: str) -> list[tuple[float, int, str]]:
        left = [i for i in range(len(scores[name])) if i not in kept[name]]
        return [(-scores[name][i], i, name) for i in left]

    for target in targets:
        for _ in range(r_min):
            if free(target.name):
                _, i, _ = min(free(target.name))
                kept[target.name].append(i)
    while True:
        left = budget - sum(len(found) * cost[name] for name, found in kept.items())
        wishes = [wish for t in targets for wish in free(t.name)]
        if not stops:
            wishes = [wish for wish in wishes if cost[wish[2]] <= left]
        if not wishes or cost[min(wishes)[2]] > left:
            return {name: tuple(sorted(found)) for name, found in kept.items()}
        _, i, name = min(wishes)
        kept[name].append(i)


# --- schedule ------------------------------------------------------------------------------------


def cubic(
    step: int, start: int, budget: int, times: tuple[int, int, int], printed: bool = False
) -> Fraction:
    """AdaLoRA's curve in exact fractions; ``times`` are all steps, t_i and t_f.

    ``printed`` is the formula as AdaLoRA's text has it, whose numerator also takes t_f away: it
    does not begin at ``start`` and does not end at ``budget``.
    """
    total, first, final = times
    if step <= first:
        return Fraction(start)
    if step >= total - final:
        return Fraction(budget)
    gone = step - first - (final if printed else 0)
    left = 1 - Fraction(gone, total - first - final)
    return budget + (start - budget) * left**3
