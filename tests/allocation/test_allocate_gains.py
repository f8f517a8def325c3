import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.allocation import allocate_gains
from gradrank.core.errors import BudgetError, MeasurementError, OptionError, TargetError
from gradrank.core.targets import Target
from oracles.allocation import best_ranks, gain_of, parameters

QUIET = settings(deadline=None, derandomize=True, max_examples=60)
SHAPES = [(4, 4), (4, 8), (3, 2), (5, 1)]


def small_problem(draw):
    targets = [
        Target(f"layers.{i}.m", *draw.choice(SHAPES))
        for i in draw.sample(range(12), draw.randint(1, 4))
    ]
    gains = {
        t.name: [draw.choice([0.0, 0.5, 1.0, 2.0, 4.0]) for _ in range(draw.randint(0, 5))]
        for t in targets
    }
    gains[targets[0].name] = [2.0, *gains[targets[0].name]]
    return targets, gains, draw.choice([(0, None), (0, 2), (1, None), (1, 3)])


def cases(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        targets, gains, (r_min, r_max) = small_problem(draw)
        yield targets, gains, draw.randint(8, 80), r_min, r_max


def allocated(targets, gains, budget, r_min, r_max, solver="exact"):
    """Return the ranks, or None where the budget is refused."""
    try:
        return allocate_gains(targets, gains, budget, r_min=r_min, r_max=r_max, solver=solver)
    except BudgetError:
        return None


def cheapest_step(targets, gains, ranks, r_max):
    """Return the cost of the cheapest next rank that is allowed and adds a positive gain."""
    steps = [
        t.cost
        for t in targets
        if ranks[t.name] < min(t.max_rank, len(gains[t.name]), r_max or t.max_rank)
        and gains[t.name][ranks[t.name]] > 0
    ]
    return min(steps, default=10**9)


def test_exact_ranks_have_the_gain_of_the_best_rank_vector():
    seen = 0
    for targets, gains, budget, r_min, r_max in cases(500, seed=0):
        ranks = allocated(targets, gains, budget, r_min, r_max)
        if ranks is not None:
            seen += 1
            assert gain_of(ranks, gains) == best_ranks(targets, gains, budget, r_min, r_max)
    assert seen > 100


def test_the_best_rank_vector_catches_the_greedy_solver_and_a_lost_direction():
    greedy_lost = direction_lost = 0
    for targets, gains, budget, r_min, r_max in cases(500, seed=0):
        best = None
        ranks = allocated(targets, gains, budget, r_min, r_max, solver="greedy")
        if ranks is not None:
            best = best_ranks(targets, gains, budget, r_min, r_max)
            greedy_lost += gain_of(ranks, gains) < best
        short = {name: steps[:1] for name, steps in gains.items()}
        ranks = allocated(targets, short, budget, r_min, r_max)
        if ranks is not None and best is not None:
            direction_lost += gain_of(ranks, gains) < best
    assert greedy_lost > 0
    assert direction_lost > 0


@QUIET
@given(st.randoms(use_true_random=False), st.integers(8, 90), st.sampled_from(["exact", "greedy"]))
def test_budget_slack_bounds_and_order(randomness, budget, solver):
    targets, gains, (r_min, r_max) = small_problem(randomness)
    ranks = allocated(targets, gains, budget, r_min, r_max, solver)
    if ranks is None:
        return
    slack = budget - parameters(ranks, targets)
    assert 0 <= slack < cheapest_step(targets, gains, ranks, r_max)
    for target in targets:
        low = min(r_min, target.max_rank)
        assert low <= ranks[target.name] <= min(target.max_rank, r_max or 99)
        if not any(gains[target.name]):
            assert ranks[target.name] == low
    shuffled = randomness.sample(targets, len(targets))
    assert allocated(shuffled, gains, budget, r_min, r_max, solver) == ranks
    eighths = {name: [step / 8 for step in steps] for name, steps in gains.items()}
    assert allocated(targets, eighths, budget, r_min, r_max, solver) == ranks


@QUIET
@given(st.randoms(use_true_random=False))
def test_total_gain_grows_with_the_budget(randomness):
    targets, gains, (r_min, r_max) = small_problem(randomness)
    outcomes = [allocated(targets, gains, budget, r_min, r_max) for budget in range(10, 40, 3)]
    totals = [gain_of(ranks, gains) for ranks in outcomes if ranks is not None]
    assert totals == sorted(totals)


@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_gains_too_small_to_add_up_are_still_spent_on(solver):
    targets = [Target(n, 4, 4) for n in "abc"]
    gains = {"a": [1e30, 1e-5, 2e-5], "b": [1e-6], "c": [3e-5, 0.0, 1.0]}
    ranks = allocate_gains(targets, gains, 8 * 4, solver=solver)
    assert sum(ranks.values()) == 4
    assert ranks["a"] >= 1
    ranks = allocate_gains(targets, {"a": [1e30, 1e-5, 2e-5], "b": [1e-6], "c": []}, 32)
    assert ranks == {"a": 3, "b": 1, "c": 0}


def test_targets_without_directions_hold_r_min():
    targets = [Target("a", 4, 4), Target("b", 4, 4), Target("c", 4, 4)]
    gains = {"a": [1.0, 1.0, 1.0], "b": [], "c": [0.0, 0.0]}
    assert allocate_gains(targets, gains, 8 * 4, r_min=1) == {"a": 2, "b": 1, "c": 1}
    with pytest.raises(BudgetError, match=r"ceiling of 40 .*1 of 3 targets"):
        allocate_gains(targets, gains, 48, r_min=1)


def test_a_gain_behind_a_zero_is_reached_when_it_fits():
    targets = [Target("a", 4, 4), Target("b", 4, 4)]
    gains = {"a": [0.0, 9.0], "b": [1.0, 1.0]}
    assert allocate_gains(targets, gains, 16) == {"a": 2, "b": 0}
    assert allocate_gains(targets, gains, 8) == {"a": 0, "b": 1}
    with pytest.raises(BudgetError, match="ends at rank 0"):
        allocate_gains([targets[0]], {"a": [0.0, 9.0]}, 8)


def test_bad_gains_and_options_are_refused_by_name():
    targets = [Target("a", 4, 4), Target("b", 4, 4)]
    for bad in (float("nan"), float("inf"), -0.5):
        with pytest.raises(MeasurementError, match=r"'b' has the gain .* at rank 2"):
            allocate_gains(targets, {"a": [1.0], "b": [1.0, bad]}, 16)
    with pytest.raises(MeasurementError, match="all gains of all 2 targets are 0"):
        allocate_gains(targets, {"a": [0.0], "b": []}, 16)
    with pytest.raises(OptionError, match="targets have no gain, the first is 'b'"):
        allocate_gains(targets, {"a": [1.0]}, 16)
    with pytest.raises(OptionError, match="Did you mean 'greedy'"):
        allocate_gains(targets, {"a": [1.0], "b": [1.0]}, 16, solver="gredy")
    with pytest.raises(BudgetError, match="floor of 16"):
        allocate_gains(targets, {"a": [1.0], "b": [1.0]}, 15, r_min=1)
    with pytest.raises(TargetError):
        allocate_gains([], {}, 16)


def test_exact_is_worth_its_name_on_many_targets():
    draw = random.Random(4)
    targets = [Target(f"layers.{i}.m", 64, draw.choice([16, 64, 172])) for i in range(120)]
    gains = {t.name: [draw.expovariate(1.0) for _ in range(12)] for t in targets}
    budget = 3 * sum(t.cost for t in targets)
    exact, greedy = (
        gain_of(allocate_gains(targets, gains, budget, solver=solver), gains)
        for solver in ("exact", "greedy")
    )
    assert Fraction(1) <= exact / greedy < Fraction(101, 100)
