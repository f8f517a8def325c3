"""One budget for ranks and neurons: partitions of rows beside ranks in the same exact knapsack."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, cast

import torch
from torch import Tensor

from gradrank.allocation import SOLVERS
from gradrank.allocation.capacities import RowSplit, allocate_capacities
from gradrank.core.partition import Capacity, NeuronPartition, bits_of
from gradrank.core.targets import Target
from gradrank.methods.method import (
    Assessment,
    by_direction,
    check_rank_bounds,
    check_sketch,
    option,
    require,
)
from gradrank.ops.agreement import spearman
from gradrank.ops.rows import by_energy, row_energies, split_energies
from gradrank.signals.mean_gradient import EVEN, ODD, MeanGradientStatistic
from gradrank.signals.measure import MeanGradient, Signal
from gradrank.signals.measurement import Measurement

_MOST_SHARES = 16


@dataclass(frozen=True, slots=True)
class Hybrid:
    r"""Exact allocation of ranks and neuron partitions by the energies of the mean gradient.

    A rank-k update of all rows is worth the energy of the k leading directions of the mean
    gradient :math:`\bar G`, as in water-filling. A neuron partition updates the dominant rows M at
    rank r and the others at rank :math:`r'`, each group in directions of its own: it is worth the
    r leading energies of :math:`\bar G[M, :]` and the :math:`r'` leading ones of the rest, at
    :math:`r(n + |M|) + r'(n + m - |M|)` parameters. The knapsack takes what pays most.

    Dominant are the rows with the largest energy :math:`\|\bar G_i\|^2`.

    Source:
        gradrank; partitions as in PiLoRA, section 3.3.
    """

    name: ClassVar[str] = "hybrid"
    summary: ClassVar[str] = "ranks and neuron partitions as candidates of one exact knapsack"
    source: ClassVar[str] = "gradrank"

    r_min: int = option(0, "smallest rank of every row of every target")
    r_max: int | None = option(
        None, "largest rank, r + r' of a partition; none: as many directions as were measured"
    )
    directions: int = option(40, "directions of the mean gradient to resolve")
    shares: str | None = option(
        "1/8,1/4,1/3,1/2", "shares of dominant rows to offer; none: ranks only, as waterfill"
    )
    solver: str = option("exact", "'exact', or 'greedy' (bounded loss, for giant problems)")

    def __post_init__(self) -> None:
        check_rank_bounds(self.name, self.r_min, self.r_max)
        require(self.solver in SOLVERS, self.name, "solver", self.solver, "'exact' or 'greedy'")
        check_sketch(self.name, "directions", self.directions)
        legal = self.shares is None or _parse(self.shares)
        rule = f"up to {_MOST_SHARES} different shares between 0 and 1, as '1/4,1/2', or none"
        require(bool(legal), self.name, "shares", self.shares, rule)

    def signals(self) -> tuple[Signal, ...]:
        """Return the mean gradient, with its row factors."""
        return (MeanGradient(self.directions, rows=self.shares is not None),)

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return the energies of all rows together and of the groups of each split.

        Args:
            targets: The targets.
            measurement: Measurement with the mean-gradient signal and its row factors.

        Returns:
            Scores (energy of all directions), gains per direction, and splits of the rows.
            Columns: ``top_energy_share``, and ``row_agreement``, the rank correlation of the rows'
            energies in two halves of the batches.

        Raises:
            MeasurementError: If nothing was measured, or every gradient is zero.
        """
        found = by_direction(self.name, targets, measurement)
        statistic = cast(Measurement, measurement).need_mean_gradient()
        splits: dict[str, list[RowSplit]] = {}
        for name, score in found.scores.items():
            if self.shares is not None and score > 0:
                splits[name] = _splits(statistic.need_rows()[name], _parse(self.shares))
        details = {n: {**c, **_agreement(statistic, n)} for n, c in found.details.items()}
        return Assessment(found.scores, found.gains, details, splits)

    def ranks(
        self, targets: Sequence[Target], assessment: Assessment, budget: int
    ) -> dict[str, int]:
        """Return the rank of the stock LoRA that holds each target's capacity.

        Args:
            targets: The targets.
            assessment: Gains and splits.
            budget: Parameters that may be spent.

        Returns:
            Rank per target, ``r + r'`` for a partition: not what the parameters follow from.
        """
        found = self.capacities(targets, assessment, budget)
        return {
            name: capacity.lora_rank if isinstance(capacity, NeuronPartition) else capacity
            for name, capacity in found.items()
        }

    def capacities(
        self, targets: Sequence[Target], assessment: Assessment, budget: int
    ) -> dict[str, Capacity]:
        """Return the ranks and partitions that hold the most energy within the budget.

        Args:
            targets: The targets.
            assessment: Gains and splits.
            budget: Parameters that may be spent.

        Returns:
            A rank or a neuron partition per target.
        """
        return allocate_capacities(
            targets,
            assessment.gains or {},
            assessment.splits,
            budget,
            r_min=self.r_min,
            r_max=self.r_max,
            solver=self.solver,
        )


def _agreement(statistic: MeanGradientStatistic, name: str) -> dict[str, float]:
    """How far two halves of the batches agree on which rows have energy, if that is known."""
    if EVEN not in statistic.rows or ODD not in statistic.rows:
        return {}
    first, second = (row_energies(statistic.rows[half][name]) for half in (EVEN, ODD))
    agreement = spearman(first, second)
    # NaN for rows that are all alike.
    return {} if math.isnan(agreement) else {"row_agreement": agreement}


def _splits(factors: Tensor, shares: Sequence[Fraction]) -> list[RowSplit]:
    """Return one split per share: the rows of largest energy against the rest."""
    m = factors.shape[0]
    cuts = sorted({max(1, round(share * m)) for share in shares} - {m})
    if not cuts:
        return []
    order = by_energy(factors)
    return [
        RowSplit(_bits(order[:cut], m), upper.tolist(), lower.tolist())
        for cut, (upper, lower) in zip(cuts, split_energies(factors, order, cuts), strict=True)
    ]


def _bits(rows: Tensor, m: int) -> int:
    mask = torch.zeros(m, dtype=torch.bool)
    mask[rows] = True
    return bits_of(mask.tolist())


def _parse(text: str) -> list[Fraction]:
    """Read shares; empty if the text is wrong."""
    try:
        shares = [Fraction(part.strip()) for part in text.split(",", _MOST_SHARES)]
    except (ValueError, ZeroDivisionError):
        return []
    legal = len(shares) <= _MOST_SHARES and all(0 < share < 1 for share in shares)
    return shares if legal and len(set(shares)) == len(shares) else []
