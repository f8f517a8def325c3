r"""How well a sum of gradients stands for a path integral: quadrature, noise and bias.

Everything here is arithmetic on gradients that were measured before, at nodes :math:`\alpha_k` of
the path (:mod:`benchmarks.igu_quadrature.measure`). Between the nodes the gradient is interpolated,
so that every estimator is a row of weights over the nodes: :math:`\hat I = \sum_k c_k g(\alpha_k)`.

Errors are relative and in the norm of what is scored, :math:`w \odot \int g`:
:math:`\|w \odot (\hat I - I)\| / \|w \odot I\|`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradrank.core.errors import OptionError
from gradrank.ops.quadrature import Rule

_CHUNK = 16384
# A draw of batches and points: (generator, M) -> batch of each look [M], its weights [M, nodes].
Draw = Callable[[torch.Generator, int], tuple[Tensor, Tensor]]


def chebyshev_points(count: int) -> tuple[float, ...]:
    """Return Chebyshev points of the second kind on [0, 1], both ends included.

    Args:
        count: How many, at least 2.
    """
    return tuple((1 - math.cos(math.pi * k / (count - 1))) / 2 for k in range(count))


def gauss_legendre(count: int) -> Rule:
    """Return the Gauss-Legendre rule on [0, 1], exact for polynomials of degree ``2 count - 1``.

    Args:
        count: Number of points.

    Returns:
        The rule; its weights sum to 1.
    """
    points, weights = np.polynomial.legendre.leggauss(count)
    return Rule(tuple((points + 1) / 2), tuple(weights / 2))


def interpolation(nodes: Sequence[float], points: Sequence[float]) -> Tensor:
    """Return the matrix that takes values at nodes to values of their polynomial at points.

    Args:
        nodes: Where values are known, all different.
        points: Where they are wanted.

    Returns:
        ``[points, nodes]``, float64; rows sum to 1.

    Notes:
        Barycentric form, which is stable on Chebyshev points.
    """
    x = torch.tensor(list(nodes), dtype=torch.float64)
    at = torch.tensor(list(points), dtype=torch.float64)
    apart = x[:, None] - x[None, :]
    apart.fill_diagonal_(1.0)
    far = at[:, None] - x[None, :]
    hit = far.abs() < 1e-14
    terms = (1 / apart.prod(1)) / torch.where(hit, 1.0, far)
    rows = terms / terms.sum(1, keepdim=True)
    return torch.where(hit.any(1, keepdim=True), hit.double(), rows)


def weights_of(rule: Rule, nodes: Sequence[float]) -> Tensor:
    """Return a rule as weights over the nodes, ``[nodes]``, float64.

    Args:
        rule: Points and weights; points need not be nodes.
        nodes: Where gradients are known.
    """
    return torch.tensor(rule.weights, dtype=torch.float64) @ interpolation(nodes, rule.points)


def exact_weights(nodes: Sequence[float]) -> Tensor:
    """Return weights that integrate the interpolating polynomial exactly, ``[nodes]``.

    Args:
        nodes: Where gradients are known.
    """
    return weights_of(gauss_legendre(len(nodes) // 2 + 1), nodes)


def squared_errors(
    values: Tensor, rules: Sequence[Tensor], reference: Tensor, weights: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """Return squared errors of rules, and the squared size of the reference, by group.

    Args:
        values: Gradients at the nodes, ``[nodes, n]``.
        rules: Weights over the nodes, each ``[nodes]``.
        reference: The integral, ``[n]``.
        weights: w, ``[n]``.
        groups: Group of every element, ``[n]``, counted from 0.

    Returns:
        ``[rules, groups]`` and ``[groups]``, float64.
    """
    many = int(groups.max()) + 1
    scored = (weights.double() * reference.double()).square()
    size = torch.zeros(many, dtype=torch.float64).index_add_(0, groups, scored)
    found = torch.zeros(len(rules), many, dtype=torch.float64)
    for row, rule in zip(found, rules, strict=True):
        missed = (rule.to(values.dtype) @ values).double() - reference.double()
        row.index_add_(0, groups, (weights.double() * missed).square())
    return found, size


@dataclass(frozen=True)
class Slope:
    """A straight line through the logarithms of counts and errors.

    Attributes:
        slope: The slope; -2 for the trapezoid rule on a smooth path.
        low: Lower end of the 95 % interval.
        high: Upper end.
        used: Counts that took part; the others were at the noise floor.
    """

    slope: float
    low: float
    high: float
    used: tuple[int, ...]


def fit_slope(
    counts: Sequence[int], squares: Tensor, sizes: Tensor, floor: float = 0.0, seed: int = 0
) -> Slope:
    """Fit the slope of the pooled error over counts, with a bootstrap over groups (targets).

    Args:
        counts: N, or M.
        squares: Squared errors, ``[counts, groups]``.
        sizes: Squared sizes of the reference, ``[groups]``.
        floor: Relative error of rounding; counts with less than five times that are left out.
        seed: Seed of the bootstrap.

    Returns:
        The slope and its interval.

    Raises:
        OptionError: If fewer than two counts are above the floor.
    """
    errors = (squares.sum(1) / sizes.sum()).sqrt()
    used = [i for i, error in enumerate(errors.tolist()) if error > 5 * floor]
    if len(used) < 2:
        raise OptionError(
            f"{len(used)} of {len(counts)} errors are above the rounding of {floor:.1g}, and a "
            "slope needs two. Choose smaller counts, or measure in float64."
        )
    x = torch.tensor([math.log(counts[i]) for i in used], dtype=torch.float64)
    x = (x - x.mean()) / (x - x.mean()).square().sum()
    generator = torch.Generator().manual_seed(seed)
    many = len(sizes)
    drawn = torch.randint(0, many, (400, many), generator=generator)
    rows = squares[used]
    again = torch.stack([0.5 * x @ (rows[:, d].sum(1) / sizes[d].sum()).log() for d in drawn])
    low, high = torch.quantile(again, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    slope = float(x @ errors[used].log())
    return Slope(slope, low, high, tuple(counts[i] for i in used))


@dataclass(frozen=True)
class Components:
    """Where the squared error of one look comes from, relative to the reference's square.

    Attributes:
        bias: Of the expectation over mini-batches and draws; no number of looks removes it.
        data: Variance between mini-batches.
        alpha: Variance between points that all mini-batches share; stratified draws remove it.
        both: Variance of points that differs between mini-batches.
    """

    bias: float
    data: float
    alpha: float
    both: float

    def error(self, looks: float, stratified: bool = False) -> float:
        """Return the expected relative error (root mean square) of a mean over looks.

        Args:
            looks: M, drawn independently.
            stratified: Whether the points visit all strata equally often.
        """
        noise = self.data + self.both + (0.0 if stratified else self.alpha)
        return math.sqrt(self.bias + noise / looks)


def components(
    values: Tensor, draws: Tensor, chances: Tensor, exact: Tensor, weights: Tensor
) -> Components:
    """Take the squared error of one look apart, by enumerating every mini-batch and every draw.

    Args:
        values: Gradients of the pool, ``[batches, nodes, n]``.
        draws: Weights over the nodes of every draw that can happen, ``[draws, nodes]``.
        chances: Probability of every draw, ``[draws]``.
        exact: Weights of the exact integral, ``[nodes]``.
        weights: w, ``[n]``.

    Returns:
        The components; mini-batches are drawn from the pool with replacement.

    Source:
        Two-way analysis of variance; IGU-LoRA, theorem 1, has the first as its N term and the sum
        of the others as its M term.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    chance = chances.double()
    for start in range(0, values.shape[2], _CHUNK):
        part = values[:, :, start : start + _CHUNK].double()
        w = weights[start : start + _CHUNK].double()
        seen = torch.einsum("dk,bkn->bdn", draws.double(), part)
        by_batch = torch.einsum("d,bdn->bn", chance, seen)
        by_draw = seen.mean(0)
        mean = by_batch.mean(0)
        truth = exact.double() @ part.mean(0)
        spread = (chance[:, None] * (seen - by_batch[:, None]).square()).sum(1).mean(0)
        alpha = (chance[:, None] * (by_draw - mean).square()).sum(0)
        terms = (truth, mean - truth, by_batch - mean)
        squares = [term.square() if term.dim() == 1 else term.square().mean(0) for term in terms]
        rows = torch.stack([*squares, alpha, spread - alpha])
        sums += (rows * w.square()).sum(1)
    scale, bias, data, alpha, both = sums.tolist()
    return Components(bias / scale, data / scale, alpha / scale, max(both, 0.0) / scale)


def simulate(
    values: Tensor,
    exact: Tensor,
    weights: Tensor,
    draw: Draw,
    looks: int,
    repeats: int,
    seed: int = 0,
) -> float:
    """Return the relative error (root mean square over repeats) of a mean over M looks.

    Args:
        values: Gradients of the pool, ``[batches, nodes, n]``.
        exact: Weights of the exact integral, ``[nodes]``.
        weights: w, ``[n]``.
        draw: Draws batches and weights of M looks.
        looks: M.
        repeats: How often.
        seed: Seed.

    Returns:
        The error against the fine integral over the whole pool.
    """
    batches, nodes, many = values.shape
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(repeats, batches, nodes, dtype=torch.float64)
    for row in rows:
        chosen, found = draw(generator, looks)
        row.index_add_(0, chosen, found / looks)
    rows -= exact / batches
    flat = values.reshape(batches * nodes, many)
    missed = (rows.reshape(repeats, -1).to(flat.dtype) @ flat).double() * weights.double()
    truth = (exact.to(flat.dtype) @ values.mean(0)).double() * weights.double()
    return float(missed.square().sum(1).mean().sqrt() / truth.norm())


def scaled_error(found: Tensor, truth: Tensor) -> float:
    """Return the relative error of the best multiple of a vector, ``sqrt(1 - cos²)``.

    What is left of an error that a later ratio cannot cancel.

    Args:
        found: The vector.
        truth: What it should be parallel to.
    """
    x, y = found.double(), truth.double()
    y = y / y.norm()
    along = (x @ y) * y
    return float((x - along).norm() / x.norm())


def by_group(
    rows: Mapping[str, Tensor], sizes: Mapping[str, Tensor], counts: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Return pooled relative errors by group name and count, as plain data.

    Args:
        rows: Squared errors ``[counts, groups]`` by name.
        sizes: Squared sizes ``[groups]`` by name.
        counts: What the rows stand for.
    """
    return {
        name: {
            str(count): math.sqrt(float(row.sum() / sizes[name].sum()))
            for count, row in zip(counts, found, strict=True)
        }
        for name, found in rows.items()
    }
