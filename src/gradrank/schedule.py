"""When capacity is looked at and moved in a run. Plain numbers; no torch."""

from dataclasses import dataclass

from gradrank.core.errors import OptionError


@dataclass(frozen=True, slots=True)
class Schedule:
    """Decisions every ``interval`` steps, each resting on the last ``window`` mini-batches.

    Steps are optimizer steps, counted from 1. A decision is taken after a step; none after the
    last one, where it could change nothing.

    Attributes:
        total_steps: Steps of the run.
        interval: Steps between decisions (τ).
        window: Mini-batches that a decision looks at, those of the last ``window`` steps.
        warmup: No decision up to and including this step.
        freeze_after: No decision after this step (``T_adapt``); None: none is frozen.

    Source:
        GARD, section 3.4.
    """

    total_steps: int
    interval: int
    window: int
    warmup: int = 0
    freeze_after: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("total_steps", 1), ("interval", 1), ("window", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be {least} or more.")

    @property
    def decisions(self) -> tuple[int, ...]:
        """Steps after which a decision is taken."""
        due = range(self.interval, self._last + 1, self.interval)
        return tuple(step for step in due if step > self.warmup)

    def decides(self, step: int) -> bool:
        """Tell whether a decision is taken after a step.

        Args:
            step: The step.

        Returns:
            Whether it is.
        """
        return self._first_from(step) == step

    def observes(self, step: int) -> bool:
        """Tell whether a step's mini-batch belongs to the window of some decision.

        Args:
            step: The step.

        Returns:
            Whether its gradients must be looked at.
        """
        decision = self._first_from(step)
        return decision is not None and decision - step < self.window

    def _first_from(self, step: int) -> int | None:
        """The first decision that is not before a step."""
        candidate = -(-max(step, self.warmup + 1) // self.interval) * self.interval
        return candidate if candidate <= self._last else None

    @property
    def _last(self) -> int:
        """The last step after which a decision may fall due."""
        last = self.total_steps - 1
        return last if self.freeze_after is None else min(last, self.freeze_after)

    def check(self, what: str) -> None:
        """Refuse a schedule in which nothing would ever be decided.

        Args:
            what: Who asks, for the message.

        Raises:
            OptionError: If there is no decision.
        """
        if not self.decisions:
            frozen = "" if self.freeze_after is None else f", freeze_after {self.freeze_after}"
            raise OptionError(
                f"{what} would never move any capacity: in {self.total_steps} steps no decision "
                f"falls due (interval {self.interval}, warmup {self.warmup}{frozen}; the last step "
                "is left alone). Lower interval or warmup, or train for more steps."
            )
