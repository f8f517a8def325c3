"""What the study finds about noise, bias and cost of the estimators, as plain data."""

import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.igu_quadrature import study as path_study
from benchmarks.igu_quadrature.layout import Layout
from benchmarks.igu_quadrature.study import exact_weights, gauss_legendre, weights_of
from torch import Tensor

from gradrank.ops import quadrature
from gradrank.ops.agreement import spearman
from gradrank.signals.sensitivity import PathGradient

_BLOCKS = 10
_T_OF_NINE = 2.262  # two-sided 95 %, ten blocks
_RUNS = 40  # different runs of stratified draws


@dataclass(frozen=True)
class Draws:
    """An estimator by all draws that can happen.

    Attributes:
        cost: Gradients per mini-batch.
        rows: Weights over the nodes, ``[draws, nodes]``.
        chances: Probability of every draw.
        signal: What draws them in a run; None where there is a single draw.
    """

    cost: int
    rows: Tensor
    chances: Tensor
    signal: PathGradient | None = None


def all_draws(nodes: Sequence[float], segments: int) -> dict[str, Draws]:
    """Return the estimators whose errors are compared, by name.

    Args:
        nodes: Where gradients are known.
        segments: N of those that draw points.

    Returns:
        Grids, Gauss rules, and the drawn ones. The weights of *stochastic* are multiplied by N/2,
        so that they sum to 1: any later ratio cancels its scale.
    """
    n = segments

    def fixed(rule: quadrature.Rule) -> Draws:
        one = torch.ones(1, dtype=torch.float64)
        return Draws(len(rule.points), weights_of(rule, nodes)[None], one)

    def interior(make: Any, scale: float, name: str) -> Draws:
        rows = torch.stack([weights_of(make(n, k), nodes) * scale for k in range(1, n)])
        even = torch.full((n - 1,), 1 / (n - 1), dtype=torch.float64)
        return Draws(3, rows, even, PathGradient(name, n, "always"))

    def drawn(segments: int) -> Draws:
        whole = quadrature.trapezoid(segments)
        rows = [weights_of(quadrature.Rule((point,), (1.0,)), nodes) for point in whole.points]
        chances = torch.tensor(whole.weights, dtype=torch.float64)
        return Draws(1, torch.stack(rows), chances, PathGradient("unbiased", segments, "drawn"))

    found = {f"grid N={k}": fixed(quadrature.trapezoid(k)) for k in (1, 2, 4, 8)}
    found["midpoint"] = fixed(gauss_legendre(1))
    found["Gauss 2"] = fixed(gauss_legendre(2))
    found["instantaneous"] = fixed(quadrature.Rule((1.0,), (1.0,)))
    found[f"stochastic N={n}"] = interior(quadrature.as_printed, n / 2, "stochastic")
    found[f"unbiased always N={n}"] = interior(quadrature.with_interior_weighted, 1.0, "unbiased")
    found |= {f"unbiased drawn N={k}": drawn(k) for k in (n, 8)}
    return found


def drawer(draws: Draws, nodes: Sequence[float], batches: int, stratified: bool) -> path_study.Draw:
    """Return what draws mini-batches (with replacement) and points.

    Args:
        draws: The estimator.
        nodes: Where gradients are known.
        batches: Mini-batches of the pool.
        stratified: Whether points are drawn as in a run, stratified over looks, or independently.
    """
    scale = float(draws.rows[0].sum())

    def draw(generator: torch.Generator, looks: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(batches, (looks,), generator=generator)
        if stratified and draws.signal is not None:
            seed, at = int(torch.randint(_RUNS, (1,), generator=generator)), tuple(nodes)
            found = [_drawn(draws.signal, seed, index, at) for index in range(looks)]
            rows = torch.tensor(found, dtype=torch.float64)
            return chosen, rows * (scale / rows[0].sum())
        at = torch.multinomial(draws.chances, looks, replacement=True, generator=generator)
        return chosen, draws.rows[at]

    return draw


@functools.cache
def _drawn(
    signal: PathGradient, seed: int, index: int, nodes: tuple[float, ...]
) -> tuple[float, ...]:
    return tuple(weights_of(signal.draw(seed, index), nodes).tolist())


def noise(
    of: Mapping[str, tuple[Tensor, Tensor]], nodes: Sequence[float], segments: int = 20
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the components of each estimator's error, by part.

    Args:
        of: Gradients ``[batches, nodes, n]`` and weights ``[n]`` by part.
        nodes: The nodes.
        segments: N of those that draw points.
    """
    exact = exact_weights(nodes)
    return {
        part: {
            name: _plain(path_study.components(values, d.rows, d.chances, exact, weights), d.cost)
            for name, d in all_draws(nodes, segments).items()
        }
        for part, (values, weights) in of.items()
    }


def _plain(found: path_study.Components, cost: int) -> dict[str, float]:
    return {
        "gradients": cost,
        "bias": found.bias,
        "data": found.data,
        "alpha": found.alpha,
        "both": found.both,
    }


def over_looks(
    values: Tensor,
    weights: Tensor,
    nodes: Sequence[float],
    looks: Sequence[int],
    segments: int = 20,
    repeats: int = 20,
) -> dict[str, Any]:
    """Return measured errors over M, drawn with replacement from the pool, and their slopes.

    Args:
        values: Gradients, ``[batches, nodes, n]``.
        weights: w, ``[n]``.
        nodes: The nodes.
        looks: The M.
        segments: N of those that draw points.
        repeats: Repetitions in each of ten blocks, which the slopes' intervals come from.
    """
    exact, found = exact_weights(nodes), {}
    known = all_draws(nodes, segments)
    for name, stratified in _over_looks_of(segments):
        draw = drawer(known[name], nodes, len(values), stratified)
        blocks = [
            [
                path_study.simulate(values, exact, weights, draw, m, repeats, 1000 * block + m)
                for m in looks
            ]
            for block in range(_BLOCKS)
        ]
        each = [_line(looks, errors) for errors in blocks]
        half = _T_OF_NINE * statistics.stdev(each) / math.sqrt(_BLOCKS)
        mean = statistics.fmean(each)
        label = f"{name}, stratified" if stratified else name
        found[label] = {
            "errors": [
                math.sqrt(statistics.fmean(e**2 for e in row)) for row in zip(*blocks, strict=True)
            ],
            "slope": mean,
            "interval": [mean - half, mean + half],
        }
    return {"looks": list(looks), "estimators": found}


def _over_looks_of(segments: int) -> Iterator[tuple[str, bool]]:
    yield "grid N=4", False
    yield f"stochastic N={segments}", False
    yield f"unbiased always N={segments}", False
    yield f"unbiased drawn N={segments}", False
    yield f"unbiased drawn N={segments}", True
    yield "unbiased drawn N=8", True
    yield "instantaneous", False


def at_cost(
    values: Tensor,
    weights: Tensor,
    nodes: Sequence[float],
    budgets: Sequence[int],
    segments: int = 20,
    repeats: int = 100,
) -> list[dict[str, Any]]:
    """Return the error that a number of gradients buys: predicted by the components, and measured.

    Args:
        values: Gradients, ``[batches, nodes, n]``.
        weights: w, ``[n]``.
        nodes: The nodes.
        budgets: Numbers of gradients.
        segments: N of those that draw points.
        repeats: Repetitions of the measured error.
    """
    exact, rows = exact_weights(nodes), []
    for name, draws in all_draws(nodes, segments).items():
        parts = path_study.components(values, draws.rows, draws.chances, exact, weights)
        stratified = draws.signal is not None
        row: dict[str, Any] = {"estimator": name, "gradients": draws.cost, "budgets": {}}
        for budget in budgets:
            looks = budget // draws.cost
            if looks:
                draw = drawer(draws, nodes, len(values), stratified)
                row["budgets"][str(budget)] = {
                    "looks": looks,
                    "predicted": parts.error(looks, stratified),
                    "measured": path_study.simulate(
                        values, exact, weights, draw, looks, repeats, budget
                    ),
                }
        rows.append(row)
    return rows


def _line(counts: Sequence[int], errors: Sequence[float]) -> float:
    x = torch.tensor(counts, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x @ y) / (x @ x))


def bias(
    mean: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    layout: Layout,
    nodes: Sequence[float],
    counts: Sequence[int] = (4, 10, 20, 50),
) -> list[dict[str, Any]]:
    """Return what the printed weights do to the expectation, for several N.

    Args:
        mean: Gradients of the whole pool at the nodes: ``grads`` ``[nodes, size]``, ``lam``.
        weights: The factors in the same layout.
        layout: What is stored.
        nodes: The nodes.
        counts: The N.

    Returns:
        One row per N and rule, with the sum of the weights, the ends' share of it, the relative
        error as it is and of its best multiple, and rank correlations with the exact integral.
    """
    exact = exact_weights(nodes)
    truth = {key: (exact @ found.double()) * weights[key] for key, found in mean.items()}
    some = torch.randperm(layout.size, generator=torch.Generator().manual_seed(0))[:50_000]
    rows = []
    for n in counts:
        for name, make in (
            ("stochastic", quadrature.as_printed),
            ("unbiased", quadrature.with_interior_weighted),
        ):
            drawn = [make(n, k) for k in range(1, n)]
            row = torch.stack([weights_of(rule, nodes) for rule in drawn]).mean(0)
            found = {key: (row @ values.double()) * weights[key] for key, values in mean.items()}
            total = sum(drawn[0].weights)
            flat, right = found["grads"], truth["grads"]
            rows.append(
                {
                    "segments": n,
                    "rule": name,
                    "sum of weights": total,
                    "share of the ends": (drawn[0].weights[0] + drawn[0].weights[-1]) / total,
                    "error": float((flat - right).norm() / right.norm()),
                    "error, scaled": path_study.scaled_error(flat, right),
                    "error of directions, scaled": path_study.scaled_error(
                        found["lam"], truth["lam"]
                    ),
                    "Spearman of elements": spearman(flat[some].abs(), right[some].abs()),
                    "Spearman of attributions": spearman(found["lam"], truth["lam"]),
                    "Spearman of scores": spearman(
                        direction_sizes(layout, flat), direction_sizes(layout, right)
                    ),
                }
            )
    return rows


def direction_sizes(layout: Layout, flat: Tensor) -> Tensor:
    """Return ``|λ s| + mean |P s| + mean |Q s|`` of every stored direction.

    Args:
        layout: What is stored.
        flat: w times gradient of every stored element.
    """
    split = layout.split(flat.abs())
    found = [split[target.name] for target in layout.targets]
    return torch.cat([f["lam"] + f["B"].mean(0) + f["A"].mean(1) for f in found])
