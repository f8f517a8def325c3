"""What a dynamic method is in one run: a course that looks, decides and remembers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from gradrank.core.partition import NeuronPartition
from gradrank.core.targets import Target
from gradrank.methods.method import Method
from gradrank.schedule import Cubic, Schedule, TwoStage
from gradrank.signals.measure import Spectrum
from gradrank.signals.measurement import Measurement
from gradrank.signals.sensitivity import Observation, Sensitivity


@dataclass(frozen=True)
class Decision:
    """What a dynamic method decided after a step.

    Attributes:
        ranks: Rank per target, zeros included, within the budget.
        details: Columns for the record, per target and by name (``effective_rank``,
            ``smoothed``, ``energy``, ``importance``).
        facts: Single numbers for the record, by name (``gap``).
        keep: For methods that choose directions: which of those present stay, per target.
        partitions: For methods that choose neurons: how each target's rows are split.
    """

    ranks: Mapping[str, int]
    details: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    keep: Mapping[str, tuple[int, ...]] | None = None
    partitions: Mapping[str, NeuronPartition] | None = None


class Course(Protocol):
    """A dynamic method in one run.

    Attributes:
        schedule: When gradients are looked at and decisions fall due.
        ceilings: Largest rank that each target may ever get, by name; what fixed-shape training
            must reserve.
    """

    @property
    def schedule(self) -> Schedule | Cubic | TwoStage: ...  # noqa: D102
    @property
    def ceilings(self) -> Mapping[str, int]: ...  # noqa: D102

    def allowed(self, step: int, start: int) -> int:
        """Return how many parameters may be in use after a step of a run that began with some."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return everything that later decisions rest on."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned."""
        ...


@runtime_checkable
class SpectrumCourse(Course, Protocol):
    """A course that moves ranks up and down by the spectrum of recent gradients.

    Attributes:
        signal: What is measured of every observed mini-batch.
        shrink: How ranks shrink: ``svd`` or ``norm``.
        grow: Where ranks grow: ``random`` or ``gradient``.
    """

    @property
    def signal(self) -> Spectrum: ...  # noqa: D102
    @property
    def shrink(self) -> str: ...  # noqa: D102
    @property
    def grow(self) -> str: ...  # noqa: D102

    def decide(self, ranks: Mapping[str, int], measurement: Measurement) -> Decision:
        """Return new ranks, given those in use and the measurement of the window."""
        ...


@runtime_checkable
class DirectionCourse(Course, Protocol):
    """A course of directions in SVD form: some are taken away, and an elastic one adds others.

    Attributes:
        sensitivity: Which gradients of the adapter's elements it goes by.
        orthogonality: Weight of the penalty that keeps P and Q orthonormal; 0: none.
        whole_penalty: Whether the penalty holds the lengths of the directions to 1 too.
        restarts: Whether what is left begins afresh after the last decision.
        init: What P, λ and Q begin with: ``svd`` or ``keep``.
        elastic: Whether it begins within the budget and gives directions too: what a decision's
            rank has above the directions that stay is new. A target that loses some gets none.
    """

    @property
    def sensitivity(self) -> Sensitivity: ...  # noqa: D102
    @property
    def orthogonality(self) -> float: ...  # noqa: D102
    @property
    def whole_penalty(self) -> bool: ...  # noqa: D102
    @property
    def restarts(self) -> bool: ...  # noqa: D102
    @property
    def init(self) -> str: ...  # noqa: D102
    @property
    def elastic(self) -> bool: ...  # noqa: D102

    def take(self, observation: Observation) -> None:
        """Take in one look at the gradients."""
        ...

    def choose(self, allowed: int, lam: Mapping[str, Tensor]) -> Decision:
        """Return which directions stay within some parameters, given λ ``[r]`` of each target."""
        ...

    def follow(self, keep: Mapping[str, tuple[int, ...]]) -> None:
        """Forget the directions that were taken away."""
        ...


@runtime_checkable
class NeuronCourse(Course, Protocol):
    """A course of two stages: it counts which output neurons matter, then splits each target.

    Attributes:
        ceilings: Rank of every target in the first stage, by name.
        supplementary: Rank r' of rows that are not dominant, by name of the target.
        start: What the second stage begins with: ``restart`` or ``warm``.
        hits: How often each neuron was important, ``[d_out]`` int64, by target.
        looks: How many looks counted, by target.
    """

    @property
    def supplementary(self) -> Mapping[str, int]: ...  # noqa: D102
    @property
    def start(self) -> str: ...  # noqa: D102
    @property
    def hits(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def looks(self) -> Mapping[str, int]: ...  # noqa: D102

    def look(self, importance: Mapping[str, Tensor]) -> None:
        """Take in one look: ``S_i`` per output neuron, ``[d_out]`` float32, by target."""
        ...

    def split(self, allowed: int) -> Decision:
        """Return how the rows of each target are split, within some parameters."""
        ...


@runtime_checkable
class DynamicMethod(Method, Protocol):
    """A method that goes on moving capacity while the model trains.

    :meth:`Method.ranks` gives the ranks to begin with.
    """

    def course(self, targets: Sequence[Target], budget: int, total_steps: int) -> Course:
        """Return the course of one run within ``budget`` parameters."""
        ...
