"""Neuron partitions within a budget: the weakest dominant rows give way. No torch."""

from collections.abc import Mapping, Sequence

import numpy as np

from gradrank.allocation.neurons import Bools, Floats, Ints
from gradrank.allocation.problem import check_names
from gradrank.core.errors import BudgetError
from gradrank.core.partition import NeuronPartition
from gradrank.core.targets import Target


def partition_of(dominant: Bools, rank: int, supplementary_rank: int) -> NeuronPartition:
    """Return the partition of a mask, without a loop over its rows.

    Args:
        dominant: Whether each row is dominant, ``[d_out]``.
        rank: Rank r of dominant rows.
        supplementary_rank: Rank r' of the others.

    Returns:
        The partition.
    """
    bits = int.from_bytes(np.packbits(dominant, bitorder="little").tobytes(), "little")
    return NeuronPartition(len(dominant), rank, supplementary_rank, bits)


def mask_of(partition: NeuronPartition) -> Bools:
    """Return which rows are dominant, without a loop over them.

    Args:
        partition: The partition.

    Returns:
        Whether each row is dominant, ``[d_out]``.
    """
    raw = partition.bits.to_bytes(-(-partition.d_out // 8), "little")
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), count=partition.d_out, bitorder="little")
    return bits.astype(np.bool_)


def trim(
    targets: Sequence[Target],
    partitions: Mapping[str, NeuronPartition],
    strength: Mapping[str, tuple[Floats, Floats]],
    budget: int,
) -> dict[str, NeuronPartition]:
    """Move the weakest dominant rows of all targets to the others until a budget pays for all.

    No more rows are moved than needed, in ascending order of strength. Of equally strong rows
    those of the target whose name comes first are moved first, and in a target the one with the
    smallest number: the outcome does not depend on the order of the targets. A target's last
    dominant row takes the ``r * d_in`` parameters of its group with it.

    Args:
        targets: The targets.
        partitions: Partition by target name, r' at most r.
        strength: What rows are compared by, by target name; see
            :meth:`gradrank.allocation.neurons.Rule.strength`.
        budget: Parameters that may be spent.

    Returns:
        Partition by target name, within the budget, in the order of ``targets``.

    Raises:
        BudgetError: If r' on all rows of all targets already costs more.
    """
    check_names(targets, partitions, "partition")
    check_names(targets, strength, "strength")
    ordered = sorted(targets, key=lambda target: target.name)
    spent = sum(partitions[target.name].parameters(target.d_in) for target in targets)
    if spent <= budget:
        return {target.name: partitions[target.name] for target in targets}
    check_floor(targets, {name: p.supplementary_rank for name, p in partitions.items()}, budget)
    masks = [mask_of(partitions[target.name]) for target in ordered]
    rows = [np.flatnonzero(mask) for mask in masks]
    owner = np.repeat(np.arange(len(ordered)), [len(found) for found in rows])
    row = np.concatenate(rows)
    keys = [
        np.concatenate([strength[t.name][k][found] for t, found in zip(ordered, rows, strict=True)])
        for k in (1, 0)
    ]
    # By name and row already, which a stable sort keeps.
    order = np.lexsort(keys)
    saved = np.cumsum(_savings(ordered, partitions, owner[order]))
    moved = order[: int(np.argmax(saved >= spent - budget)) + 1]
    for place in range(len(ordered)):
        masks[place][row[moved[owner[moved] == place]]] = False
    found = {
        target.name: partition_of(mask, old.rank, old.supplementary_rank)
        for target, mask in zip(ordered, masks, strict=True)
        for old in (partitions[target.name],)
    }
    return {target.name: found[target.name] for target in targets}


def _savings(
    targets: Sequence[Target], partitions: Mapping[str, NeuronPartition], owner: Ints
) -> Ints:
    """Return what moving each row saves, given whose rows are moved one after the other.

    A target that was all dominant first has to pay for the other group's A; the last dominant row
    gives back its own group's.
    """
    split = [partitions[target.name] for target in targets]
    d_in = np.array([target.d_in for target in targets], dtype=np.int64)
    d_out = np.array([target.d_out for target in targets], dtype=np.int64)
    upper = np.array([p.rank for p in split], dtype=np.int64)
    lower = np.array([p.supplementary_rank for p in split], dtype=np.int64)
    dominant = np.array([p.dominant_rows for p in split], dtype=np.int64)
    # How many dominant rows its target still has when a row is moved.
    by_owner = np.argsort(owner, kind="stable")
    start = np.cumsum(dominant) - dominant
    left = np.empty(len(owner), dtype=np.int64)
    left[by_owner] = np.repeat(dominant + start, dominant) - np.arange(len(owner))
    saved = (upper - lower)[owner]
    saved -= np.where(left == d_out[owner], (lower * d_in)[owner], 0)
    saved += np.where(left == 1, (upper * d_in)[owner], 0)
    return saved


def check_floor(targets: Sequence[Target], supplementary: Mapping[str, int], budget: int) -> None:
    """Refuse a budget that cannot pay for r' on every row.

    Args:
        targets: The targets.
        supplementary: Rank r' by target name.
        budget: Budget in parameters.

    Raises:
        BudgetError: If it cannot.
    """
    floor = sum(supplementary[target.name] * target.cost for target in targets)
    if budget < floor:
        raise BudgetError(
            f"budget {budget:,} is below the floor of {floor:,} parameters: supplementary rank "
            f"{max(supplementary.values(), default=0)} on all rows of {len(targets)} targets, "
            "with no dominant row at all. Raise the budget, or lower supplementary_rank (0: rows "
            "that are not dominant are left as they are)."
        )
