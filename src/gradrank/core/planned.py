"""One target of a plan: what it gets, whether it can have that, and its line in a plan's file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradrank.core.errors import PlanError
from gradrank.core.partition import Capacity, NeuronPartition
from gradrank.core.targets import Target

_RESERVED = frozenset({"rank", "partition", "d_in", "d_out", "kind", "parameters", "score"})


@dataclass(frozen=True, slots=True)
class PlannedTarget:
    """What one target gets.

    Attributes:
        target: The module.
        rank: Its LoRA rank; 0 means that the target carries no adapter. Of a neuron partition
            ``r + r'``, the rank of the stock LoRA that holds it.
        score: The method's score, in the method's unit; None for methods without one.
        details: Further columns of the method (effective rank, saturation, ...), plain data.
        partition: How the output rows are split into two groups; None: they all have ``rank``.
    """

    target: Target
    rank: int
    score: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    partition: NeuronPartition | None = None

    @classmethod
    def of(
        cls,
        target: Target,
        capacity: Capacity,
        score: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> "PlannedTarget":
        """Return what a capacity makes of a target; a partition of one group is a plain rank.

        Args:
            target: The module.
            capacity: A rank, or a neuron partition.
            score: The method's score.
            details: Further columns.

        Returns:
            The planned target.
        """
        known = dict(details or {})
        if isinstance(capacity, int):
            return cls(target, capacity, score, known)
        split = capacity if capacity.is_split else None
        return cls(target, capacity.lora_rank, score, known, split)

    @property
    def parameters(self) -> int:
        """Trainable parameters, ``rank * (d_in + d_out)`` or those of the partition."""
        if self.partition is not None:
            return self.partition.parameters(self.target.d_in)
        return self.rank * self.target.cost


def check_rank(planned: PlannedTarget) -> None:
    """Refuse a rank or a partition that its target cannot have.

    Args:
        planned: What a target gets.

    Raises:
        PlanError: If the rank is no whole number, is above ``min(d_in, d_out)``, or does not fit
            the partition.
    """
    name, rank = planned.target.name, planned.rank
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise PlanError(f"target '{name}' has rank {rank!r}; a rank is a whole number, 0 or more.")
    if planned.partition is not None:
        _check_partition(planned, planned.partition)
    elif rank > planned.target.max_rank:
        raise PlanError(
            f"target '{name}' has rank {rank}, above min(d_in, d_out) = "
            f"{planned.target.max_rank}; more adds parameters but no directions."
        )


def _check_partition(planned: PlannedTarget, partition: NeuronPartition) -> None:
    target = planned.target
    if partition.d_out != target.d_out or not partition.is_split:
        raise PlanError(
            f"target '{target.name}' has {target.d_out} output rows, and its partition splits "
            f"{partition.dominant_rows} of {partition.d_out} off. A partition has as many rows as "
            "the target and two groups; otherwise give a rank alone."
        )
    if planned.rank != partition.lora_rank:
        raise PlanError(
            f"target '{target.name}' has rank {planned.rank}, but its partition needs "
            f"{partition.lora_rank} (r = {partition.rank}, r' = {partition.supplementary_rank})."
        )
    if max(partition.rank, partition.supplementary_rank) > target.max_rank:
        raise PlanError(
            f"target '{target.name}' has a partition with ranks {partition.rank} and "
            f"{partition.supplementary_rank}, above min(d_in, d_out) = {target.max_rank}; more "
            "adds parameters but no directions."
        )


def target_to_dict(planned: PlannedTarget) -> dict[str, Any]:
    """Return a target's line in the schema ``gradrank.plan/1``.

    Args:
        planned: What a target gets.

    Returns:
        Plain data without the name, which is the line's key.
    """
    split = {"partition": planned.partition.to_dict()} if planned.partition is not None else {}
    return {
        "rank": planned.rank,
        **split,
        "d_in": planned.target.d_in,
        "d_out": planned.target.d_out,
        "kind": planned.target.kind,
        "parameters": planned.parameters,
        "score": planned.score,
        **{key: value for key, value in planned.details.items() if key not in _RESERVED},
    }


def target_from_dict(name: str, data: Mapping[str, Any]) -> PlannedTarget:
    """Read a target's line; its ``parameters`` are recomputed, not trusted.

    Args:
        name: The target's name.
        data: What :func:`target_to_dict` returns, possibly edited by hand.

    Returns:
        What the target gets.

    Raises:
        PlanError: If a value is wrong; a missing field is a ``KeyError``.
    """
    d_in = whole(data["d_in"], f"targets.{name}.d_in")
    d_out = whole(data["d_out"], f"targets.{name}.d_out")
    if d_in < 1 or d_out < 1:
        raise PlanError(f"target '{name}' has the impossible shape {d_out} x {d_in}.")
    score, split = data.get("score"), data.get("partition")
    if score is not None and (isinstance(score, bool) or not math.isfinite(float(score))):
        raise PlanError(f"target '{name}' has the score {score!r}, which is no finite number.")
    return PlannedTarget(
        target=Target(str(name), d_in, d_out, str(data.get("kind", "linear"))),
        rank=whole(data["rank"], f"targets.{name}.rank"),
        score=None if score is None else float(score),
        details={key: value for key, value in data.items() if key not in _RESERVED},
        partition=None if split is None else NeuronPartition.from_dict(split),
    )


def whole(value: Any, what: str) -> int:
    """Return a whole number of a plan's file.

    Args:
        value: What the file holds.
        what: Its name there.

    Returns:
        The number.

    Raises:
        PlanError: If it is anything else, true and false included.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"{what} is {value!r}; it must be a whole number.")
    return value
