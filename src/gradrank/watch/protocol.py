"""What looks at one run's gradients, whatever its course."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from gradrank.adapters.edits import Edit
from gradrank.methods.course import Decision


class Watch(Protocol):
    """What looks at one run's gradients; it keeps no time of its own."""

    @property
    def left_out(self) -> int:
        """Mini-batches that were left out, since their gradients were not finite."""
        ...

    def before_step(self, step: int) -> None:
        """Get ready for a step that begins."""
        ...

    def after_step(self, step: int) -> None:
        """Take in a step that ended."""
        ...

    def pause(self) -> None:
        """Leave the factors alone until the next :meth:`before_step`: they will be replaced."""
        ...

    def decide(self, ranks: Mapping[str, int], allowed: int) -> tuple[Decision, dict[str, Edit]]:
        """Return the decision that falls due, and the edits that carry it out in all processes."""
        ...

    def decided(self, decision: Decision) -> None:
        """The edits of a decision have been made."""
        ...

    def evidence(self, decision: Decision) -> dict[str, Any] | None:
        """Return what a decision rests on that a record shall keep, as plain data."""
        ...

    def close(self) -> None:
        """Remove all hooks; safe to call twice."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned."""
        ...
