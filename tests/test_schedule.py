"""When decisions fall due and which steps are looked at, against a count step by step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradrank.core.errors import OptionError
from gradrank.schedule import Schedule, TwoStage


def decisions(total: int, interval: int, warmup: int, freeze_after: int | None) -> list[int]:
    """Walk through the run and count."""
    found, since = [], 0
    for step in range(1, total + 1):
        since += 1
        if since < interval:
            continue
        since = 0
        frozen = freeze_after is not None and step > freeze_after
        if step > warmup and not frozen and step != total:
            found.append(step)
    return found


def observed(due: list[int], window: int) -> set[int]:
    """The last ``window`` steps before every decision, its own step included."""
    return {step for end in due for step in range(end - window + 1, end + 1) if step >= 1}


@st.composite
def settings(draw: st.DrawFn) -> Schedule:
    return Schedule(
        total_steps=draw(st.integers(1, 60)),
        interval=draw(st.integers(1, 20)),
        window=draw(st.integers(1, 25)),
        warmup=draw(st.integers(0, 30)),
        freeze_after=draw(st.none() | st.integers(1, 70)),
    )


@given(settings())
def test_decisions_and_observed_steps_equal_a_walk_through_the_run(schedule: Schedule) -> None:
    due = decisions(schedule.total_steps, schedule.interval, schedule.warmup, schedule.freeze_after)
    steps = range(1, schedule.total_steps + 3)
    assert list(schedule.decisions) == due
    assert [step for step in steps if schedule.decides(step)] == due
    assert {step for step in steps if schedule.observes(step)} == observed(due, schedule.window)


def test_the_walk_catches_a_warmup_that_is_one_short_and_a_last_step_that_decides() -> None:
    assert decisions(9, 3, 3, None) == [6]
    assert decisions(9, 3, 2, None) == [3, 6]
    assert decisions(10, 3, 3, None) == [6, 9]


def test_every_window_ends_with_its_decision() -> None:
    schedule = Schedule(total_steps=41, interval=10, window=3)
    assert schedule.decisions == (10, 20, 30, 40)
    seen = [step for step in range(1, 42) if schedule.observes(step)]
    assert seen == [8, 9, 10, 18, 19, 20, 28, 29, 30, 38, 39, 40]


def test_a_window_longer_than_the_interval_looks_at_every_step_up_to_the_last_decision() -> None:
    schedule = Schedule(total_steps=10, interval=3, window=7)
    assert [step for step in range(1, 11) if schedule.observes(step)] == list(range(1, 10))


def test_nothing_is_looked_at_before_the_first_window_and_after_freezing() -> None:
    schedule = Schedule(total_steps=100, interval=10, window=4, warmup=20, freeze_after=55)
    assert schedule.decisions == (30, 40, 50)
    assert not any(schedule.observes(step) for step in (*range(1, 27), *range(51, 101)))


def test_the_last_step_is_left_alone() -> None:
    assert Schedule(total_steps=20, interval=10, window=2).decisions == (10,)
    assert Schedule(total_steps=21, interval=10, window=2).decisions == (10, 20)
    assert not Schedule(total_steps=20, interval=10, window=2).observes(19)


@pytest.mark.parametrize(
    ("schedule", "named"),
    [
        (Schedule(50, 50, 4), r"in 50 steps .*interval 50, warmup 0;"),
        (Schedule(100, 10, 4, warmup=95), r"in 100 steps .*interval 10, warmup 95;"),
        (Schedule(100, 30, 4, freeze_after=29), r"interval 30, warmup 0, freeze_after 29;"),
        (Schedule(1, 1, 4), r"in 1 steps"),
    ],
)
def test_a_schedule_that_never_decides_is_refused_with_its_numbers(
    schedule: Schedule, named: str
) -> None:
    with pytest.raises(OptionError, match=rf"method 'x' would never move any capacity.*{named}"):
        schedule.check("method 'x'")
    assert not any(schedule.observes(step) for step in range(1, schedule.total_steps + 1))


def test_a_schedule_that_decides_once_passes() -> None:
    schedule = Schedule(51, 50, 4)
    schedule.check("method 'x'")
    assert schedule.decisions == (50,)


@pytest.mark.parametrize("name", ["total_steps", "interval", "window", "warmup"])
def test_impossible_numbers_are_refused_by_name(name: str) -> None:
    numbers = {"total_steps": 10, "interval": 2, "window": 2, "warmup": 0}
    with pytest.raises(OptionError, match=rf"{name} is -1; it must be"):
        Schedule(**numbers | {name: -1})


def test_two_stages_look_in_every_kth_step_of_the_first_and_decide_once() -> None:
    schedule = TwoStage(total_steps=20, initial_steps=7, interval=3)
    assert [s for s in range(1, 21) if schedule.observes(s)] == [3, 6]
    assert [s for s in range(1, 21) if schedule.decides(s)] == [7] == list(schedule.decisions)
    assert schedule.looks == 2
    schedule.check("pilora")


@pytest.mark.parametrize(
    ("total", "first", "interval", "what"),
    [
        (10, 10, 2, "never reach its second stage: the first one takes 10 of 10"),
        (10, 4, 5, "without having looked at anything: gradients are looked at every 5 steps"),
        (10, 0, 5, "initial_steps is 0"),
        (10, 4, 0, "interval is 0"),
    ],
)
def test_stages_that_cannot_work_are_refused(
    total: int, first: int, interval: int, what: str
) -> None:
    with pytest.raises(OptionError, match=what):
        TwoStage(total, first, interval).check("method 'pilora'")
