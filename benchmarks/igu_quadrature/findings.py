"""What the study finds about quadrature along the path, as plain data for its figures."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.igu_quadrature import study as path_study
from benchmarks.igu_quadrature.collect import Measured
from benchmarks.igu_quadrature.layout import Layout
from benchmarks.igu_quadrature.study import (
    Slope,
    exact_weights,
    gauss_legendre,
    interpolation,
    weights_of,
)
from torch import Tensor

from gradrank.ops import quadrature
from gradrank.signals.path import FACTORS

NAMES = {"A": "Q", "B": "P", "lam": "λ"}


@dataclass(frozen=True)
class Part:
    """One kind of gradients: a factor's elements, or λ of all targets (the directions).

    Attributes:
        name: Its name in the results.
        key: Where it stands in a measurement.
        columns: Which columns of that.
        weights: w of these columns.
        groups: The target of each column, counted from 0.
    """

    name: str
    key: str
    columns: Tensor
    weights: Tensor
    groups: Tensor


def parts(layout: Layout, flat: Tensor, lam: Tensor) -> tuple[Part, ...]:
    """Return Q, P and λ of the stored targets, and λ of all targets.

    Args:
        layout: What is stored.
        flat: The stored factors, ``[size]``.
        lam: λ of all targets.
    """
    factors, owner = layout.factor_of(), torch.empty(layout.size, dtype=torch.long)
    order = {target.name: i for i, target in enumerate(layout.targets)}
    for name, _, place, _ in layout.parts():
        owner[place] = order[name]
    found = []
    for number, factor in enumerate(FACTORS[:2]):
        at = (factors == number).nonzero()[:, 0]
        found.append(Part(NAMES[factor], "grads", at, flat[at], owner[at]))
    ranks = torch.tensor([layout.ranks[name] for name in layout.names])
    groups = torch.arange(len(layout.names)).repeat_interleave(ranks)
    found.append(Part("λ", "lam", torch.arange(len(lam)), lam, groups))
    return tuple(found)


def convergence(measured: Measured) -> dict[str, Any]:
    """Return the error of the trapezoid rule over N, measured at its own points.

    Args:
        measured: The measurements.

    Returns:
        ``errors`` and ``slopes`` by part, ``rounding`` (float32 against float64), how well
        interpolation between the nodes does, ``worst`` targets, the completeness gap, the loss
        along the path, and the sizes of Chebyshev coefficients.
    """
    size, nodes = measured.size, measured.nodes
    flat, lam = measured.rig.flat_weights()
    of = parts(measured.rig.layout, flat, lam)
    counts = [2**k for k in range(size.grid.bit_length()) if size.grid % 2**k == 0]
    grid = [k / size.grid for k in range(size.grid + 1)]
    rules = [weights_of(quadrature.trapezoid(n), grid) for n in counts]
    fine = torch.tensor(gauss_legendre(size.gauss).weights, dtype=torch.float64)
    rounding = _rounding(measured, of, fine)
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {part.name: [] for part in of}
    checks: dict[str, list[tuple[float, float]]] = {part.name: [] for part in of}
    gaps = []
    for index in range(size.direct):
        seen, exact = measured.direct(index)
        between = measured.at_nodes(index)
        for part in of:
            values, truth = seen[part.key][:, part.columns], exact[part.key][:, part.columns]
            reference = fine @ truth.double()
            rows[part.name].append(
                path_study.squared_errors(values, rules, reference, part.weights, part.groups)
            )
            known = between[part.key][:, part.columns]
            checks[part.name].append(_interpolated(known, nodes, values, grid, part, reference))
        change = float(seen["losses"][-1] - seen["losses"][0])
        sums = [float((rule @ seen["lam"].double()) @ lam.double()) for rule in rules]
        gaps.append(
            {"change": change, "attributed": dict(zip(map(str, counts), sums, strict=True))}
        )
    squares = {name: torch.cat([s for s, _ in found], 1) for name, found in rows.items()}
    sizes = {name: torch.cat([z for _, z in found]) for name, found in rows.items()}
    return {
        "counts": counts,
        "errors": path_study.by_group(squares, sizes, counts),
        "slopes": {n: _slopes(counts, s, sizes[n], rounding[n]) for n, s in squares.items()},
        "rounding": rounding,
        "interpolation": {
            name: {
                "integral": max(a for a, _ in found),
                "pointwise": max(b for _, b in found),
            }
            for name, found in checks.items()
        },
        "targets": _by_target(measured.rig.layout.names, counts, squares["λ"], sizes["λ"]),
        "completeness": gaps,
        "losses": [grid, measured.direct(0)[0]["losses"].tolist()],
        "coefficients": _coefficients(measured.at_nodes(0), nodes, of),
    }


def _rounding(measured: Measured, of: Sequence[Part], fine: Tensor) -> dict[str, float]:
    """The relative error of the reference rule in float32, against the same rule in float64."""
    double, single = measured.in_float64(), measured.direct(0)[1]
    found = {}
    for part in of:
        truth = fine @ double[part.key][:, part.columns]
        here = fine @ single[part.key][:, part.columns].double()
        w = part.weights.double()
        found[part.name] = float((w * (here - truth)).norm() / (w * truth).norm())
    return found


def _interpolated(
    known: Tensor,
    nodes: Sequence[float],
    values: Tensor,
    grid: Sequence[float],
    part: Part,
    reference: Tensor,
) -> tuple[float, float]:
    """Relative errors of the interpolant's integral and of its values, weighted by w."""
    w = part.weights.double()
    whole = exact_weights(nodes).to(known.dtype) @ known
    integral = (w * (whole.double() - reference)).norm() / (w * reference).norm()
    missed = (interpolation(nodes, grid).to(known.dtype) @ known - values) * part.weights
    return float(integral), float(missed.norm() / (values * part.weights).norm())


def _slopes(counts: Sequence[int], squares: Tensor, sizes: Tensor, floor: float) -> dict[str, Any]:
    def plain(slope: Slope) -> dict[str, Any]:
        return {"slope": slope.slope, "interval": [slope.low, slope.high], "counts": slope.used}

    late = [i for i, n in enumerate(counts) if n >= 4]
    errors = (squares.sum(1) / sizes.sum()).sqrt().tolist()
    return {
        "all": plain(path_study.fit_slope(counts, squares, sizes, floor)),
        "from 4": plain(path_study.fit_slope([counts[i] for i in late], squares[late], sizes)),
        "local": [math.log2(b / a) for a, b in itertools.pairwise(errors)],
    }


def _by_target(
    names: Sequence[str], counts: Sequence[int], squares: Tensor, sizes: Tensor
) -> dict[str, Any]:
    """How far targets differ: error at N = 4, last local slope, and the worst of them."""
    many = len(names)
    rows = squares.reshape(len(counts), -1, many).sum(1)
    errors = (rows / sizes.reshape(-1, many).sum(0)).sqrt()
    four = errors[counts.index(4)]
    last = (errors[-1] / errors[-2]).log2()
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    worst = four.argsort(descending=True)[:5].tolist()
    return {
        "error at 4": torch.quantile(four, levels).tolist(),
        "last slope": torch.quantile(last, levels).tolist(),
        "worst": [
            {"target": names[i], "error": float(four[i]), "slope": float(last[i])} for i in worst
        ],
    }


def _coefficients(
    found: Mapping[str, Tensor], nodes: Sequence[float], of: Sequence[Part]
) -> dict[str, list[float]]:
    """Norms of the Chebyshev coefficients of the gradient along the path, over the largest."""
    angles = torch.tensor([2 * x - 1 for x in nodes], dtype=torch.float64).acos()
    basis = torch.cos(angles[:, None] * torch.arange(len(nodes)))
    rows = {}
    for part in of:
        values = (found[part.key][:, part.columns] * part.weights).double()
        sizes = torch.linalg.solve(basis, values).norm(dim=1)
        rows[part.name] = (sizes / sizes.max()).tolist()
    return rows


def errors_between_nodes(
    grads: Tensor, part: Part, nodes: Sequence[float], rules: Sequence[quadrature.Rule]
) -> list[float]:
    """Return relative errors of rules whose points are interpolated, pooled over mini-batches.

    Args:
        grads: Gradients of the part, ``[batches, nodes, n]``.
        part: The part.
        nodes: Where gradients are known.
        rules: The rules.
    """
    exact = exact_weights(nodes)
    rows = [weights_of(rule, nodes) for rule in rules]
    pairs = []
    for values in grads:
        reference = exact.to(values.dtype) @ values
        pairs.append(path_study.squared_errors(values, rows, reference, part.weights, part.groups))
    squares = torch.stack([found.sum(1) for found, _ in pairs]).sum(0)
    return (squares / torch.stack([size.sum() for _, size in pairs]).sum()).sqrt().tolist()
