"""What a Partition edit makes of one layer, worked out without touching it."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gradrank.adapters.edits import Drop, Edit, Grow, Partition, Select, Shrink
from gradrank.adapters.layer_forms import FORM_NAMES
from gradrank.adapters.swap import Incision
from gradrank.adapters.view import LoraSite
from gradrank.core.partition import NeuronPartition
from gradrank.ops.lowrank import fresh_rows, truncate
from gradrank.ops.moments import Carry
from gradrank.ops.sketch import seed_of


def plain_edit(site: LoraSite, edit: Edit) -> Edit:
    """Return the edit of ranks that a partition of one group amounts to.

    Args:
        site: The layer.
        edit: Any edit.

    Returns:
        The edit itself, unless it is a partition that leaves no adapter, or that is warm and gives
        all rows the same rank.
    """
    if not isinstance(edit, Partition) or not isinstance(edit.split, NeuronPartition):
        return edit
    rank = edit.split.lora_rank
    if not rank:
        return Select(()) if site.masked else Drop()
    if edit.split.is_split or edit.start == "restart":
        return edit
    return Shrink(rank) if rank < site.rank else Grow(rank)


def misfits(site: LoraSite, edit: Partition, beyond: bool) -> Iterator[str]:
    """Name every reason why a layer cannot be split that way.

    Args:
        site: The layer.
        edit: The edit.
        beyond: Whether a rank may be above ``min(d_in, d_out)``.

    Yields:
        Reasons.
    """
    split = edit.split
    if not isinstance(split, NeuronPartition):
        yield f"was given a partition {split!r}; make one with NeuronPartition.of(mask, r, r')"
        return
    if site.form in {"mask", "svd"}:
        yield (
            f"has {FORM_NAMES[site.form]}, whose rows cannot be split; call gradrank.settle(model) "
            "first, and under DDP gradrank.reserve with a method that splits neurons"
        )
    d_in, d_out = site.linear("A").in_features, site.linear("B").out_features
    if split.d_out != d_out:
        yield f"has {d_out} output rows, and its partition is of {split.d_out}"
    most = max(min(d_in, d_out), site.rank)
    if max(split.ranks) > most and not beyond:
        yield f"would get rank {max(split.ranks)} in one group, above min(d_in, d_out), {most}"
    room = site.raw("A").shape[0] if site.form == "partition-mask" else None
    if room is not None and split.lora_rank > room:
        yield (
            f"would get ranks {split.ranks[0]} and {split.ranks[1]}, together above the {room} "
            "that were reserved for it"
        )


def planned(site: LoraSite, edit: Partition, used: Mapping[str, Tensor], seed: int) -> Incision:
    """Work out the factors of a layer whose rows are split.

    Args:
        site: The layer, plain or with room for a partition.
        edit: The edit; :func:`plain_edit` returns it unchanged.
        used: The components in use, ``"A" [rank, d_in]`` and ``"B" [d_out, rank]``.
        seed: Seed of new rows of A.

    Returns:
        The incision, with B whole: ``[d_out, r + r']``, zero outside the blocks.
    """
    seed = seed_of(seed, "partition", site.name)
    if edit.start == "restart":
        return _restarted(site, edit.split, used, seed)
    return _warm(site, edit.split, used, seed)


def _restarted(
    site: LoraSite, split: NeuronPartition, used: Mapping[str, Tensor], seed: int
) -> Incision:
    """A as PEFT draws it, with a generator of its own, beside B = 0."""
    A, B, rank = used["A"], used["B"], split.lora_rank
    generator = torch.Generator().manual_seed(seed)
    bound = A.shape[1] ** -0.5
    rows = torch.empty(rank, A.shape[1], dtype=torch.float64)
    rows.uniform_(-bound, bound, generator=generator)
    values = {"A": rows.to(A), "B": B.new_zeros(B.shape[0], rank)}
    return Incision(site, rank, values, {}, split if split.is_split else None)


def _warm(
    site: LoraSite, split: NeuronPartition, used: Mapping[str, Tensor], seed: int
) -> Incision:
    """Both groups go on from the update that their rows have."""
    A, B, now = used["A"], used["B"], site.rank
    rank, rest = split.rank, split.supplementary_rank
    dominant = torch.tensor(split.mask, device=B.device)
    keeps = rank >= now
    upper = _group(A, B[dominant], rank, keeps, seed_of(seed, "dominant"))
    lower = _group(A, B[~dominant], rest, False, seed_of(seed, "supplementary"))
    whole = B.new_zeros(B.shape[0], rank + rest)
    whole[dominant, :rank] = upper[1]
    whole[~dominant, rank:] = lower[1]
    values = {"A": torch.cat([upper[0], lower[0]]), "B": whole}
    # Gradients of cut groups do not follow from those of the whole, so that their moments cannot.
    carry = Carry.select(range(now), fresh=rank + rest - now) if keeps else None
    carries = {} if carry is None else dict.fromkeys(values, carry)
    return Incision(site, rank + rest, values, carries, split)


def _group(A: Tensor, B: Tensor, rank: int, keeps: bool, seed: int) -> tuple[Tensor, Tensor]:
    """A ``[rank, d_in]`` and B ``[rows, rank]`` whose product is nearest to that of some rows."""
    if not keeps:
        found = min(rank, *A.shape)
        if found:
            cut = truncate(A, B, found)
            A, B = cut.A.to(A.dtype), cut.B.to(B.dtype)
        else:
            A, B = A[:0], B[:, :0]
    missing = rank - A.shape[0]
    if missing:
        A = torch.cat([A, fresh_rows(A, missing, seed).to(A.dtype)])
        B = torch.cat([B, B.new_zeros(B.shape[0], missing)], 1)
    return A, B
