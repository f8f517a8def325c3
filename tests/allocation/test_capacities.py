"""Candidates of ranks and partitions, and the knapsack over them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.allocation import Candidate, allocate_gains
from gradrank.allocation.capacities import RowSplit, allocate_capacities, candidates
from gradrank.core.errors import BudgetError, MeasurementError, OptionError
from gradrank.core.partition import NeuronPartition
from gradrank.core.planned import PlannedTarget
from gradrank.core.targets import Target
from oracles.allocation import best_choice, total_gain


def steps(generator: np.random.Generator, count: int) -> list[float]:
    return sorted(generator.exponential(1.0, count).tolist(), reverse=True)


def problem(seed: int, count: int = 3) -> tuple[list[Target], dict[str, Any], dict[str, Any]]:
    generator = np.random.default_rng(seed)
    targets, gains, splits = [], {}, {}
    for i in range(count):
        d_in, d_out = (int(size) for size in generator.integers(2, 6, 2))
        target = Target(f"t{i}", d_in, d_out)
        targets.append(target)
        gains[target.name] = steps(generator, target.max_rank)
        rows = int(generator.integers(1, d_out))
        upper = steps(generator, min(rows, d_in))
        lower = steps(generator, min(d_out - rows, d_in))
        splits[target.name] = [RowSplit((1 << rows) - 1, upper, lower)]
    return targets, gains, splits


def every(target: Target, gains: list[float], splits: list[RowSplit]) -> list[Candidate]:
    """All candidates, by loops."""
    found = [
        Candidate(k, k * (target.d_in + target.d_out), sum(gains[:k]))
        for k in range(target.max_rank + 1)
    ]
    for split in splits:
        rows = bin(split.bits).count("1")
        for r in range(1, len(split.upper) + 1):
            for s in range(min(r - 1, len(split.lower)) + 1):
                cost = r * (target.d_in + rows) + s * (target.d_in + target.d_out - rows)
                gain = sum(split.upper[:r]) + sum(split.lower[:s])
                made = NeuronPartition(target.d_out, r, s, split.bits)
                found.append(Candidate(made, cost, gain))
    return found


@given(seed=st.integers(0, 10_000), share=st.floats(0.15, 0.95))
@settings(deadline=None, derandomize=True, max_examples=80)
def test_the_choice_is_the_best_of_all(seed: int, share: float) -> None:
    targets, gains, splits = problem(seed)
    ceiling = sum(t.max_rank * t.cost for t in targets)
    budget = max(min(t.cost for t in targets), int(share * ceiling))
    found = allocate_capacities(targets, gains, splits, budget)
    groups = {t.name: every(t, gains[t.name], splits[t.name]) for t in targets}
    wanted = best_choice(groups, budget)
    assert wanted is not None
    mine = {
        name: next(c for c in groups[name] if c.capacity == capacity)
        for name, capacity in found.items()
    }
    assert float(total_gain(mine)) == pytest.approx(float(total_gain(wanted)), rel=1e-12)
    spent = sum(PlannedTarget.of(t, found[t.name]).parameters for t in targets)
    assert spent == sum(c.cost for c in mine.values()) <= budget
    better = [
        c.cost - mine[name].cost
        for name, group in groups.items()
        for c in group
        if c.gain > mine[name].gain * (1 + 1e-12)
    ]
    assert budget - spent < min(better, default=budget + 1)


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_candidates_rise_and_none_is_beaten(seed: int) -> None:
    (target,), gains, splits = problem(seed, count=1)
    kept = candidates(target, gains[target.name], splits[target.name])
    costs, values = [c.cost for c in kept], [c.gain for c in kept]
    assert costs == sorted(set(costs))
    assert values == sorted(set(values))
    for one in every(target, gains[target.name], splits[target.name]):
        assert any(c.cost <= one.cost and c.gain >= one.gain * (1 - 1e-12) for c in kept)


@given(seed=st.integers(0, 10_000), solver=st.sampled_from(["exact", "greedy"]))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_splits_never_cost_gain(seed: int, solver: str) -> None:
    targets, gains, splits = problem(seed)
    budget = sum(t.cost for t in targets)
    ranks = allocate_gains(targets, gains, budget, solver=solver)
    alone = sum(sum(gains[name][:rank]) for name, rank in ranks.items())
    total = 0.0
    for name, capacity in allocate_capacities(
        targets, gains, splits, budget, solver=solver
    ).items():
        if isinstance(capacity, int):
            total += sum(gains[name][:capacity])
            continue
        split = splits[name][0]
        total += sum(split.upper[: capacity.rank])
        total += sum(split.lower[: capacity.supplementary_rank])
    assert total >= alone * (1 - 1e-12)


def test_without_splits_it_is_the_allocator_of_ranks() -> None:
    targets, gains, _ = problem(3)
    for budget in (20, 31, 44):
        wanted = allocate_gains(targets, gains, budget)
        assert allocate_capacities(targets, gains, {}, budget) == wanted
        assert allocate_capacities(targets, gains, {"t0": []}, budget) == wanted


def test_a_rank_wins_against_a_partition_that_is_only_as_good() -> None:
    target = Target("a", 1, 2)
    split = RowSplit(0b01, upper=[2.0], lower=[])
    (nothing, one) = candidates(target, [2.0], [RowSplit(0b01, [1.0, 1.0], [])])[:2]
    assert (nothing.capacity, one.gain) == (0, 1.0)
    kept = candidates(Target("b", 2, 2), [2.0], [split])
    assert [(c.cost, c.capacity.__class__) for c in kept] == [(0, int), (3, NeuronPartition)]
    equal = candidates(Target("c", 2, 2), [3.0], [RowSplit(0b01, [1.0, 1.0], [])])
    assert equal[-1].capacity == 1


def test_the_order_of_targets_does_not_matter() -> None:
    targets, gains, splits = problem(11, count=5)
    budget = 2 * sum(t.cost for t in targets)
    forward = allocate_capacities(targets, gains, splits, budget)
    assert allocate_capacities(targets[::-1], gains, splits, budget) == forward
    assert list(forward) == [t.name for t in targets]


def test_bounds_hold_for_every_row_and_for_the_sum() -> None:
    target = Target("a", 8, 8)
    gains = [4.0, 3.0, 2.0, 1.0]
    split = RowSplit(0b1111, [4.0, 3.0, 2.0, 1.0], [3.0, 2.0, 1.0, 0.5])
    found = [c.capacity for c in candidates(target, gains, [split], r_min=1, r_max=3)]
    pairs = {(c.rank, c.supplementary_rank) for c in found if isinstance(c, NeuronPartition)}
    assert pairs == {(2, 1)}
    assert min(c for c in found if isinstance(c, int)) == 1


def test_wrong_input_is_refused() -> None:
    targets, gains, splits = problem(5)
    budget = sum(t.cost for t in targets)
    with pytest.raises(OptionError, match="splits for 'x', which is no target"):
        allocate_capacities(targets, gains, {**splits, "x": splits["t0"]}, budget)
    for bits in (0, (1 << targets[0].d_out) - 1, 1 << targets[0].d_out):
        with pytest.raises(OptionError, match="both groups need rows"):
            allocate_capacities(targets, gains, {"t0": [RowSplit(bits, [1.0], [1.0])]}, budget)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(MeasurementError, match="negative or not finite"):
            allocate_capacities(targets, gains, {"t0": [RowSplit(1, [bad], [1.0])]}, budget)
    with pytest.raises(BudgetError, match="floor"):
        allocate_capacities(targets, gains, splits, 1)
    with pytest.raises(BudgetError, match="ceiling"):
        allocate_capacities(targets, gains, splits, 10**9)
    with pytest.raises(OptionError, match=r"solver 'exakt' is unknown"):
        allocate_capacities(targets, gains, splits, budget, solver="exakt")
