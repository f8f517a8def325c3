"""Sketches of recent mini-batches' gradients; ranks move up and down by them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradrank.adapters.edits import Edit, Grow, Shrink
from gradrank.core.targets import Target
from gradrank.methods.course import Decision, SpectrumCourse
from gradrank.signals.distributed import of_first_process
from gradrank.signals.layers import find_sites
from gradrank.signals.parts import under
from gradrank.signals.window import Window


class SpectrumWatch:
    """Sketches the gradients of recent mini-batches; ranks move up and down."""

    def __init__(
        self, model: nn.Module, course: SpectrumCourse, targets: tuple[Target, ...], seed: int
    ) -> None:
        self._course, self._targets = course, targets
        sites = find_sites(model, [target.name for target in targets])
        window: Any = course.schedule
        directions = course.grow == "gradient"
        self._window = Window(sites, course.signal, window.window, seed, directions)

    @property
    def left_out(self) -> int:
        """Mini-batches that were left out."""
        return self._window.dropped

    def before_step(self, step: int) -> None:
        """Install or remove hooks."""
        if self._course.schedule.observes(step):
            self._window.open()
        else:
            self._window.close()

    def after_step(self, step: int) -> None:
        """Close the step's mini-batch."""
        if self._window.is_open:
            self._window.end_step(step)

    def pause(self) -> None:
        """Nothing: its hooks are on modules, which stay."""

    def decide(self, ranks: Mapping[str, int], allowed: int) -> tuple[Decision, dict[str, Edit]]:
        """Return new ranks, and edits that shrink or grow to them."""
        decision = self._course.decide(ranks, self._window.measurement())
        names = [target.name for target in self._targets]
        agreed = of_first_process([decision.ranks[name] for name in names])
        growing = {name for name, rank in zip(names, agreed, strict=True) if rank > ranks[name]}
        sketches = self._window.directions(growing)
        edits = {
            name: self._edit(ranks[name], rank, sketches.get(name))
            for name, rank in zip(names, agreed, strict=True)
        }
        return decision, edits

    def _edit(self, now: int, rank: int, sketch: Tensor | None) -> Edit:
        return Grow(rank, sketch) if rank > now else Shrink(rank, self._course.shrink)

    def decided(self, decision: Decision) -> None:
        """Nothing: the window goes on."""

    def evidence(self, decision: Decision) -> None:
        """Nothing beside the decision."""

    def close(self) -> None:
        """Remove the hooks."""
        self._window.close()

    def state(self) -> dict[str, Tensor]:
        """Return the window."""
        return {f"window/{key}": value for key, value in self._window.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up the window."""
        self._window.restore(under(state, "window/"))
