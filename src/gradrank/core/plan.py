"""Plans: the outcome of an allocation, as immutable data that people can read, edit and replay."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradrank.core.budget import Budget
from gradrank.core.errors import PlanError
from gradrank.core.files import read_json, write_json
from gradrank.core.notebooks import notebook_html
from gradrank.core.partition import NeuronPartition
from gradrank.core.planned import (
    PlannedTarget,
    check_rank,
    target_from_dict,
    target_to_dict,
    whole,
)
from gradrank.core.targets import cost_of_rank_one

SCHEMA = "gradrank.plan/1"


@dataclass(frozen=True)
class Plan:
    """Budget, chosen capacity per target, and where they come from.

    Attributes:
        method: Name of the method.
        options: Its options, plain data.
        budget: The budget as the user gave it.
        budget_parameters: The budget in parameters; ``parameters`` never exceeds it.
        targets: What each target gets, in model order, rank 0 included.
        reliability: Split-half agreement of the scores and what follows from it; None for
            methods that measure nothing.
        provenance: How to repeat it: model, data, seeds, batches, versions.
    """

    method: str
    options: Mapping[str, Any]
    budget: Budget
    budget_parameters: int
    targets: tuple[PlannedTarget, ...]
    reliability: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [planned.target.name for planned in self.targets]
        if len(set(names)) != len(names):
            raise PlanError("a plan names one target twice.")
        for planned in self.targets:
            check_rank(planned)
        if self.parameters > self.budget_parameters:
            raise PlanError(
                f"the plan spends {self.parameters:,} parameters, more than its budget of "
                f"{self.budget_parameters:,}. Lower some ranks or raise budget.parameters."
            )

    @property
    def ranks(self) -> dict[str, int]:
        """Rank per target name, in model order, zeros included."""
        return {planned.target.name: planned.rank for planned in self.targets}

    @property
    def partitions(self) -> dict[str, NeuronPartition]:
        """Neuron partition per target name, of those targets that have one."""
        return {p.target.name: p.partition for p in self.targets if p.partition is not None}

    @property
    def scores(self) -> dict[str, float | None]:
        """Score per target name, in the method's unit."""
        return {planned.target.name: planned.score for planned in self.targets}

    @property
    def parameters(self) -> int:
        """Trainable adapter parameters of the whole plan."""
        return sum(planned.parameters for planned in self.targets)

    @property
    def slack(self) -> int:
        """Parameters of the budget that are left."""
        return self.budget_parameters - self.parameters

    @property
    def reference_rank(self) -> int:
        """Rank of the uniform LoRA that spends this budget (rounded, at least 1).

        The scale of every adapter is ``lora_alpha / reference_rank``, so that capacity is
        compared and not scale.
        """
        if self.budget.kind == "uniform":
            return int(self.budget.value)
        rank_one = cost_of_rank_one([planned.target for planned in self.targets])
        return max(1, round(self.budget_parameters / rank_one)) if rank_one else 1

    def diff(self, other: "Plan") -> dict[str, tuple[int, int]]:
        """Return the targets whose rank, or whose neuron partition, differs.

        Args:
            other: Plan to compare with; a target that one plan lacks counts as rank 0 there.

        Returns:
            ``{name: (rank here, rank in other)}``, in the order of this plan; the two are equal
            where only the partition differs.
        """
        mine, theirs = self.ranks, other.ranks
        split, other_split = self.partitions, other.partitions
        names = [*mine, *(name for name in theirs if name not in mine)]
        pairs = {name: (mine.get(name, 0), theirs.get(name, 0)) for name in names}
        return {
            name: pair
            for name, pair in pairs.items()
            if pair[0] != pair[1] or split.get(name) != other_split.get(name)
        }

    def lora_config(self, lora_alpha: float = 16, **options: Any) -> Any:
        """Return a stock ``peft.LoraConfig`` that builds exactly this plan.

        See :func:`gradrank.adapters.config.lora_config`, which does the work.

        Args:
            lora_alpha: Alpha at the reference rank; every target gets the scale
                ``lora_alpha / reference_rank`` unless ``scaling`` or ``policy`` say otherwise.
            **options: Passed on: ``scaling``, ``policy`` and any field of ``LoraConfig``.

        Returns:
            The configuration, for any trainer.
        """
        # A call upward in the house, resolved at run time so that plans stay plain data.
        return importlib.import_module("gradrank.adapters.config").lora_config(
            self, lora_alpha=lora_alpha, **options
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data in the schema ``gradrank.plan/1``."""
        return {
            "schema": SCHEMA,
            "method": {"name": self.method, "options": dict(self.options)},
            "budget": {
                "kind": self.budget.kind,
                "value": self.budget.value,
                "parameters": self.budget_parameters,
            },
            "parameters": self.parameters,
            "targets": {p.target.name: target_to_dict(p) for p in self.targets},
            "reliability": dict(self.reliability) if self.reliability is not None else None,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Plan":
        """Read a plan from plain data; ``parameters`` fields are recomputed, not trusted.

        Args:
            data: What :meth:`to_dict` returns, possibly edited by hand.

        Returns:
            The plan.

        Raises:
            PlanError: If a field is missing or wrong; the message names it.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise PlanError(
                f"this is no plan: expected schema '{SCHEMA}', found {found!r}. Give the plan.json "
                "that 'gradrank plan' or Plan.save wrote."
            )
        try:
            method, budget = data["method"], data["budget"]
            return cls(
                method=str(method["name"]),
                options=dict(method.get("options", {})),
                budget=_budget_from_dict(budget),
                budget_parameters=whole(budget["parameters"], "budget.parameters"),
                targets=tuple(target_from_dict(n, t) for n, t in data["targets"].items()),
                reliability=_object_or_none(data.get("reliability"), "reliability"),
                provenance=dict(data.get("provenance") or {}),
            )
        except PlanError:
            raise
        except KeyError as error:
            raise PlanError(f"the plan is malformed: field {error} is missing.") from error
        except (TypeError, AttributeError, ValueError, OverflowError) as error:
            raise PlanError(f"the plan is malformed: {error}") from error

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write ``plan.json``.

        Args:
            path: The file.
            overwrite: Whether an existing file may be replaced.
        """
        write_json(Path(path), self.to_dict(), overwrite)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read ``plan.json``.

        Args:
            path: The file.

        Returns:
            The plan.

        Raises:
            PlanError: If it is malformed; the message names file and field.
        """
        try:
            return cls.from_dict(read_json(Path(path), "plan"))
        except PlanError as error:
            raise PlanError(f"plan '{path}': {error}") from error

    def __str__(self) -> str:
        used = [planned.rank for planned in self.targets if planned.rank]
        spread = f"{min(used)}..{max(used)}" if used else "none"
        return (
            f"Plan({self.method}: {self.parameters:,} of {self.budget_parameters:,} parameters, "
            f"{len(used)} of {len(self.targets)} targets, ranks {spread})"
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return notebook_html("plan_html", self)


def _budget_from_dict(data: Mapping[str, Any]) -> Budget:
    kind, value = str(data["kind"]), data.get("value", data["parameters"])
    makers = {
        "parameters": Budget.parameters,
        "uniform": Budget.uniform,
        "fraction": Budget.fraction,
    }
    if kind not in makers:
        raise PlanError(f"budget kind {kind!r} is unknown. Known: {', '.join(sorted(makers))}.")
    return makers[kind](value)


def _object_or_none(value: Any, what: str) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise PlanError(f"{what} is a {type(value).__name__}; it must be an object or null.")
    return value
