"""What a comparison found, as immutable data: what the report draws and the tables print."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gradrank.core.notebooks import notebook_html

Verdict = Literal["better", "worse", "no evidence", "not tested"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished run of the reported phase.

    Attributes:
        run_id: Name of the run.
        task: Task.
        method: Label of the arm.
        budget: Budget as in the recipe.
        seed: Seed of the run; runs of one seed are paired.
        lr: Learning rate; None where none was recorded.
        value: The metric that counts, on all items, in its own unit.
        items: The record's ``items``.
        peak: Most adapter parameters in use at a time.
        final: Adapter parameters at the end.
        other: Further trainable parameters (a task head).
        train_seconds: Wall time of training; None where unknown, as below.
        calibration_seconds: Wall time of what an arm does before training (measuring,
            allocating, initial values).
        peak_memory_bytes: Most memory in use while training.
        ranks: Rank per target at the end.
        matched: Whether the arm is held to the budget.
        notes: What a reader of the result must know.
        setting: What should be the same for all runs that are compared: steps, batch size, device
            and dtype, as far as the record says.
    """

    run_id: str
    task: str
    method: str
    budget: str
    seed: int
    lr: float | None
    value: float
    items: Mapping[str, Any] = field(repr=False)
    peak: int
    final: int
    other: int
    train_seconds: float | None = None
    calibration_seconds: float | None = None
    peak_memory_bytes: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    matched: bool = True
    notes: tuple[str, ...] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one budget on one task.

    Attributes:
        task: Task.
        budget: Budget as in the recipe.
        method: Label of the arm.
        outcomes: Finished runs, by seed.
        failed: Runs that failed or diverged.
        missing: Seeds that other arms of this task and budget have and this one lacks (no run,
            not even a failed one).
        mean: Mean of the metric over seeds; None without a finished run.
        sd: Standard deviation over seeds (n - 1); None with fewer than two.
        low: Lower end of the 95 % interval of the mean over new seeds and new items; None with
            fewer than two seeds.
        high: Upper end.
        lr: Learning rate of all its runs; None if unknown or if they differ.
        matched: Whether the arm is held to the budget.
        notes: What a reader of the cell must know, failures and missing seeds included.
    """

    task: str
    budget: str
    method: str
    outcomes: tuple[Outcome, ...]
    failed: int
    missing: tuple[int, ...]
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    lr: float | None
    matched: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Contrast:
    """One method against the reference, in the same task and budget, paired by seed and item.

    Attributes:
        task: Task.
        budget: Budget as in the recipe.
        method: Label of the arm.
        reference: Label of the reference.
        seeds: Seeds that both have.
        difference: Mean difference in the metric's unit, positive where the method is better;
            None without a pair of runs.
        low: Lower end of its 95 % interval over new seeds and new items; None if not tested.
        high: Upper end.
        p: Two-sided p-value that belongs to the interval; None if not tested.
        p_corrected: The same after Holm's correction over all tested contrasts.
        verdict: ``better`` or ``worse`` where ``p_corrected`` is below 0.05 and the interval
            excludes 0, else ``no evidence``; ``not tested`` where no test is possible or fair.
        notes: Why it was not tested, or what speaks against taking it at face value.
        lost: Seeds on which the method's run failed and the reference's finished, and the other
            way round. With the first it is never called better, with the second never worse.
    """

    task: str
    budget: str
    method: str
    reference: str
    seeds: tuple[int, ...]
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_corrected: float | None
    verdict: Verdict
    notes: tuple[str, ...] = ()
    lost: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Pooled:
    """One method against the reference over all tasks of a budget.

    Attributes:
        budget: Budget as in the recipe.
        method: Label of the arm.
        reference: Label of the reference.
        tasks: Tasks that went in.
        difference: Mean over tasks of the differences, each divided by its task's standard
            deviation over seeds; positive where the method is better; None if not tested.
        low: Lower end of its 95 % interval over new seeds and new items of these tasks.
        high: Upper end.
        p: Two-sided p-value that belongs to the interval.
        p_corrected: The same after Holm's correction over all pooled contrasts.
        verdict: As in a contrast.
        notes: Why it was not tested.
        lost: As in a contrast, over all tasks.
    """

    budget: str
    method: str
    reference: str
    tasks: tuple[str, ...]
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_corrected: float | None
    verdict: Verdict
    notes: tuple[str, ...] = ()
    lost: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Tuned:
    """One run of the search for a learning rate.

    Attributes:
        task: Task.
        budget: Budget as in the recipe.
        method: Label of the arm.
        lr: Learning rate.
        seed: Seed.
        value: The metric that counts, on the validation split; None if the run diverged or failed.
    """

    task: str
    budget: str
    method: str
    lr: float
    seed: int
    value: float | None


@dataclass(frozen=True, slots=True)
class Stability:
    """How far plans of different calibration seeds agree.

    Attributes:
        task: Task.
        budget: Budget as in the recipe.
        method: Label of the arm.
        pairs: Pairs of plans.
        mean: Mean over pairs of Spearman's correlation of the ranks; a pair of which only one plan
            tells targets apart has none and counts as 0. None where nobody looked.
        low: Lowest of the pairs.
        high: Highest of the pairs.
        share: Mean over pairs of the share that the two plans have in common: of parameters where
            both records hold the plan, else of ranks; None where undefined.
    """

    task: str
    budget: str
    method: str
    pairs: int
    mean: float | None
    low: float | None
    high: float | None
    share: float | None


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What counts in a task.

    Attributes:
        metric: The metric's name.
        higher_is_better: Its direction.
        describe: What it is, in a sentence.
        items: Items of the reported split; 0 where nothing finished.
    """

    metric: str
    higher_is_better: bool
    describe: str
    items: int = 0


@dataclass(frozen=True, slots=True)
class BudgetInfo:
    """What a budget is on each task.

    Attributes:
        text: As in the recipe.
        parameters: Per task the adapter parameters of the reference at the end; where the
            reference did not finish, those that the plans were allowed.
    """

    text: str
    parameters: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that failed or diverged.

    Attributes:
        run_id: Name of the run.
        message: What happened.
    """

    run_id: str
    message: str


@dataclass(frozen=True, slots=True)
class Excluded:
    """A record that went into nothing.

    Attributes:
        name: Name of the run or of the file.
        reason: Why.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Everything that the records of one comparison say.

    Attributes:
        name: Name of the recipe.
        about: What it asks.
        source: Paper and table or figure.
        reference: Label of the arm that the others are compared with.
        tasks: What counts, per task.
        budgets: Budgets, smallest first.
        methods: Labels of the arms: the reference, the others that are held to the budget, and
            those that are not.
        cells: By task, budget and method, in the orders above.
        contrasts: The same, without the reference.
        pooled: By budget and method; empty with fewer than two tasks.
        tuned: Runs of the search for learning rates.
        stability: Agreement of plans.
        failures: Runs that failed, of all phases.
        excluded: Records that went into nothing.
    """

    name: str
    about: str
    source: str
    reference: str
    tasks: Mapping[str, TaskInfo]
    budgets: tuple[BudgetInfo, ...]
    methods: tuple[str, ...]
    cells: tuple[Cell, ...]
    contrasts: tuple[Contrast, ...]
    pooled: tuple[Pooled, ...]
    tuned: tuple[Tuned, ...]
    stability: tuple[Stability, ...]
    failures: tuple[Failure, ...]
    excluded: tuple[Excluded, ...]

    def __repr__(self) -> str:
        return (
            f"Comparison({self.name}: {len(self.methods)} methods, {len(self.tasks)} tasks, "
            f"{len(self.budgets)} budgets, {len(self.contrasts)} contrasts)"
        )

    def _repr_html_(self) -> str:
        return notebook_html("comparison_html", self)
