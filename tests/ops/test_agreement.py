"""Spearman's correlation against scipy and against its slow twin."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from gradrank.ops.agreement import average_ranks, spearman
from oracles.reliability import mid_ranks
from oracles.reliability import spearman as oracle

pairs = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=15)


@given(pairs=pairs)
def test_spearman_with_ties_equals_oracle_and_scipy(pairs: list[tuple[int, int]]) -> None:
    x, y = ([float(pair[i]) for pair in pairs] for i in range(2))
    found = spearman(torch.tensor(x), torch.tensor(y))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(found)
        assert math.isnan(oracle(x, y))
        return
    assert found == pytest.approx(oracle(x, y), abs=1e-12)
    assert found == pytest.approx(float(spearmanr(x, y).statistic), abs=1e-12)


def test_the_oracle_catches_ranks_without_ties() -> None:
    x, y = [1.0, 1.0, 2.0, 3.0], [2.0, 1.0, 3.0, 3.0]
    ordinal = [1.0, 2.0, 3.0, 4.0]
    assert mid_ranks(x) != ordinal
    assert abs(oracle(ordinal, y) - oracle(x, y)) > 1e-3


def test_too_few_values_have_no_correlation() -> None:
    assert math.isnan(spearman(torch.tensor([1.0]), torch.tensor([2.0])))
    assert math.isnan(spearman(torch.tensor([]), torch.tensor([])))
    assert average_ranks(torch.tensor([5.0])).tolist() == [1.0]
