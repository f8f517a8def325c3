import math
import random
import statistics
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.allocation import (
    depth_scores,
    permute_within_shape,
    random_scores,
    reverse_order,
    uniform,
)
from gradrank.core.errors import BudgetError, OptionError, TargetError
from gradrank.core.targets import Target
from oracles.allocation import parameters

QUIET = settings(deadline=None, derandomize=True, max_examples=60)


def llama(blocks, hidden=16, wide=44, grouped=4):
    shapes = {
        "q": (hidden, hidden),
        "k": (hidden, grouped),
        "up": (hidden, wide),
        "down": (wide, hidden),
    }
    return [
        Target(f"model.layers.{i}.{name}", d_in, d_out)
        for i in range(blocks)
        for name, (d_in, d_out) in shapes.items()
    ]


def test_a_whole_multiple_is_the_same_rank_everywhere():
    targets = llama(5)
    for rank in (1, 2, 4):
        ranks = uniform(targets, rank * sum(t.cost for t in targets))
        assert set(ranks.values()) == {rank}


@QUIET
@given(st.integers(1, 7), st.floats(0, 1), st.randoms(use_true_random=False))
def test_uniform_keeps_budget_slack_bounds_and_order(blocks, part, randomness):
    targets = [*llama(blocks), Target("head", 16, 2), Target("lm.proj", 5, 9)]
    one = sum(t.cost for t in targets)
    budget = one + int(part * (sum(t.cost * t.max_rank for t in targets) - one))
    ranks = uniform(targets, budget)
    slack = budget - parameters(ranks, targets)
    steps = [t.cost for t in targets if ranks[t.name] < t.max_rank]
    assert 0 <= slack < min(steps, default=slack + 1)
    assert all(1 <= ranks[t.name] <= t.max_rank for t in targets)
    shuffled = randomness.sample(targets, len(targets))
    assert uniform(shuffled, budget) == ranks
    assert list(uniform(shuffled, budget)) == [t.name for t in shuffled]


@pytest.mark.parametrize("extra", [1, 5, 13, 32, 60])
def test_the_remainder_is_spread_over_depth_and_module_types(extra):
    targets = [Target(f"layers.{i}.{name}", 8, 8) for i in range(16) for name in "qkvo"]
    ranks = uniform(targets, 16 * (64 + extra))
    more = [
        place
        for place, t in enumerate(sorted(targets, key=lambda t: (t.depth, t.name)))
        if ranks[t.name] == 2
    ]
    assert len(more) == extra
    gaps = {b - a for a, b in pairwise(more)}
    assert len(gaps) <= 3
    assert max(gaps, default=0) <= 3 * 64 / extra + 1
    kinds = Counter(name[-1] for name, rank in ranks.items() if rank == 2)
    assert max(kinds.values()) <= extra // 4 + 3


def test_cheap_targets_take_what_dear_ones_cannot():
    targets = [Target("a", 40, 40), Target("b", 4, 4), Target("c", 4, 4)]
    ranks = uniform(targets, 96 + 79)
    assert ranks == {"a": 1, "b": 4, "c": 4}


def test_uniform_budgets_outside_floor_and_ceiling_are_refused():
    targets = [Target("a", 3, 5), Target("b", 2, 2)]
    with pytest.raises(BudgetError, match=r"budget 11 .*floor of 12 .*2 targets.*may drop targets"):
        uniform(targets, 11)
    with pytest.raises(BudgetError, match=r"budget 33 .*ceiling of 32"):
        uniform(targets, 33)
    assert uniform(targets, 32) == {"a": 3, "b": 2}
    with pytest.raises(TargetError):
        uniform([], 5)


def test_random_scores_are_exponential_and_depend_on_seed_and_name_only():
    targets = [Target(f"layers.{i}.m", 4, 4) for i in range(4000)]
    scores = random_scores(targets, seed=3)
    assert random_scores(targets[::-1], seed=3) == scores
    assert random_scores(targets[7:8], seed=3) == {targets[7].name: scores[targets[7].name]}
    assert len(set(scores.values())) == len(targets)
    assert all(0 < score < math.inf for score in scores.values())
    assert statistics.mean(scores.values()) == pytest.approx(1, abs=0.06)
    assert statistics.median(scores.values()) == pytest.approx(math.log(2), abs=0.06)
    other = random_scores(targets, seed=4)
    assert not set(other.values()) & set(scores.values())


def test_random_scores_and_permutations_agree_between_processes():
    targets = [Target(n, 4, 4) for n in ("a", "b.1", "c")]
    code = (
        "from gradrank.allocation import permute_within_shape, random_scores\n"
        "from gradrank.core.targets import Target\n"
        "t = [Target(n, 4, 4) for n in ('a', 'b.1', 'c')]\n"
        "print(random_scores(t, 5), permute_within_shape(t, {'a': 1, 'b.1': 2, 'c': 3}, 5))"
    )
    here = [random_scores(targets, 5), permute_within_shape(targets, {"a": 1, "b.1": 2, "c": 3}, 5)]
    for salt in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": salt, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == f"{here[0]} {here[1]}"


def test_depth_scores_are_linear_in_each_stack():
    targets = [
        *(Target(f"encoder.layer.{i}.q", 4, 4) for i in (2, 11, 5)),
        *(Target(f"decoder.block.{i}.q", 4, 4) for i in (0, 1)),
        Target("vision.0.q", 4, 4),
        Target("head", 4, 4),
    ]
    scores = depth_scores(targets, first=1.0, last=10.0)
    assert scores == pytest.approx(
        {
            "encoder.layer.2.q": 1.0,
            "encoder.layer.11.q": 10.0,
            "encoder.layer.5.q": 4.0,
            "decoder.block.0.q": 1.0,
            "decoder.block.1.q": 10.0,
            "vision.0.q": 5.5,
            "head": 5.5,
        }
    )
    assert depth_scores(targets[::-1], 1.0, 10.0) == scores
    assert depth_scores(targets, 2.0, 0.0)["encoder.layer.11.q"] == 0.0
    for first, last in ((-1.0, 1.0), (0.0, 0.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(OptionError, match="depth scores from first="):
            depth_scores(targets, first, last)


@QUIET
@given(st.integers(1, 6), st.integers(0, 50), st.randoms(use_true_random=False))
def test_permutation_keeps_budget_and_values_per_shape(blocks, seed, randomness):
    targets = [*llama(blocks), Target("layers.0.odd", 16, 16, "quantized-linear")]
    ranks = {t.name: randomness.randint(0, 4) for t in targets}
    permuted = permute_within_shape(targets, ranks, seed)
    assert parameters(permuted, targets) == parameters(ranks, targets)
    assert list(permuted) == [t.name for t in targets]
    assert permuted["layers.0.odd"] == ranks["layers.0.odd"]
    for shape in {(t.d_in, t.d_out, t.kind) for t in targets}:
        names = [t.name for t in targets if (t.d_in, t.d_out, t.kind) == shape]
        assert Counter(permuted[n] for n in names) == Counter(ranks[n] for n in names)
    shuffled = randomness.sample(targets, len(targets))
    assert permute_within_shape(shuffled, ranks, seed) == permuted


def test_permutations_differ_between_seeds_and_reach_every_place():
    targets = [Target(n, 4, 4) for n in "abcd"]
    values = {n: n for n in "abcd"}
    seen = Counter(permute_within_shape(targets, values, seed)["a"] for seed in range(400))
    assert set(seen) == set("abcd")
    assert max(seen.values()) < 150
    with pytest.raises(OptionError, match="no value"):
        permute_within_shape(targets, {"a": 1}, 0)


@QUIET
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 5), min_size=1))
def test_the_reversed_order_is_the_reverse(values):
    targets = [Target(name, 4, 4) for name in values]
    donors = reverse_order(values, targets)
    assert sorted(donors.values()) == sorted(values)
    assert reverse_order(values, targets[::-1]) == donors
    falling = sorted(values, key=lambda n: (-values[n], n))
    received = [values[donors[name]] for name in falling]
    assert received == sorted(values.values())
    assert all(donors[donors[name]] == name for name in values)


def test_reverse_order_refuses_unknown_names():
    with pytest.raises(OptionError, match="score for 'layer', which is no target"):
        reverse_order({"layers": 1.0, "layer": 2.0}, [Target("layers", 4, 4)])


def test_random_ranks_shuffled_by_hand_would_not_pass_for_a_permutation_within_shape():
    targets = llama(3)
    ranks = {t.name: place for place, t in enumerate(targets)}
    values = list(ranks.values())
    random.Random(0).shuffle(values)
    careless = dict(zip(ranks, values, strict=True))
    assert parameters(careless, targets) != parameters(ranks, targets)
