"""Partition rules and trimming: against slow twins, in degenerate cases, in any order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradrank as gr
from gradrank.allocation.neurons import RULES, NeuronCounts, Rule
from gradrank.allocation.partitions import check_floor, mask_of, partition_of, trim
from oracles.neuron_rules import cost, fewest_that_reach, trim_one_by_one

COMMON: dict[str, Any] = {"deadline": None, "derandomize": True, "max_examples": 60}


def counts(hits: Sequence[int], shares: Sequence[float], looks: int) -> NeuronCounts:
    return NeuronCounts(np.array(hits, np.int64), np.array(shares, np.float64), looks)


def chosen(rule: str, known: NeuronCounts, **options: Any) -> list[int]:
    return np.flatnonzero(Rule(rule, **options).dominant(known, "layers.0.q")).tolist()


# --- rules ---------------------------------------------------------------------------------------

KNOWN = counts([4, 3, 2, 1, 0, 2], [1.0, 1.6, 0.5, 0.4, 0.1, 0.4], looks=4)


def test_every_rule_on_one_example() -> None:
    assert chosen("majority", KNOWN) == [0, 1]
    assert chosen("mean", KNOWN) == [0, 1]
    assert chosen("top_fraction", KNOWN, fraction=0.5) == [0, 1, 2]
    assert chosen("top_fraction", KNOWN, fraction=0.51) == [0, 1, 2, 5]
    assert chosen("cumulative", KNOWN, threshold=0.7) == [0, 1, 2]
    assert chosen("cumulative", KNOWN, threshold=0.4) == [1]
    assert chosen("cumulative", KNOWN, threshold=0.41) == [0, 1]
    assert len(chosen("random", KNOWN, fraction=0.5)) == 3


def test_majority_is_more_than_half_and_mean_is_more_than_the_mean() -> None:
    assert chosen("majority", counts([2, 3], [2.0, 2.0], looks=4)) == [1]
    assert chosen("majority", counts([2, 3], [2.5, 2.5], looks=5)) == [1]
    assert chosen("mean", counts([1, 2, 3], [1.0, 1.0, 1.0], looks=3)) == [2]
    assert chosen("mean", counts([0, 0, 1], [1.0, 1.0, 8.0], looks=10)) == [2]


def test_equal_shares_are_taken_by_hits_and_then_by_number() -> None:
    tied = counts([0, 2, 1, 2], [1.0, 1.0, 1.0, 1.0], looks=4)
    assert chosen("top_fraction", tied, fraction=0.25) == [1]
    assert chosen("top_fraction", tied, fraction=0.5) == [1, 3]
    assert chosen("cumulative", tied, threshold=0.75) == [1, 2, 3]


@pytest.mark.parametrize("rule", RULES)
def test_without_importance_no_row_is_dominant_but_by_chance(rule: str) -> None:
    for looks in (0, 3):
        nothing = counts([0] * 6, [0.0] * 6, looks)
        for extreme in (0.0, 0.5, 1.0):
            found = chosen(rule, nothing, fraction=extreme, threshold=extreme)
            assert len(found) == (6 * extreme if rule == "random" else 0)
        assert not Rule(rule).strength(nothing, "q")[1].any()


@pytest.mark.parametrize("rule", RULES)
def test_equal_rows_and_single_rows(rule: str) -> None:
    equal, single = counts([0] * 4, [0.75] * 4, 3), counts([0], [3.0], 3)
    expected = {"majority": (0, 0), "mean": (0, 0), "cumulative": (3, 1)}.get(rule, (2, 1))
    assert len(chosen(rule, equal)) == expected[0]
    assert len(chosen(rule, single)) == expected[1]


def test_fractions_and_thresholds_at_their_ends() -> None:
    for rule in ("top_fraction", "random"):
        assert chosen(rule, KNOWN, fraction=0.0) == []
        assert chosen(rule, KNOWN, fraction=1.0) == [0, 1, 2, 3, 4, 5]
    assert chosen("cumulative", KNOWN, threshold=0.0) == []
    assert chosen("cumulative", KNOWN, threshold=1.0) == [0, 1, 2, 3, 4, 5]
    some = counts([1, 0, 0], [2.0, 0.0, 1.0], looks=3)
    assert chosen("cumulative", some, threshold=1.0) == [0, 2]


@pytest.mark.parametrize("rows", [10, 30, 70])
def test_rounding_of_multiples_adds_no_row(rows: int) -> None:
    equal = counts([0] * rows, [0.1] * rows, looks=rows // 10)
    for tenths in range(11):
        for rule in ("top_fraction", "cumulative"):
            found = chosen(rule, equal, fraction=tenths / 10, threshold=tenths / 10)
            assert len(found) == tenths * rows // 10


@settings(**COMMON)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.floats(0.0, 1.0))
def test_cumulative_is_the_smallest_set_that_reaches(sizes: list[int], threshold: float) -> None:
    known = counts([0] * len(sizes), [float(size) for size in sizes], looks=1)
    found = chosen("cumulative", known, threshold=threshold)
    assert len(found) == fewest_that_reach(sizes, threshold)
    left = [size for i, size in enumerate(sizes) if i not in found]
    assert min((sizes[i] for i in found), default=12) >= max(left, default=0)


def test_random_depends_on_seed_and_name_only() -> None:
    other = counts([9] * 400, [1.0] * 400, looks=9)
    known = counts([0] * 400, [0.0] * 400, looks=0)
    first = Rule("random", seed=3).dominant(known, "a")
    assert first.tolist() == Rule("random", seed=3).dominant(other, "a").tolist()
    assert first.sum() == 200
    for again in (
        Rule("random", seed=4).dominant(known, "a"),
        Rule("random", seed=3).dominant(known, "b"),
    ):
        assert 60 <= (first & again).sum() <= 140
    larger = Rule("random", seed=3, fraction=0.75).dominant(known, "a")
    assert not (first & ~larger).any()


def test_random_rows_are_the_same_in_every_version() -> None:
    assert chosen("random", counts([0] * 12, [0.0] * 12, 0), fraction=0.5) == PINNED


PINNED = [1, 3, 4, 5, 10, 11]


def test_unknown_rules_and_values_are_refused() -> None:
    with pytest.raises(gr.OptionError, match=r"'majorty' is unknown. Did you mean 'majority'"):
        Rule("majorty")
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(gr.OptionError, match=r"fraction is .* in \[0, 1\]"):
            Rule(fraction=wrong)
        with pytest.raises(gr.OptionError, match=r"threshold is .* in \[0, 1\]"):
            Rule(threshold=wrong)


# --- masks and partitions ------------------------------------------------------------------------


@settings(**COMMON)
@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_masks_and_partitions_are_the_same_thing(flags: list[bool]) -> None:
    made = partition_of(np.array(flags), 4, 1)
    assert made == gr.NeuronPartition.of(flags, 4, 1)
    assert mask_of(made).tolist() == flags


# --- trimming ------------------------------------------------------------------------------------

Problem = tuple[list[gr.Target], dict[str, gr.NeuronPartition], dict[str, Any], int]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    targets, partitions, strength = [], {}, {}
    for name in draw(st.permutations(["a", "b", "c"])):
        d_in, d_out = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        rank = draw(st.integers(1, 4))
        lower = draw(st.integers(0, rank))
        flags = draw(st.lists(st.booleans(), min_size=d_out, max_size=d_out))
        ties = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=d_out, max_size=d_out)
        targets.append(gr.Target(name, d_in, d_out))
        partitions[name] = gr.NeuronPartition.of(flags, rank, lower)
        strength[name] = np.array(draw(ties)), np.array(draw(ties))
    floor = sum(partitions[t.name].supplementary_rank * t.cost for t in targets)
    spent = sum(partitions[t.name].parameters(t.d_in) for t in targets)
    return targets, partitions, strength, draw(st.integers(floor, max(floor, spent + 2)))


def spent(targets: Sequence[gr.Target], partitions: Any) -> int:
    return sum(partitions[target.name].parameters(target.d_in) for target in targets)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(problems())
def test_trimming_moves_the_weakest_rows_one_by_one(problem: Problem) -> None:
    targets, partitions, strength, budget = problem
    found = trim(targets, partitions, strength, budget)
    assert spent(targets, found) <= budget
    assert list(found) == [target.name for target in targets]
    expected = trim_one_by_one(targets, partitions, strength, budget)
    assert {name: p.mask for name, p in found.items()} == expected
    backwards = trim(targets[::-1], partitions, strength, budget)
    assert backwards == found
    for name, old in partitions.items():
        assert (found[name].rank, found[name].supplementary_rank) == (
            old.rank,
            old.supplementary_rank,
        )


@settings(**COMMON)
@given(st.integers(1, 6), st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 4))
def test_the_twin_and_the_partition_agree_on_costs(n: int, flags: list[bool], rank: int) -> None:
    for lower in range(rank + 1):
        made = gr.NeuronPartition.of(flags, rank, lower)
        assert cost(n, flags, rank, lower) == made.parameters(n)


TARGETS = [gr.Target("b", 4, 3), gr.Target("a", 4, 2)]
FULL = {"b": gr.NeuronPartition.of([1, 1, 0], 3, 1), "a": gr.NeuronPartition.of([1, 1], 3, 1)}
STRENGTH = {
    "b": (np.array([0.5, 1.0, 0.0]), np.array([1.0, 1.0, 1.0])),
    "a": (np.array([0.5, 0.75]), np.array([2.0, 1.0])),
}


def test_what_fits_is_left_as_it_is() -> None:
    whole = spent(TARGETS, FULL)
    assert whole == (3 * 6 + 5) + 3 * 6
    assert trim(TARGETS, FULL, STRENGTH, whole) == FULL


def test_frequency_comes_first_then_relative_importance() -> None:
    found = trim(TARGETS, FULL, STRENGTH, 40)
    assert {name: p.mask for name, p in found.items()} == {
        "b": [False, True, False],
        "a": [True, True],
    }


def test_a_full_target_first_costs_more_and_an_empty_group_nothing() -> None:
    # The next row, of a, needs an A for the other group; only when a is empty it pays.
    found = trim(TARGETS, FULL, STRENGTH, 38)
    assert {name: p.mask for name, p in found.items()} == {
        "b": [False, True, False],
        "a": [False, False],
    }
    assert spent(TARGETS, found) == (3 * 5 + 6) + 6


def test_the_twin_is_told_from_one_that_empties_targets_in_turn() -> None:
    right = trim_one_by_one(TARGETS, FULL, STRENGTH, 40)
    assert right == {name: p.mask for name, p in trim(TARGETS, FULL, STRENGTH, 40).items()}
    assert trim_one_by_one(TARGETS, FULL, STRENGTH, 40, within_target=True) != right


def test_a_budget_below_the_supplementary_rank_names_both_numbers() -> None:
    floor = 7 + 6
    kept = trim(TARGETS, FULL, STRENGTH, floor)
    assert not any(p.dominant_rows for p in kept.values())
    with pytest.raises(gr.BudgetError, match=r"budget 12 is below the floor of 13 .*rank 1"):
        trim(TARGETS, FULL, STRENGTH, floor - 1)
    check_floor(TARGETS, {"a": 0, "b": 0}, 0)


def test_names_that_do_not_match_are_refused() -> None:
    with pytest.raises(gr.OptionError, match="no partition, the first is 'a'"):
        trim(TARGETS, {"b": FULL["b"]}, STRENGTH, 99)
    with pytest.raises(gr.OptionError, match="no strength, the first is 'a'"):
        trim(TARGETS, FULL, {"b": STRENGTH["b"]}, 99)
