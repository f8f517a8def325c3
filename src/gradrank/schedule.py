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


@dataclass(frozen=True, slots=True)
class Cubic:
    """A budget that falls from what training begins with to what is asked for.

    Up to ``warmup`` nothing is taken away, after ``total_steps - final`` nothing more. Between them
    the parameters in use fall with the cube of the time left. Steps are optimizer steps, counted
    from 1; a decision is taken after a step.

    Attributes:
        total_steps: Steps of the run.
        interval: Steps between decisions.
        warmup: Steps at the beginning with the full start.
        final: Steps at the end with the budget that was asked for, at least 1.
        score_every: Importance is looked at in every such step, until the last decision.

    Source:
        AdaLoRA, arXiv 2303.10512, section 3.3; IGU-LoRA uses the same curve.
    """

    total_steps: int
    interval: int
    warmup: int
    final: int
    score_every: int = 1

    def __post_init__(self) -> None:
        for name in ("total_steps", "interval", "final", "score_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.warmup < 0:
            raise OptionError(f"warmup is {self.warmup}; it must be 0 or more.")

    @property
    def last(self) -> int:
        """The step after which the last decision is taken: the budget that was asked for holds."""
        return self.total_steps - self.final

    @property
    def decisions(self) -> tuple[int, ...]:
        """Steps after which directions are taken away."""
        due = range(self.warmup + self.interval, self.last, self.interval)
        return (*due, self.last) if self.last > self.warmup else ()

    def decides(self, step: int) -> bool:
        """Tell whether a decision is taken after a step.

        Args:
            step: The step.

        Returns:
            Whether it is.
        """
        if not self.warmup < step <= self.last:
            return False
        return step == self.last or (step - self.warmup) % self.interval == 0

    def observes(self, step: int) -> bool:
        """Tell whether importance is looked at in a step.

        Args:
            step: The step.

        Returns:
            Whether it is.
        """
        return step <= self.last and step % self.score_every == 0

    def allowed(self, step: int, start: int, budget: int) -> int:
        """Return how many parameters may be in use after a step.

        Args:
            step: The step.
            start: Parameters in use at the beginning.
            budget: Parameters in the end.

        Returns:
            Parameters, rounded down.
        """
        if start <= budget or step >= self.last:
            return budget
        if step <= self.warmup:
            return start
        left, whole = self.last - step, self.last - self.warmup
        return budget + (start - budget) * left**3 // whole**3

    def check(self, what: str) -> None:
        """Refuse a schedule in which nothing would ever be decided, or by nothing.

        Args:
            what: Who asks, for the message.

        Raises:
            OptionError: If there is no decision, or no look at importance before the first one.
        """
        if not self.decisions:
            raise OptionError(
                f"{what} would never take any capacity away: of {self.total_steps} steps the first "
                f"{self.warmup} (warmup) and the last {self.final} (final) are left alone. Lower "
                "warmup or final, or train for more steps."
            )
        if self.score_every > self.decisions[0]:
            raise OptionError(
                f"{what} would decide after step {self.decisions[0]} without having looked at "
                f"anything: importance is measured every {self.score_every} steps (score_every). "
                "Lower score_every, or raise warmup or interval."
            )


@dataclass(frozen=True, slots=True)
class TwoStage:
    """Looks every ``interval`` steps of a first stage, and one decision at its end.

    Steps are optimizer steps, counted from 1: the first look is in step ``interval``.

    Attributes:
        total_steps: Steps of both stages together.
        initial_steps: Steps of the first stage; the decision is taken after the last of them.
        interval: Steps between looks (K).

    Source:
        PiLoRA, Algorithm 1, lines 5 to 7 and 14.
    """

    total_steps: int
    initial_steps: int
    interval: int

    def __post_init__(self) -> None:
        for name in ("total_steps", "initial_steps", "interval"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be 1 or more.")

    @property
    def decisions(self) -> tuple[int, ...]:
        """The step after which the second stage begins, if there is one."""
        return (self.initial_steps,) if self.initial_steps < self.total_steps else ()

    @property
    def looks(self) -> int:
        """Number of looks before the decision."""
        return self.initial_steps // self.interval

    def decides(self, step: int) -> bool:
        """Tell whether the second stage begins after a step.

        Args:
            step: The step.

        Returns:
            Whether it does.
        """
        return step in self.decisions

    def observes(self, step: int) -> bool:
        """Tell whether gradients are looked at in a step.

        Args:
            step: The step.

        Returns:
            Whether they are.
        """
        return step <= self.initial_steps and step % self.interval == 0

    def check(self, what: str) -> None:
        """Refuse stages of which one would be empty, or a decision that rests on nothing.

        Args:
            what: Who asks, for the message.

        Raises:
            OptionError: If there is no second stage, or no look in the first one.
        """
        if not self.decisions:
            raise OptionError(
                f"{what} would never reach its second stage: the first one takes "
                f"{self.initial_steps} of {self.total_steps} steps (initial_steps). Lower it, "
                f"and interval ({self.interval}) if it is to be lower than that, or train for more "
                "steps."
            )
        if not self.looks:
            raise OptionError(
                f"{what} would decide after step {self.initial_steps} without having looked at "
                f"anything: gradients are looked at every {self.interval} steps (interval). Lower "
                "interval, or raise initial_steps."
            )
