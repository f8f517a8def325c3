"""What a report knows of a run: cleaned texts and finite numbers, nothing else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gradrank.core.partition import NeuronPartition
from gradrank.record import RunRecord
from gradrank.report.history import History
from gradrank.report.neurons import Neurons
from gradrank.report.text import as_count

BASELINE = "uniform"


@dataclass(frozen=True, slots=True)
class Planned:
    """What a plan gives one target: rank, shape, parameters and the method's score.

    ``split`` tells which rows are dominant, if the target's rows do not all get the same;
    ``rank`` is then that of the stock LoRA which holds both groups.
    """

    rank: int
    d_in: int
    d_out: int
    score: float | None
    split: NeuronPartition | None = None

    @property
    def shaped(self) -> bool:
        """Whether the record tells the target's shape, so that its parameters are known."""
        return bool(self.d_in and self.d_out)

    @property
    def parameters(self) -> int:
        """Trainable parameters, recomputed and not trusted from the file."""
        if self.split is not None:
            return self.split.parameters(self.d_in)
        return self.rank * (self.d_in + self.d_out)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one target; empty or None where nothing was."""

    eigenvalues: tuple[float, ...] = ()
    singular_values: tuple[float, ...] = ()
    effective_rank: int | None = None
    entropy_rank: float | None = None
    stable_rank: float | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Measurement:
    """One measurement, possibly shared by several runs.

    Attributes:
        targets: What was measured, by target name.
        facts: ``batches``, ``examples``, ``tokens``, ``sketch_dim``, ``seconds``,
            ``peak_memory_bytes``; only those that are known.
        estimator: Name of the estimator, or "".
        alpha: Energy threshold of the effective rank, or None if unknown.
        runs: Labels of the runs that used it.
    """

    targets: Mapping[str, Measured]
    facts: Mapping[str, float] = field(default_factory=dict)
    estimator: str = ""
    alpha: float | None = None
    runs: tuple[str, ...] = ()

    @property
    def batches(self) -> int | None:
        """Number of mini-batches M, which bounds every effective rank."""
        told = as_count(self.facts.get("batches"))
        return told or max((len(m.eigenvalues) for m in self.targets.values()), default=0) or None


@dataclass(frozen=True)
class Run:
    """One record as the report sees it; every text in it is cleaned, every number finite.

    ``planned`` holds the final ranks and partitions where ``history`` or ``neurons`` tell them,
    else those of the plan.
    """

    label: str
    method: str
    kind: str
    status: str
    seed: int | None
    record: RunRecord
    planned: Mapping[str, Planned]
    budget: int | None
    provenance: Mapping[str, Any]
    reliability: Mapping[str, Any] | None
    measurement: Measurement | None
    train: tuple[tuple[float, float], ...]
    evals: tuple[tuple[float, float], ...]
    metrics: Mapping[str, float]
    cost: Mapping[str, float]
    history: History | None = None
    neurons: Neurons | None = None

    @property
    def finished(self) -> bool:
        """Whether the run ended as intended."""
        return self.status == "finished"

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by target name, zeros included."""
        return {name: planned.rank for name, planned in self.planned.items()}

    @property
    def splits(self) -> dict[str, NeuronPartition]:
        """Neuron partition by target name, of those targets that have one."""
        return {name: p.split for name, p in self.planned.items() if p.split is not None}

    @property
    def parameters(self) -> int | None:
        """Adapter parameters: of the ranks if shapes are known, else as the record tells them."""
        if self.shaped:
            return sum(planned.parameters for planned in self.planned.values())
        return as_count(self.record.trainable_parameters.get("final"))

    @property
    def peak(self) -> int | None:
        """Most adapter parameters in use at any time, as far as record or ranks tell."""
        told = as_count(self.record.trainable_parameters.get("peak"))
        seen = self.history.peak if self.history else None
        return max((p for p in (told, seen, self.parameters) if p is not None), default=None)

    @property
    def falls(self) -> bool:
        """Whether training began above the budget and came down to it."""
        if self.neurons is not None and self.budget is not None:
            return (self.peak or 0) > self.budget
        return self.history is not None and self.history.falls

    @property
    def shaped(self) -> bool:
        """Whether ranks are known, and the shape of every target that history added to them."""
        added = [*(self.history.targets if self.history else ()), *self.splits]
        return bool(self.planned) and all(
            self.planned[name].shaped for name in added if self.planned[name].rank
        )

    @property
    def slack(self) -> int | None:
        """Parameters of the budget that are left, or None without a budget."""
        if self.budget is None or self.parameters is None:
            return None
        return self.budget - self.parameters

    @property
    def final_loss(self) -> float | None:
        """Final evaluation loss in nats: the metric, else the end of the curve."""
        told = self.metrics.get("eval_loss")
        return told if told is not None else (self.evals[-1][1] if self.evals else None)

    @property
    def steps(self) -> int | None:
        """Training steps: taken, else the last one with a loss, else those asked for."""
        ends = [curve[-1][0] for curve in (self.train, self.evals) if curve]
        asked = as_count(self.record.config.get("steps")) if self.kind == "train" else None
        return as_count(self.cost.get("steps")) or (int(max(ends)) if ends else asked)

    @property
    def total_seconds(self) -> float | None:
        """Wall time of the whole run: measuring, training and evaluating, as far as known."""
        parts = [self.cost.get(f"{part}_seconds") for part in ("measure", "train", "eval")]
        known = [part for part in parts if part is not None]
        return sum(known) if known else None

    @property
    def end(self) -> int:
        """Where the history ends: the last step taken, or the last event if that is later."""
        events = self.history.events if self.history else ()
        return max([self.steps or 0, *(event.step for event in events[-1:])])

    def fact(self, *keys: str) -> Any:
        """Return the first known value among provenance and configuration.

        Args:
            *keys: Names to look under, in order of preference.

        Returns:
            The value, or None.
        """
        for source in (self.provenance, self.record.config):
            for key in keys:
                if source.get(key) not in (None, "", [], {}):
                    return source[key]
        return None


def final(runs: Iterable[Run]) -> bool:
    """Say whether ranks have a history, so that those shown of these runs are the final ones.

    Args:
        runs: The runs.

    Returns:
        Whether any of them has one.
    """
    return any(run.history is not None or run.neurons is not None for run in runs)
