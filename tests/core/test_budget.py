"""Budgets in all their spellings, and what is refused."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradrank as gr
from gradrank.core.targets import cost_of_rank_one

TARGETS = (gr.Target("a.0.q", 3, 5), gr.Target("a.1.q", 4, 4))


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        (200_000, "parameters", 200_000),
        ("200000", "parameters", 200_000),
        ("200_000", "parameters", 200_000),
        ("200,000", "parameters", 200_000),
        (" 17 ", "parameters", 17),
        ("uniform:8", "uniform", 8),
        ("Uniform:8", "uniform", 8),
        ("0.5%", "fraction", 0.005),
        (".5%", "fraction", 0.005),
        ("100%", "fraction", 1.0),
    ],
)
def test_budgets_are_read_as_written(text: Any, kind: str, value: float) -> None:
    budget = gr.Budget.parse(text)
    assert (budget.kind, budget.value) == (kind, pytest.approx(value))
    assert gr.Budget.parse(str(budget)) == budget
    assert gr.Budget.parse(budget) is budget


@pytest.mark.parametrize(
    "text",
    [
        "", "much", "uniform", "uniform:", "uniform:0", "uniform:-1", "uniform:1.5", "0", 0, -1,
        "-5", "0%", "101%", "1e400%", "1e6", "0.5", 0.5, True, None, "inf", "nan%", "9" * 99, [],
    ],
)  # fmt: skip
def test_other_budgets_are_refused(text: Any) -> None:
    with pytest.raises(gr.BudgetError) as caught:
        gr.Budget.parse(text)
    assert str(text) in str(caught.value) or repr(text) in str(caught.value) or "%" in str(text)


@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, math.inf, True, None, "7", [1]])
def test_impossible_values_are_refused(value: Any) -> None:
    with pytest.raises(gr.BudgetError, match="whole"):
        gr.Budget.parameters(value)
    with pytest.raises(gr.BudgetError, match="whole"):
        gr.Budget.uniform(value)


@pytest.mark.parametrize("value", [0, -0.1, 1.1, math.nan, math.inf, True, None, "0.5"])
def test_impossible_fractions_are_refused(value: Any) -> None:
    with pytest.raises(gr.BudgetError, match=r"\(0, 1\]"):
        gr.Budget.fraction(value)


def test_budgets_resolve_to_parameters() -> None:
    assert cost_of_rank_one(TARGETS) == 16
    assert gr.Budget.parameters(17).resolve(TARGETS, 0) == 17
    assert gr.Budget.uniform(3).resolve(TARGETS, 0) == 48
    assert gr.Budget.fraction(0.0159).resolve(TARGETS, 1000) == 15
    with pytest.raises(gr.BudgetError, match="not known"):
        gr.Budget.fraction(0.5).resolve(TARGETS, 0)


@given(count=st.integers(1, 10**15 - 1), rank=st.integers(1, 999_999))
def test_every_budget_survives_its_text(count: int, rank: int) -> None:
    for budget in (gr.Budget.parameters(count), gr.Budget.uniform(rank)):
        assert gr.Budget.parse(str(budget)) == budget
