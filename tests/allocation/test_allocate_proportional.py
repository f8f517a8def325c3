import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.allocation import proportional
from gradrank.core.errors import BudgetError, MeasurementError, OptionError, TargetError
from gradrank.core.targets import Target
from oracles import dynamic
from oracles.allocation import bounds_of, largest_factor, parameters, proportional_ranks, ranks_at

QUIET = settings(deadline=None, derandomize=True, max_examples=80)
SHAPES = [(6, 6), (6, 3), (9, 4), (4, 16), (7, 1)]


def small_problem(draw):
    """Return targets, whole scores with ties and zeros, bounds and a feasible budget."""
    targets = [
        Target(f"layers.{i}.m", *draw.choice(SHAPES))
        for i in draw.sample(range(20), draw.randint(1, 6))
    ]
    scores = {t.name: draw.choice([0, 1, 2, 3, 3, 5, 9]) for t in targets}
    scores[targets[0].name] = max(1, scores[targets[0].name])
    r_min, r_max = draw.choice([(0, None), (0, 3), (1, None), (1, 4), (2, 2)])
    low, high = bounds_of(targets, r_min, r_max)
    floor = max(parameters(low, targets), 11 + 9)
    top = {n: high[n] if scores[n] else low[n] for n in low}
    return targets, scores, r_min, r_max, floor, parameters(top, targets)


def problems(count, seed):
    draw = random.Random(seed)
    while count:
        targets, scores, r_min, r_max, floor, ceiling = small_problem(draw)
        if ceiling >= floor:
            count -= 1
            yield targets, scores, draw.randint(floor, ceiling), r_min, r_max


def in_fractions(scores):
    return {name: Fraction(score) for name, score in scores.items()}


def alone(targets, scores, budget, r_min, r_max):
    """Return the paper's rule alone, an empty allocation included."""
    try:
        return proportional(targets, scores, budget, r_min=r_min, r_max=r_max, spend_leftover=False)
    except BudgetError:
        return dict.fromkeys(scores, 0)


def test_the_rule_alone_equals_a_scan_over_all_break_points():
    for targets, scores, budget, r_min, r_max in problems(400, seed=0):
        _, expected = largest_factor(targets, in_fractions(scores), budget, r_min, r_max)
        assert alone(targets, scores, budget, r_min, r_max) == expected


def test_leftover_equals_the_one_by_one_reference():
    for targets, scores, budget, r_min, r_max in problems(400, seed=1):
        expected = proportional_ranks(targets, in_fractions(scores), budget, r_min, r_max)
        assert proportional(targets, scores, budget, r_min=r_min, r_max=r_max) == expected


def test_the_scan_catches_a_factor_one_break_too_low_and_bankers_rounding():
    low_factor = bankers = 0
    for targets, scores, budget, r_min, r_max in problems(200, seed=2):
        exact = in_fractions(scores)
        factor, expected = largest_factor(targets, exact, budget, r_min, r_max)
        low, high = bounds_of(targets, r_min, r_max)
        low_factor += ranks_at(factor * Fraction(4, 5), exact, low, high) != expected
        _, reached = largest_factor(targets, exact, budget, r_min, r_max)
        at_break = ranks_at(factor, exact, low, high, rounding=round)
        bankers += at_break != ranks_at(factor, exact, low, high)
        assert reached == expected
    assert low_factor > 0
    assert bankers > 0


def test_the_reference_catches_leftover_spent_on_the_largest_score():
    wrong = 0
    for targets, scores, budget, r_min, r_max in problems(200, seed=3):
        ranks = dict(largest_factor(targets, in_fractions(scores), budget, r_min, r_max)[1])
        _, high = bounds_of(targets, r_min, r_max)
        for target in sorted(targets, key=lambda t: (-scores[t.name], t.name)):
            while (
                scores[target.name]
                and ranks[target.name] < high[target.name]
                and parameters(ranks, targets) + target.cost <= budget
            ):
                ranks[target.name] += 1
        wrong += ranks != proportional(targets, scores, budget, r_min=r_min, r_max=r_max)
    assert wrong > 0


@st.composite
def problem(draw):
    randomness = draw(st.randoms(use_true_random=False))
    targets, _, r_min, r_max, floor, _ = small_problem(randomness)
    whole_or_real = st.one_of(st.integers(0, 40), st.floats(0, 1e6, allow_subnormal=False))
    scores = {t.name: float(draw(whole_or_real)) for t in targets}
    scores[targets[0].name] += 1.0
    low, high = bounds_of(targets, r_min, r_max)
    top = {n: high[n] if scores[n] else low[n] for n in low}
    ceiling = max(floor, parameters(top, targets))
    return targets, scores, draw(st.integers(floor, ceiling)), r_min, r_max, ceiling


def allocated(targets, scores, budget, r_min, r_max):
    try:
        return proportional(targets, scores, budget, r_min=r_min, r_max=r_max)
    except BudgetError:  # floor above ceiling: the only budget there is, is refused
        return None


@QUIET
@given(problem())
def test_budget_is_kept_and_slack_is_below_the_cheapest_allowed_step(case):
    targets, scores, budget, r_min, r_max, _ = case
    ranks = allocated(targets, scores, budget, r_min, r_max)
    if ranks is None:
        return
    low, high = bounds_of(targets, r_min, r_max)
    slack = budget - parameters(ranks, targets)
    steps = [t.cost for t in targets if scores[t.name] > 0 and ranks[t.name] < high[t.name]]
    assert 0 <= slack < min(steps, default=slack + 1)
    for target in targets:
        assert low[target.name] <= ranks[target.name] <= high[target.name]
        assert scores[target.name] > 0 or ranks[target.name] == low[target.name]


@QUIET
@given(problem(), st.randoms(use_true_random=False), st.sampled_from([1e-9, 0.1, 1 / 3, 7.0, 1e12]))
def test_order_of_targets_and_scale_of_scores_do_not_matter(case, randomness, scale):
    targets, scores, budget, r_min, r_max, _ = case
    ranks = allocated(targets, scores, budget, r_min, r_max)
    if ranks is None:
        return
    shuffled = randomness.sample(targets, len(targets))
    again = allocated(shuffled, scores, budget, r_min, r_max)
    assert again == ranks
    assert list(again) == [target.name for target in shuffled]
    scaled = {name: score * scale for name, score in scores.items()}
    assert allocated(targets, scaled, budget, r_min, r_max) == ranks


def test_scaling_keeps_ties_between_multiples():
    targets = [Target(n, 50, 50) for n in "abc"]
    for budget in range(100, 6000, 100):
        plain = proportional(targets, {"a": 3, "b": 9, "c": 27}, budget)
        for scale in (0.1, 1 / 39, 1e-5):
            scaled = {"a": 3 * scale, "b": 9 * scale, "c": 27 * scale}
            assert proportional(targets, scaled, budget) == plain


def test_scores_of_any_size_are_taken():
    targets = [Target("a", 40, 40), Target("b", 40, 40), Target("c", 40, 40)]
    scores = {"a": 1e300, "b": 5e-324, "c": 0.0}
    assert proportional(targets, scores, 40 * 80) == {"a": 40, "b": 0, "c": 0}
    assert proportional(targets, scores, 80 * 80) == {"a": 40, "b": 40, "c": 0}
    assert proportional(targets, {"a": 1.0, "b": 1e-290, "c": 0}, 80 * 80)["b"] == 40


def test_equal_scores_of_equal_shapes_share_and_the_first_names_get_the_rest():
    targets = [Target(n, 4, 4) for n in "cab"]
    assert proportional(targets, dict.fromkeys("abc", 0.2), 40) == {"c": 1, "a": 2, "b": 2}


def test_a_thousand_targets_with_large_ranks():
    draw = random.Random(0)
    targets = [Target(f"layers.{i}.m", 4096, draw.choice([1024, 4096, 14336])) for i in range(1000)]
    scores = {t.name: draw.expovariate(1.0) for t in targets}
    budget = 64 * sum(t.cost for t in targets) + 5
    ranks = proportional(targets, scores, budget)
    assert 0 <= budget - parameters(ranks, targets) < min(t.cost for t in targets)


def test_budgets_outside_floor_and_ceiling_name_them_and_the_ways_out():
    targets = [Target("a", 4, 6), Target("b", 3, 3)]
    scores = {"a": 1.0, "b": 2.0}
    with pytest.raises(BudgetError, match=r"budget 31 .*floor of 32 .*2 targets.*lower r_min"):
        proportional(targets, scores, 31, r_min=2)
    with pytest.raises(BudgetError, match=r"budget 5 .*floor of 6 .*cheapest single rank"):
        proportional(targets, scores, 5)
    with pytest.raises(BudgetError, match=r"budget 33 .*ceiling of 32 .*Lower.*raise r_max"):
        proportional(targets, scores, 33, r_max=2)
    with pytest.raises(BudgetError, match=r"ceiling of 40 .*1 of 2 targets"):
        proportional(targets, {"a": 1.0, "b": 0.0}, 41)
    with pytest.raises(BudgetError, match=r"floor of 10 "):
        proportional(targets, {"a": 1.0, "b": 0.0}, 9)
    assert proportional(targets, scores, 32, r_min=2) == {"a": 2, "b": 2}
    assert proportional(targets, scores, 32, r_max=2) == {"a": 2, "b": 2}


def test_the_rule_alone_refuses_to_drop_everything():
    targets = [Target(n, 4, 4) for n in "abc"]
    equal = dict.fromkeys("abc", 1.0)
    with pytest.raises(BudgetError, match="every one of 3 targets ends at rank 0"):
        proportional(targets, equal, 16, spend_leftover=False)
    assert sum(proportional(targets, equal, 16).values()) == 2


def test_bad_scores_names_and_bounds_are_refused():
    targets = [Target("a", 4, 4), Target("b", 4, 4)]
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(MeasurementError, match="'b' has the score"):
            proportional(targets, {"a": 1.0, "b": bad}, 16)
    with pytest.raises(MeasurementError, match="all 2 targets have the score 0"):
        proportional(targets, {"a": 0.0, "b": 0.0}, 16)
    with pytest.raises(OptionError, match="1 of 2 targets have no score, the first is 'b'"):
        proportional(targets, {"a": 1.0}, 16)
    with pytest.raises(OptionError, match="score for 'c', which is no target"):
        proportional(targets, {"a": 1.0, "b": 1.0, "c": 1.0}, 16)
    for options in ({"r_min": -1}, {"r_min": True}, {"r_max": 0}, {"r_max": 2.0}):
        with pytest.raises(OptionError, match="must be a whole number"):
            proportional(targets, {"a": 1.0, "b": 1.0}, 16, **options)
    with pytest.raises(OptionError, match="r_max=2 is below r_min=3"):
        proportional(targets, {"a": 1.0, "b": 1.0}, 16, r_min=3, r_max=2)
    with pytest.raises(TargetError, match="listed twice"):
        proportional([targets[0], targets[0]], {"a": 1.0}, 16)
    with pytest.raises(TargetError, match="no target"):
        proportional([], {}, 16)


# --- ranks that may only move a little ----------------------------------------------------------


def near(now, delta, r_min, r_max, targets):
    """Ranges of ranks around those in use, inside the bounds."""
    low, high = bounds_of(targets, r_min, r_max)
    return {n: (max(low[n], r - delta), min(high[n], r + delta)) for n, r in now.items()}


def within_problems(count, seed):
    """Problems with ranks in use, a largest move, and the ranges that follow from both."""
    draw = random.Random(seed)
    for targets, scores, given_budget, r_min, r_max in problems(count, seed):
        low, high = bounds_of(targets, r_min, r_max)
        now = {t.name: draw.randint(low[t.name], high[t.name]) for t in targets}
        delta = draw.choice([0, 1, 2])
        ranges = near(now, delta, r_min, r_max, targets)
        budget = max(given_budget, parameters(now, targets))
        if any(bottom for bottom, _ in ranges.values()):
            yield targets, scores, budget, r_min, r_max, now, delta, ranges


def test_within_equals_the_one_by_one_twin():
    tried = 0
    for targets, scores, budget, r_min, r_max, now, delta, ranges in within_problems(300, seed=4):
        total = sum(scores.values())
        shares = {name: Fraction(score, total) for name, score in scores.items()}
        most = 99 if r_max is None else r_max
        settings = dynamic.Settings(budget, r_min=r_min, r_max=most, max_delta=delta)
        expected = dynamic.allocate(targets, shares, now, settings)
        options = {"r_min": r_min, "r_max": r_max, "within": ranges}
        assert proportional(targets, scores, budget, **options) == expected
        tried += 1
    assert tried > 150


def test_within_keeps_the_ranges_and_spends_no_more_than_they_allow():
    for targets, scores, budget, r_min, r_max, _, _, ranges in within_problems(200, seed=5):
        options = {"r_min": r_min, "r_max": r_max, "within": ranges}
        ranks = proportional(targets, scores, budget, **options)
        assert all(ranges[name][0] <= rank <= ranges[name][1] for name, rank in ranks.items())
        assert parameters(ranks, targets) <= budget
        steps = [t.cost for t in targets if scores[t.name] and ranks[t.name] < ranges[t.name][1]]
        slack = budget - parameters(ranks, targets)
        assert slack < min(steps, default=slack + 1)


def test_within_that_allows_everything_changes_nothing():
    for targets, scores, budget, r_min, r_max in problems(100, seed=6):
        low, high = bounds_of(targets, r_min, r_max)
        whole = {t.name: (low[t.name], high[t.name]) for t in targets}
        options = {"r_min": r_min, "r_max": r_max}
        plain = proportional(targets, scores, budget, **options)
        assert proportional(targets, scores, budget, **options, within=whole) == plain


def test_within_wins_over_bounds_that_it_has_nothing_in_common_with():
    targets = [Target("a", 9, 9), Target("b", 9, 9)]
    equal = {"a": 1.0, "b": 1.0}
    above = proportional(targets, equal, 400, r_max=3, within={"a": (5, 7), "b": (1, 3)})
    assert above == {"a": 5, "b": 3}
    below = proportional(targets, equal, 400, r_min=6, within={"a": (1, 3), "b": (5, 7)})
    assert below == {"a": 3, "b": 7}


def test_within_is_checked_by_name():
    targets = [Target("a", 9, 9), Target("b", 9, 9)]
    equal = {"a": 1.0, "b": 1.0}
    with pytest.raises(OptionError, match=r"'within' must hold .* that of 'b' is None"):
        proportional(targets, equal, 90, within={"a": (1, 2)})
    with pytest.raises(OptionError, match=r"that of 'a' is \(3, 2\)"):
        proportional(targets, equal, 90, within={"a": (3, 2), "b": (1, 2)})
    with pytest.raises(BudgetError, match=r"budget 60 is below the floor of 72"):
        proportional(targets, equal, 60, within={"a": (2, 3), "b": (2, 3)})
