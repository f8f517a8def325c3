"""Points and weights along the path, against sums enumerated in exact fractions."""

from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradrank.ops.quadrature import (
    Rule,
    as_printed,
    one_of_grid,
    stratum,
    trapezoid,
    with_interior_weighted,
)
from oracles import igu as oracle

COEFFICIENTS = st.lists(st.integers(-5, 5), min_size=1, max_size=6)


def applied(rule: Rule, g: Callable[[Fraction], Fraction]) -> float:
    """The rule's sum, at the exact points that its floats stand for."""
    points = [Fraction(point).limit_denominator(1000) for point in rule.points]
    assert [float(point) for point in points] == list(rule.points)
    return sum(w * float(g(p)) for p, w in zip(points, rule.weights, strict=True))


def mean(rules: Sequence[Rule], g: Callable[[Fraction], Fraction]) -> float:
    return sum(applied(rule, g) for rule in rules) / len(rules)


def interior(make: Callable[[int, int], Rule], segments: int) -> list[Rule]:
    return [make(segments, k) for k in range(1, segments)]


@given(st.integers(1, 30), COEFFICIENTS)
def test_the_trapezoid_is_the_sum_over_segments(segments: int, c: list[int]) -> None:
    rule, g = trapezoid(segments), oracle.polynomial(c)
    assert len(rule.points) == len(rule.weights) == segments + 1
    assert (rule.points[0], rule.points[-1]) == (0.0, 1.0)
    assert list(rule.points) == sorted(set(rule.points))
    assert sum(rule.weights) == pytest.approx(1)
    assert applied(rule, g) == pytest.approx(float(oracle.trapezoid_sum(g, segments)), abs=1e-12)


@given(st.integers(1, 30), st.integers(-5, 5), st.integers(-5, 5))
def test_the_trapezoid_is_exact_on_linear_gradients(segments: int, a: int, b: int) -> None:
    exact = float(oracle.integral([a, b]))
    assert applied(trapezoid(segments), oracle.polynomial([a, b])) == pytest.approx(exact)


@pytest.mark.parametrize("segments", [1, 2, 5, 20])
def test_the_error_on_a_cubic_gradient_is_one_over_four_n_squared(segments: int) -> None:
    cube = [0, 0, 0, 1]
    error = applied(trapezoid(segments), oracle.polynomial(cube)) - float(oracle.integral(cube))
    assert error == pytest.approx(1 / (4 * segments**2))


@given(st.integers(2, 25), COEFFICIENTS)
def test_the_expectations_over_all_draws_are_the_enumerated_sums(
    segments: int, c: list[int]
) -> None:
    g = oracle.polynomial(c)
    whole = float(oracle.trapezoid_sum(g, segments))
    assert oracle.expected_as_derived(g, segments) == oracle.trapezoid_sum(g, segments)
    derived = mean(interior(with_interior_weighted, segments), g)
    assert derived == pytest.approx(whole, abs=1e-11)
    drawn = mean([one_of_grid(segments, draw) for draw in range(2 * segments)], g)
    assert drawn == pytest.approx(whole, abs=1e-11)
    printed = mean(interior(as_printed, segments), g)
    assert printed == pytest.approx(float(oracle.expected_as_printed(g, segments)), abs=1e-11)


def test_a_single_segment_has_its_two_ends_to_draw() -> None:
    assert [one_of_grid(1, draw).points for draw in range(2)] == [(0.0,), (1.0,)]
    g = oracle.polynomial([1, 4])
    assert mean([one_of_grid(1, 0), one_of_grid(1, 1)], g) == 3.0


def test_every_draw_of_the_grid_takes_one_gradient_of_weight_one() -> None:
    counts: dict[float, int] = {}
    for draw in range(40):
        rule = one_of_grid(20, draw)
        assert rule.weights == (1.0,)
        counts[rule.points[0]] = counts.get(rule.points[0], 0) + 1
    assert counts == {0.0: 1, 1.0: 1} | {k / 20: 2 for k in range(1, 20)}


def test_the_printed_rule_lacks_the_factor_n_minus_1() -> None:
    printed, derived = as_printed(20, 7), with_interior_weighted(20, 7)
    assert printed.points == derived.points == (0.0, 0.35, 1.0)
    assert printed.weights == pytest.approx((0.025, 0.05, 0.025))
    assert derived.weights == pytest.approx((0.025, 0.95, 0.025))
    assert derived.weights[1] == pytest.approx(19 * printed.weights[1])
    assert sum(derived.weights) == pytest.approx(1)
    # The printed weights sum to 2/N, and half of them lies on the two ends.
    assert sum(printed.weights) == pytest.approx(2 / 20)
    # A quartic loss along the path, g = α³: a quarter is right. Even after scaling the printed
    # rule's weights to a sum of 1 it takes the mean of the ends for half of the path.
    g = oracle.polynomial([0, 0, 0, 1])
    exact, whole = 0.25, oracle.trapezoid_sum(g, 20)
    expected = oracle.expected_as_printed(g, 20)
    assert mean(interior(with_interior_weighted, 20), g) == pytest.approx(float(whole))
    assert float(whole) == pytest.approx(exact, abs=1e-3)
    # (1 + 2 * 0.2375) / 40, a factor of about seven too small; 0.36875 after scaling.
    assert mean(interior(as_printed, 20), g) == pytest.approx(float(expected)) == 0.036875
    assert float(expected) * 20 / 2 == pytest.approx(0.36875)
    # It is not a matter of scale alone: two elements change places.
    late, even = oracle.polynomial([0, 0, 0, 0, 0, 1]), oracle.polynomial([Fraction(1, 4)])
    assert oracle.trapezoid_sum(late, 20) < oracle.trapezoid_sum(even, 20)
    assert oracle.expected_as_printed(late, 20) > oracle.expected_as_printed(even, 20)


@given(st.integers(1, 12), st.integers(0, 10**6), st.integers(0, 9))
def test_every_round_visits_every_stratum_once(strata: int, seed: int, around: int) -> None:
    start = around * strata
    seen = [stratum(strata, seed, i) for i in range(start, start + strata)]
    assert sorted(seen) == list(range(strata))


def test_rounds_and_seeds_are_in_different_orders() -> None:
    rounds = {tuple(stratum(12, 5, 12 * r + i) for i in range(12)) for r in range(30)}
    seeds = {tuple(stratum(12, s, i) for i in range(12)) for s in range(30)}
    assert len(rounds) == len(seeds) == 30
    places = [stratum(4, 5, 4 * r) for r in range(400)]
    assert all(60 <= places.count(k) <= 140 for k in range(4)), "no stratum is favoured"


def test_a_stratum_depends_on_its_place_alone() -> None:
    forward = [stratum(7, 3, i) for i in range(50)]
    assert [stratum(7, 3, i) for i in reversed(range(50))] == forward[::-1]
    # Two processes that take every second place make the same rounds together.
    ours, theirs = ([stratum(7, 3, 2 * i + rank) for i in range(25)] for rank in (0, 1))
    assert [k for pair in zip(ours, theirs, strict=True) for k in pair] == forward
