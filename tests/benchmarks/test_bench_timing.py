"""Turns and ratios of benchmarks, on seconds that are made up."""

from typing import Any

import numpy as np
import pytest
from benchmarks.timing import ratio, take_turns

from benchmarks import timing


def noisy(count: int, seed: int = 0) -> np.ndarray:
    return 1 + 0.5 * np.random.default_rng(seed).random(count)


def test_everything_takes_its_turn_in_an_order_that_moves_on() -> None:
    seen: list[tuple[str, int]] = []
    ready: list[int] = []
    turns = {name: lambda n, name=name: seen.append((name, n)) for name in "abc"}
    seconds = take_turns(turns, 3, warmup=1, before={"b": ready.append})
    assert [name for name, _ in seen] == list("abc" + "bca" + "cab" + "abc")
    assert [n for name, n in seen if name == "a"] == ready == [0, 1, 2, 3]
    assert {name: len(taken) for name, taken in seconds.items()} == dict.fromkeys("abc", 3)


def test_making_ready_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def wait(seconds: float) -> Any:
        return lambda _number: clock.__setitem__(0, clock[0] + seconds)

    assert take_turns({"a": wait(2.0)}, 2, before={"a": wait(5.0)}) == {"a": [2.0, 2.0]}


def test_a_ratio_is_that_of_the_sums_and_pairs_cancel_slow_minutes() -> None:
    base = noisy(40) * np.linspace(1, 30, 40)
    found = ratio(list(1.1 * base), list(base))
    assert found.value == pytest.approx(1.1)
    assert found.interval == pytest.approx((1.1, 1.1))
    assert found.least == pytest.approx(found.most) == pytest.approx(1.1)


def test_too_few_pairs_have_no_interval() -> None:
    assert ratio([1.0] * 4, [1.0] * 4).interval is None
    assert ratio([1.0] * 5, [1.0] * 5).interval is not None


def test_intervals_hold_the_true_ratio_about_as_often_as_they_say() -> None:
    hits = 0
    for seed in range(100):
        base, mine = noisy(40, 2 * seed), 1.05 * noisy(40, 2 * seed + 1)
        interval = ratio(list(mine), list(base)).interval
        assert interval is not None
        hits += interval[0] <= 1.05 <= interval[1]
    assert 88 <= hits <= 99


def test_rare_dear_rounds_are_not_averaged_over() -> None:
    """A decision in every tenth step belongs to each run: it does not widen the interval."""
    base, kinds = noisy(50), [step % 10 == 0 for step in range(50)]
    mine = [b + (3.0 if dear else 0.0) for b, dear in zip(base, kinds, strict=True)]
    loose, tight = ratio(mine, list(base)).interval, ratio(mine, list(base), kinds).interval
    assert loose is not None
    assert tight is not None
    assert tight[1] - tight[0] < 0.3 * (loose[1] - loose[0])
