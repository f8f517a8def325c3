import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.allocation import Candidate, greedy, knapsack, lp_bound, solve
from gradrank.core.errors import BudgetError, OptionError
from oracles.allocation import (
    best_choice,
    best_gain_by_table,
    greedy_choice,
    hull_steps,
    lp_value,
    total_gain,
)

QUIET = settings(deadline=None, derandomize=True, max_examples=40)


def tiny_instances(count, seed, gain):
    """Yield groups and budgets with ties, dominated, duplicate and non-concave candidates."""
    draw = random.Random(seed)
    for _ in range(count):
        groups = {}
        for name in draw.sample("abcdef", draw.randint(1, 4)):
            costs = [draw.randint(0, 7) for _ in range(draw.randint(1, 4))]
            groups[name] = [
                Candidate((name, place), cost, gain(draw, cost)) for place, cost in enumerate(costs)
            ]
        floor = sum(min(c.cost for c in candidates) for candidates in groups.values())
        yield groups, floor + draw.randint(0, 14)


def whole(draw, cost):
    return float(draw.randint(-2, 6))


def real(draw, cost):
    return draw.random() * 10 ** draw.uniform(-3, 3)


def tied(draw, cost):
    """Return gains so close to the costs that most optima have equals."""
    return float(cost + draw.choice([0, 0, 0, 1]))


def backwards(groups):
    """Return the groups under names that sort the other way round."""
    return {chr(219 - ord(name)): candidates for name, candidates in groups.items()}


def disagreements(solver, count=250, gain=tied):
    """Return how often a solver's choice is not the oracle's, on instances with many ties."""
    instances = list(tiny_instances(count, seed=1, gain=gain))
    return sum(
        solver(groups, budget) != best_choice(groups, budget) for groups, budget in instances
    )


@pytest.mark.parametrize(("seed", "gain"), [(0, whole), (1, real), (2, tied)])
def test_solve_equals_enumeration_on_thousands_of_tiny_instances(seed, gain):
    for groups, budget in tiny_instances(700, seed, gain):
        assert solve(groups, budget) == best_choice(groups, budget)


@pytest.mark.parametrize("sparse_factor", [0, 10**6])
def test_both_ways_to_extend_equal_enumeration(monkeypatch, sparse_factor):
    monkeypatch.setattr(knapsack, "_SPARSE_FACTOR", sparse_factor)
    monkeypatch.setattr(knapsack, "_FIRST_CORE", 1)
    assert disagreements(solve) == 0


def test_enumeration_catches_a_solver_that_ignores_a_candidate():
    def without_the_best(groups, budget):
        right = solve(groups, budget)
        less = {
            name: [c for c in candidates if c != right[name]] or candidates
            for name, candidates in groups.items()
        }
        try:
            return solve({**groups, min(groups): less[min(groups)]}, budget)
        except BudgetError:
            return None

    assert disagreements(without_the_best) > 0


def test_enumeration_catches_broken_ties_budget_and_bound(monkeypatch):
    assert disagreements(greedy) > 0
    assert disagreements(lambda groups, budget: solve(groups, budget + 1)) > 0
    assert disagreements(lambda groups, budget: backwards(solve(backwards(groups), budget))) > 0
    monkeypatch.setattr(knapsack, "_limits", lambda relaxed: [relaxed.price * relaxed.slack])
    monkeypatch.setattr(
        knapsack,
        "_open_stages",
        lambda relaxed, limit, right=knapsack._open_stages: right(relaxed, limit)[1:],
    )
    assert disagreements(solve) > 0


def middling(seed, n, k, unit_costs, concave):
    draw = np.random.default_rng(seed)
    groups = {}
    for i in range(n):
        steps = draw.exponential(size=k)
        steps = np.sort(steps)[::-1] if concave else steps
        totals = np.concatenate(([0.0], np.cumsum(steps))).tolist()
        cost = unit_costs[i % len(unit_costs)]
        groups[f"layers.{i}"] = [Candidate(r, r * cost, totals[r]) for r in range(k + 1)]
    return groups


@pytest.mark.parametrize("concave", [True, False])
@pytest.mark.parametrize("unit_costs", [(2,), (8, 5, 18), (3, 7, 11, 13)])
def test_solve_equals_the_textbook_table(unit_costs, concave):
    groups = middling(3, 11, 5, unit_costs, concave)
    full = sum(candidates[-1].cost for candidates in groups.values())
    for budget in (1, full // 7, full // 3, 2 * full):
        chosen = solve(groups, budget)
        best = best_gain_by_table(groups, min(budget, full))
        assert sum(c.cost for c in chosen.values()) <= budget
        # The solver rounds each gain to 2**-56 of their sum; hence not quite the same fraction.
        assert float(best - total_gain(chosen)) == pytest.approx(0, abs=1e-12)


def test_the_textbook_table_catches_a_solver_that_drops_a_candidate():
    groups = middling(3, 14, 6, (8, 5, 18), concave=True)
    broken = {name: candidates[:-3] for name, candidates in groups.items()}
    assert best_gain_by_table(groups, 250) > total_gain(solve(broken, 250))


@pytest.mark.parametrize("gain", [whole, real, tied])
def test_greedy_and_bound_equal_their_references(gain):
    for groups, budget in tiny_instances(300, 5, gain):
        assert lp_bound(groups, budget) == pytest.approx(float(lp_value(groups, budget)), rel=1e-12)
        reference = total_gain(greedy_choice(groups, budget))
        assert float(total_gain(greedy(groups, budget))) == pytest.approx(
            float(reference), rel=1e-12
        )


def test_the_greedy_reference_catches_a_greedy_without_fill_up():
    missed = 0
    for groups, budget in tiny_instances(300, 5, whole):
        bare = total_gain(greedy_choice(groups, budget, fill=False))
        missed += bare < total_gain(greedy(groups, budget))
    assert missed > 0


@pytest.mark.parametrize("gain", [whole, real, tied])
def test_bound_optimum_and_greedy_stand_in_order_and_within_one_step(gain):
    for groups, budget in tiny_instances(300, 7, gain):
        bound, best = lp_value(groups, budget), total_gain(solve(groups, budget))
        low = total_gain(greedy(groups, budget))
        largest_step = max((step[3] for step in hull_steps(groups, budget)), default=Fraction(0))
        tolerance = Fraction(1, 10**9)
        assert bound + tolerance >= best >= low - tolerance
        assert bound - low <= largest_step + tolerance


groups_strategy = st.dictionaries(
    st.text("abcxyz", min_size=1, max_size=3),
    st.lists(
        st.builds(
            Candidate,
            st.integers(0, 99),
            st.integers(0, 40),
            st.integers(0, 64).map(lambda g: g / 8),
        ),
        min_size=1,
        max_size=6,
    ),
    min_size=1,
    max_size=7,
)


@QUIET
@given(groups_strategy, st.integers(0, 120), st.randoms(use_true_random=False))
def test_order_of_groups_and_scale_of_gains_do_not_matter(groups, extra, draw):
    budget = sum(min(c.cost for c in cs) for cs in groups.values()) + extra
    shuffled = dict(draw.sample(sorted(groups.items()), len(groups)))
    scaled = {
        name: [Candidate(c.capacity, c.cost, c.gain * 2.0**-70) for c in cs]
        for name, cs in groups.items()
    }
    for solver in (solve, greedy):
        chosen = solver(groups, budget)
        assert list(chosen) == list(groups)
        assert solver(shuffled, budget) == chosen
        assert list(solver(shuffled, budget)) == list(shuffled)
        in_scale = solver(scaled, budget)
        assert {n: (c.capacity, c.cost) for n, c in in_scale.items()} == {
            n: (c.capacity, c.cost) for n, c in chosen.items()
        }


@QUIET
@given(groups_strategy, st.integers(0, 60))
def test_gain_grows_with_the_budget_and_cost_stays_within(groups, extra):
    floor = sum(min(c.cost for c in cs) for cs in groups.values())
    gains = []
    for budget in range(floor + extra, floor + extra + 6):
        chosen = solve(groups, budget)
        assert sum(c.cost for c in chosen.values()) <= budget
        gains.append(total_gain(chosen))
    assert gains == sorted(gains)


def test_costs_shift_and_units_do_not_matter():
    groups = middling(0, 9, 5, (3, 5), concave=False)
    moved = {
        name: [Candidate(c.capacity, 1000 * c.cost + 17, c.gain - 4.0) for c in cs]
        for name, cs in groups.items()
    }
    ranks = {name: c.capacity for name, c in solve(groups, 60).items()}
    budget = 60_000 + 9 * 17 + 999
    assert {name: c.capacity for name, c in solve(moved, budget).items()} == ranks


def test_equal_gains_give_the_same_ranks_every_time_and_the_last_names_the_rest():
    groups = {n: [Candidate(r, 4 * r, float(r)) for r in range(4)] for n in "cab"}
    assert {n: c.capacity for n, c in solve(groups, 18).items()} == {"c": 3, "a": 0, "b": 1}


def test_gains_of_any_size_are_taken():
    for scale in (1e-300, 1e-12, 1e300):
        groups = {
            n: [Candidate(0, 0, 0.0), Candidate(1, 2, i * scale)] for i, n in enumerate("abc")
        }
        chosen = solve(groups, 4)
        assert {n: c.capacity for n, c in chosen.items()} == {"a": 0, "b": 1, "c": 1}


def test_no_groups_and_no_gain():
    assert solve({}, 5) == {}
    assert greedy({}, 5) == {}
    assert lp_bound({}, 5) == 0.0
    flat = {"a": [Candidate(1, 3, 0.0), Candidate(0, 1, 0.0)]}
    assert solve(flat, 5)["a"].capacity == greedy(flat, 5)["a"].capacity == 0


def test_strongly_correlated_costs_stay_exact():
    draw = random.Random(0)
    groups = {
        f"g{i}": [Candidate(r, r * c, float(r * c)) for r in range(9)]
        for i, c in enumerate(draw.choices([30, 42, 70, 105], k=12))
    }
    for budget in (101, 997, 1500):
        assert total_gain(solve(groups, budget)) == best_gain_by_table(groups, budget)


def test_a_table_that_is_too_large_is_refused_with_the_way_out(monkeypatch):
    groups = middling(0, 30, 8, (8, 5, 18), concave=False)
    monkeypatch.setattr(knapsack, "MEMORY_LIMIT", 2000)
    with pytest.raises(OptionError, match=r"30 groups.*solver='greedy'"):
        solve(groups, 700)


def test_states_count_towards_the_memory_limit(monkeypatch):
    groups = {
        f"g{i}": [Candidate(r, r * c, float(r * c)) for r in range(9)]
        for i, c in enumerate([30, 42, 70, 105] * 20)
    }
    monkeypatch.setattr(knapsack, "MEMORY_LIMIT", 2**20)
    with pytest.raises(OptionError, match="common divisor"):
        solve(groups, 15_000)


@pytest.mark.parametrize("function", [solve, greedy, lp_bound])
def test_bad_groups_are_refused_by_name(function):
    with pytest.raises(OptionError, match="group 'q' has no candidate"):
        function({"q": [], "p": [Candidate(0, 0, 0.0)]}, 3)
    for cost in (-1, 2.5, 2**41):
        with pytest.raises(OptionError, match="whole number of parameters"):
            function({"p": [Candidate(0, cost, 0.0)]}, 3)
    for gain in (float("nan"), float("inf")):
        with pytest.raises(OptionError, match="capacity 4 and cost 2"):
            function({"p": [Candidate(4, 2, gain)]}, 3)
    with pytest.raises(BudgetError, match=r"budget 3 .* floor of 9 parameters.*2 groups"):
        function({"p": [Candidate(0, 4, 0.0)], "q": [Candidate(1, 5, 1.0)]}, 3)
