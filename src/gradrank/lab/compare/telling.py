"""What a grid says while it works: each finished run, and what is in hand when nothing finishes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gradrank.lab.compare.grid import GridRun
from gradrank.lab.compare.pool import Event
from gradrank.record import RunRecord

Say = Callable[[str], None]
_SILENCE = 60.0  # seconds; a run that calibrates for minutes must not look like one that hangs


@dataclass
class _InHand:
    run: GridRun
    since: float
    at: tuple[int, int] | None = None


@dataclass
class Telling:
    """The lines of one phase.

    Attributes:
        phase: Its name.
        total: Runs to do.
        say: Receives the lines.
        clock: Seconds.
        silence: Seconds after which the runs in hand are named.
        done: Runs that have ended.
    """

    phase: str
    total: int
    say: Say
    clock: Callable[[], float] = time.monotonic
    silence: float = _SILENCE
    done: int = 0
    _in_hand: dict[int, _InHand] = field(default_factory=dict, repr=False)
    _begun: float = 0.0
    _said: float = 0.0

    def __post_init__(self) -> None:
        """Begin to count."""
        self._begun = self._said = self.clock()

    def hear(self, event: Event) -> None:
        """Note what a worker does, and name what is in hand after a long silence.

        Args:
            event: What happened.
        """
        if event.kind == "started":
            self._in_hand[event.slot] = _InHand(GridRun.from_dict(event.job), self.clock())
        elif event.kind == "progress":
            step, steps, _loss = event.detail
            self._in_hand[event.slot].at = (step, steps)
        elif event.kind in {"done", "died"}:
            self._in_hand.pop(event.slot, None)
        if self._in_hand and self.clock() - self._said >= self.silence:
            for held in self._in_hand.values():
                self._tell(f"in hand: {self._held(held)}")

    def finished(self, run: GridRun, record: RunRecord | None) -> None:
        """Say that a run has ended, with the time left.

        Args:
            run: The run.
            record: Its record, or None.
        """
        self.done += 1
        left = (self.clock() - self._begun) / self.done * (self.total - self.done)
        self._tell(
            f"{self.phase} {self.done}/{self.total}  {outcome(run, record)}  {span(left)} left"
        )

    def _held(self, held: _InHand) -> str:
        doing = f"step {held.at[0]} of {held.at[1]}" if held.at else "before its first step"
        return f"{named(held.run)}: {doing}, for {span(self.clock() - held.since)}"

    def _tell(self, line: str) -> None:
        self._said = self.clock()
        self.say(line)


def named(run: GridRun) -> str:
    """Return a run's name for people.

    Args:
        run: The run.

    Returns:
        Task, arm, budget and seed.
    """
    return f"{run.task} · {run.label} · {run.budget} · seed {run.seed}"


def outcome(run: GridRun, record: RunRecord | None) -> str:
    """Return what became of a run.

    Args:
        run: The run.
        record: Its record, or None.

    Returns:
        Its name with its metric, or why it has none.
    """
    name = named(run)
    if record is None or record.comparison is None:
        return f"{name}: no record"
    if record.status != "finished":
        return f"{name}: FAILED: {record.comparison.get('message')}"
    metric: Any = record.comparison.get("metric")
    value = record.metrics.get(str(metric))
    return name if value is None else f"{name} · lr {run.config.lr:g}: {metric} {value:.4f}"


def span(seconds: float) -> str:
    """Return a time for people.

    Args:
        seconds: Seconds.

    Returns:
        Seconds, minutes or hours.
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
