"""Which directions stay, against a twin that takes them one by one."""

import random
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradrank.allocation import keep_directions
from gradrank.core.errors import BudgetError
from gradrank.core.targets import Target
from oracles import igu as oracle

# Query and output, key and value of grouped-query attention, and an MLP.
SHAPES = [(32, 32), (32, 16), (32, 48), (48, 32), (5, 3)]
Scores = dict[str, list[float]]


def spent(targets: Sequence[Target], kept: Mapping[str, Sequence[int]]) -> int:
    return sum(len(kept[t.name]) * (t.d_in + t.d_out) for t in targets)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Target], Scores, int, int]:
    """Targets with scores that often tie, a budget that holds, and r_min."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5))
    targets = [Target(f"layers.{i}.m", *shape) for i, shape in enumerate(shapes)]
    values = st.integers(-2, 4).map(float)
    scores = {t.name: draw(st.lists(values, max_size=5)) for t in targets}
    r_min = draw(st.integers(0, 2))
    floor = sum(min(r_min, len(scores[t.name])) * t.cost for t in targets)
    return targets, scores, floor + draw(st.integers(0, 900)), r_min


@given(problems())
def test_it_is_the_twin_that_takes_one_direction_after_the_other(
    problem: tuple[list[Target], Scores, int, int],
) -> None:
    assert keep_directions(*problem) == oracle.keep_one_by_one(*problem)


@given(problems())
def test_the_budget_holds_and_what_is_left_pays_for_nothing_more(
    problem: tuple[list[Target], Scores, int, int],
) -> None:
    targets, scores, budget, r_min = problem
    kept = keep_directions(*problem)
    slack = budget - spent(targets, kept)
    assert slack >= 0
    gone = [t.cost for t in targets if len(kept[t.name]) < len(scores[t.name])]
    assert all(slack < cost for cost in gone)
    for target in targets:
        found, given_scores = kept[target.name], scores[target.name]
        assert list(found) == sorted(set(found))
        assert len(found) >= min(r_min, len(given_scores))
        lost = [given_scores[i] for i in range(len(given_scores)) if i not in found]
        assert max(lost, default=-9) <= min((given_scores[i] for i in found), default=9)


@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_targets_does_not_matter(
    problem: tuple[list[Target], Scores, int, int], chance: random.Random
) -> None:
    targets, scores, budget, r_min = problem
    mixed = list(targets)
    chance.shuffle(mixed)
    again = keep_directions(mixed, {t.name: scores[t.name] for t in mixed}, budget, r_min)
    assert again == keep_directions(*problem)
    assert list(again) == [target.name for target in mixed]


@given(problems(), st.integers(0, 500))
def test_a_larger_budget_keeps_no_worse_a_direction(
    problem: tuple[list[Target], Scores, int, int], more: int
) -> None:
    """With equal costs: everything that was kept stays."""
    targets, scores, budget, r_min = problem
    equal = [Target(t.name, 10, 10) for t in targets]
    floor = sum(min(r_min, len(scores[t.name])) * 20 for t in targets)
    less = keep_directions(equal, scores, floor + budget, r_min)
    richer = keep_directions(equal, scores, floor + budget + more, r_min)
    assert all(set(less[name]) <= set(richer[name]) for name in less)


def test_the_twin_catches_stopping_at_the_first_that_is_too_dear() -> None:
    targets = [Target("big", 50, 50), Target("small", 5, 5)]
    scores = {"big": [9.0, 8.0], "small": [1.0, 0.5]}
    assert keep_directions(targets, scores, 115) == {"big": (0,), "small": (0,)}
    assert oracle.keep_one_by_one(targets, scores, 115, stops=True) == {"big": (0,), "small": ()}


def test_of_equal_scores_the_first_direction_and_then_the_first_name_is_kept() -> None:
    targets = [Target("b", 4, 4), Target("a", 4, 4)]
    scores = {"b": [1.0, 1.0, 1.0], "a": [1.0, 1.0, 1.0]}
    assert keep_directions(targets, scores, 8) == {"a": (0,), "b": ()}
    assert keep_directions(targets, scores, 16) == {"a": (0,), "b": (0,)}
    assert keep_directions(targets, scores, 24) == {"a": (0, 1), "b": (0,)}
    # Two fresh directions tie exactly; a hair decides.
    scores["b"][2] = 1.0 + 1e-12
    assert keep_directions(targets, scores, 8) == {"a": (), "b": (2,)}


def test_grouped_query_targets_are_charged_what_they_take() -> None:
    query, key = Target("q", 32, 32), Target("k", 32, 16)
    scores = {"q": [3.0, 2.0], "k": [2.5, 1.0]}
    assert keep_directions([query, key], scores, 64 + 48) == {"q": (0,), "k": (0,)}
    # 64 + 64 - 1: the second of q is better than the second of k, but only the latter is paid for.
    assert keep_directions([query, key], scores, 64 + 48 + 63) == {"q": (0,), "k": (0, 1)}
    assert keep_directions([query, key], scores, 64 + 48 + 64) == {"q": (0, 1), "k": (0,)}


def test_infinite_and_negative_scores_are_ordered_too() -> None:
    targets = [Target("a", 2, 2), Target("b", 2, 2)]
    scores = {"a": [float("-inf"), -1.0], "b": [float("inf"), -2.0]}
    assert keep_directions(targets, scores, 8) == {"a": (1,), "b": (0,)}
    assert keep_directions(targets, scores, 99) == {"a": (0, 1), "b": (0, 1)}


def test_r_min_is_kept_though_better_ones_go() -> None:
    targets = [Target("good", 4, 4), Target("poor", 4, 4)]
    scores = {"good": [5.0, 4.0, 3.0], "poor": [0.2, 0.1]}
    assert keep_directions(targets, scores, 24, r_min=0) == {"good": (0, 1, 2), "poor": ()}
    assert keep_directions(targets, scores, 24, r_min=1) == {"good": (0, 1), "poor": (0,)}
    with pytest.raises(BudgetError, match=r"1 direction\(s\) of each of 2 targets takes 16 "):
        keep_directions(targets, scores, 15, r_min=1)
    # A target that has fewer than r_min keeps all it has.
    assert keep_directions(targets, {"good": [1.0], "poor": []}, 8, r_min=3)["good"] == (0,)


def test_a_budget_of_nothing_keeps_nothing() -> None:
    assert keep_directions([Target("a", 4, 4)], {"a": [1.0]}, 0) == {"a": ()}
    with pytest.raises(BudgetError):
        keep_directions([Target("a", 4, 4)], {"a": [1.0]}, -1)


def test_scores_must_belong_to_the_targets() -> None:
    with pytest.raises(ValueError, match="direction scores"):
        keep_directions([Target("a", 4, 4)], {"b": [1.0]}, 8)
