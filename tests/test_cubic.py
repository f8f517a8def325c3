"""The cubic budget: against the published curve in exact fractions, and against PEFT's."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from gradrank.core.errors import OptionError
from gradrank.schedule import Cubic
from oracles import igu as oracle


@st.composite
def settings(draw: st.DrawFn) -> Cubic:
    total = draw(st.integers(1, 80))
    return Cubic(
        total_steps=total,
        interval=draw(st.integers(1, 15)),
        warmup=draw(st.integers(0, 40)),
        final=draw(st.integers(1, total + 5)),
        score_every=draw(st.integers(1, 12)),
    )


def runs(schedule: Cubic) -> bool:
    return schedule.last > schedule.warmup


@given(settings(), st.integers(0, 10**7), st.integers(0, 10**7))
def test_it_is_the_published_curve_rounded_down(schedule: Cubic, one: int, other: int) -> None:
    budget, start = sorted((one, other))
    times = (schedule.total_steps, schedule.warmup, schedule.final)
    if not runs(schedule):
        assert schedule.decisions == ()
        return
    for step in range(schedule.total_steps + 1):
        exact = oracle.cubic(step, start, budget, times)
        found = schedule.allowed(step, start, budget)
        assert isinstance(found, int)
        # The oracle's floats may miss a whole number by their last bits.
        assert exact - 1 - 1e-6 <= found <= exact + 1e-6


@given(settings(), st.integers(0, 10**6), st.integers(0, 10**6))
def test_it_never_rises_and_lands_exactly_on_the_budget(
    schedule: Cubic, budget: int, more: int
) -> None:
    if not runs(schedule):
        return
    start = budget + more
    curve = [schedule.allowed(step, start, budget) for step in range(schedule.total_steps + 1)]
    assert curve == sorted(curve, reverse=True)
    assert set(curve[: schedule.warmup + 1]) == {start}
    assert set(curve[schedule.last :]) == {budget}
    assert all(budget <= value <= start for value in curve)


@given(settings())
def test_decisions_and_looks_equal_a_walk_through_the_run(schedule: Cubic) -> None:
    due, looks = [], []
    since = 0
    for step in range(1, schedule.total_steps + 1):
        over = step > schedule.total_steps - schedule.final
        if not over and step % schedule.score_every == 0:
            looks.append(step)
        if step <= schedule.warmup or over:
            continue
        since += 1
        if since == schedule.interval or step == schedule.total_steps - schedule.final:
            due.append(step)
            since = 0
    steps = range(1, schedule.total_steps + 3)
    assert [step for step in steps if schedule.decides(step)] == due == list(schedule.decisions)
    assert [step for step in steps if schedule.observes(step)] == looks


def test_the_last_decision_is_the_one_that_lands_even_off_the_interval() -> None:
    schedule = Cubic(total_steps=40, interval=7, warmup=4, final=10)
    assert schedule.last == 30
    assert schedule.decisions == (11, 18, 25, 30)
    assert schedule.allowed(30, 10**6, 400) == 400
    assert 400 < schedule.allowed(29, 10**6, 400) < schedule.allowed(25, 10**6, 400) < 10**6
    assert Cubic(40, 13, 4, 10).decisions == (17, 30), "not twice where both fall together"


def test_by_hand() -> None:
    schedule = Cubic(total_steps=100, interval=10, warmup=10, final=30)
    # Half of the time is left after step 40: an eighth of the surplus.
    assert schedule.allowed(40, 1800, 1000) == 1100
    assert schedule.allowed(10, 1800, 1000) == 1800
    assert schedule.allowed(70, 1800, 1000) == 1000


def test_the_fractions_catch_the_formula_as_it_is_printed() -> None:
    times = (100, 10, 30)
    assert oracle.cubic(40, 1800, 1000, times) == 1100
    assert oracle.cubic(69, 1800, 1000, times, printed=True) > 1050, "does not reach the budget"


def test_a_start_within_the_budget_is_left_alone() -> None:
    schedule = Cubic(100, 10, 10, 30)
    assert {schedule.allowed(step, 700, 800) for step in range(101)} == {800}


def test_it_is_pefts_schedule_in_ranks() -> None:
    """Between warm-up and final phase; PEFT counts ranks where gradrank counts parameters."""
    config = SimpleNamespace(
        beta1=0.85, beta2=0.85, target_r=2, tinit=20, tfinal=50, total_step=200, deltaT=10
    )
    allocator: Any = RankAllocator(nn.Module(), config, "default")
    allocator.init_bgt, allocator.target_bgt = 4 * 24, 2 * 24
    schedule = Cubic(total_steps=200, interval=10, warmup=20, final=50)
    theirs = [allocator.budget_schedule(step)[0] for step in range(1, 201)]
    ours = [schedule.allowed(step, 4 * 24, 2 * 24) for step in range(1, 201)]
    assert theirs[19:149] == pytest.approx(ours[19:149], abs=1)
    assert theirs[:20] == ours[:20] == [96] * 20
    assert theirs[150:] == ours[150:] == [48] * 50


@pytest.mark.parametrize(
    ("schedule", "named"),
    [
        (Cubic(50, 10, 20, 30), r"of 50 steps the first 20 \(warmup\) and the last 30 \(final\)"),
        (Cubic(10, 1, 0, 10), r"of 10 steps the first 0 \(warmup\) and the last 10"),
        (Cubic(1, 1, 0, 1), r"of 1 steps"),
    ],
)
def test_a_schedule_that_takes_nothing_away_is_refused(schedule: Cubic, named: str) -> None:
    assert schedule.decisions == ()
    with pytest.raises(OptionError, match=rf"method 'x' would never take any.*{named}"):
        schedule.check("method 'x'")


def test_deciding_without_having_looked_is_refused() -> None:
    Cubic(50, 10, 0, 10, score_every=10).check("method 'x'")
    with pytest.raises(OptionError, match=r"decide after step 10 without .*every 11 steps"):
        Cubic(50, 10, 0, 10, score_every=11).check("method 'x'")


@pytest.mark.parametrize("name", ["total_steps", "interval", "final", "score_every", "warmup"])
def test_impossible_numbers_are_refused_by_name(name: str) -> None:
    numbers = {"total_steps": 10, "interval": 2, "warmup": 0, "final": 2, "score_every": 1}
    with pytest.raises(OptionError, match=rf"{name} is -1; it must be"):
        Cubic(**numbers | {name: -1})
    if name != "warmup":
        with pytest.raises(OptionError, match=rf"{name} is 0; it must be 1"):
            Cubic(**numbers | {name: 0})


def test_whole_values_are_not_lost_to_rounding() -> None:
    schedule = Cubic(total_steps=59, interval=1, warmup=0, final=19)
    assert schedule.allowed(28, 27_000, 1_000) == 1_702
