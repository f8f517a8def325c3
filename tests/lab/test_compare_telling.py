"""What a grid says: finished runs with time left, and what is in hand when nothing finishes."""

from dataclasses import replace
from typing import Any

import pytest

from gradrank.lab.compare.config import RunConfig
from gradrank.lab.compare.grid import GridRun
from gradrank.lab.compare.pool import Event
from gradrank.lab.compare.telling import Telling, span
from gradrank.record import RunRecord

RUN = GridRun(
    "tune", "wikitext2", "eva", "eva", {}, "uniform:8", 1000, RunConfig("m", "wikitext2", lr=0.004)
)


class Heard:
    """Lines that were said, and a clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lines: list[str] = []

    def telling(self, total: int = 2) -> Telling:
        return Telling("tune", total, self.lines.append, clock=lambda: self.now)


@pytest.fixture
def heard() -> Heard:
    return Heard()


def record(status: str, **values: Any) -> RunRecord:
    return RunRecord(name="eva", kind="train", status=status, **values)


def test_a_run_that_takes_long_is_named_once_a_minute(heard: Heard) -> None:
    telling = heard.telling()
    telling.hear(Event("started", RUN.to_dict(), 0))
    heard.now += 59
    telling.hear(Event("quiet", None, -1))
    assert heard.lines == []
    heard.now += 1
    telling.hear(Event("quiet", None, -1))
    telling.hear(Event("quiet", None, -1))
    name = "in hand: wikitext2 · eva · uniform:8 · seed 1000"
    assert heard.lines == [f"{name}: before its first step, for 60 s"]
    telling.hear(Event("progress", RUN.to_dict(), 0, (3, 24, 2.5)))
    heard.now += 60
    telling.hear(Event("progress", RUN.to_dict(), 0, (5, 24, 2.4)))
    assert heard.lines[1:] == [f"{name}: step 5 of 24, for 2 min"]


def test_every_worker_is_named_and_one_that_is_done_is_not(heard: Heard) -> None:
    telling = heard.telling()
    other = replace(RUN, seed=7)
    telling.hear(Event("started", RUN.to_dict(), 0))
    telling.hear(Event("started", other.to_dict(), 1))
    heard.now += 60
    telling.hear(Event("quiet", None, -1))
    assert [line.split(" · ")[-1].split(":")[0] for line in heard.lines] == ["seed 1000", "seed 7"]
    telling.hear(Event("died", other.to_dict(), 1))
    heard.now += 60
    telling.hear(Event("quiet", None, -1))
    assert len(heard.lines) == 3
    telling.hear(Event("done", RUN.to_dict(), 0))
    heard.now += 600
    telling.hear(Event("quiet", None, -1))
    assert len(heard.lines) == 3


def test_a_finished_run_is_told_with_its_metric_and_the_time_left(heard: Heard) -> None:
    telling = heard.telling(total=3)
    heard.now += 30
    told = {"metric": "perplexity"}
    telling.finished(RUN, record("finished", metrics={"perplexity": 39.50418}, comparison=told))
    telling.finished(RUN, record("failed", comparison={"message": "out of memory"}))
    telling.finished(RUN, None)
    name = "wikitext2 · eva · uniform:8 · seed 1000"
    assert heard.lines == [
        f"tune 1/3  {name} · lr 0.004: perplexity 39.5042  60 s left",
        f"tune 2/3  {name}: FAILED: out of memory  15 s left",
        f"tune 3/3  {name}: no record  0 s left",
    ]


def test_a_finished_run_ends_the_silence(heard: Heard) -> None:
    telling = heard.telling()
    telling.hear(Event("started", RUN.to_dict(), 0))
    heard.now += 50
    telling.finished(RUN, None)
    heard.now += 50
    telling.hear(Event("quiet", None, -1))
    assert len(heard.lines) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert span(seconds) == text
