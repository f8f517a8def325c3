"""Surgery on live LoRA layers: ranks change for real, with the optimizer, all or nothing."""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradrank.adapters.edits import Drop, Edit, Grow
from gradrank.adapters.guard import check
from gradrank.adapters.optimizers import inner_optimizer
from gradrank.adapters.stores import Store, agree, store_for
from gradrank.adapters.swap import FixedShape, Incision, Replace, Rollback
from gradrank.adapters.view import (
    LoraSite,
    adapter_name,
    lora_sites,
    name_targets,
    sync_config,
    unsupported,
)
from gradrank.ops.lowrank import fresh_rows, strongest, truncate
from gradrank.ops.moments import Carry
from gradrank.ops.sketch import seed_of


@dataclass(frozen=True, slots=True)
class EditReport:
    """What surgery did.

    Attributes:
        ranks: Per edited target its rank before and after.
        parameters: Adapter parameters in use before and after, of the whole model.
        moved: Parameters given to targets that grew.
        reset: Targets whose optimizer state could not be carried and starts afresh.
    """

    ranks: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]
    moved: int
    reset: tuple[str, ...] = ()


def edit(
    model: nn.Module,
    edits: Mapping[str, Edit],
    optimizer: Any = None,
    *,
    adapter: str | None = None,
    seed: int = 0,
) -> EditReport:
    """Change the ranks of live LoRA layers, together with their optimizer's state.

    Growth leaves the function as it is; shrinking keeps what the edit says. The optimizer's
    moments follow: sliced or rotated with the components that stay, and for new components set
    so that their first step is no larger than the others'. PEFT's configuration is kept in step.
    Edits that shrink are made before those that grow. Gradients of edited factors are cleared, so
    call it after ``optimizer.step()``.

    Args:
        model: The PEFT model, possibly wrapped for several processes.
        edits: :class:`Shrink`, :class:`Grow` or :class:`Drop` by target name.
        optimizer: The optimizer that holds the factors; None if there is none.
        adapter: Name of the adapter, if several are active.
        seed: Seed of random new rows.

    Returns:
        What was done.

    Raises:
        SurgeryError: If any edit is refused, with all reasons; or what went wrong on the way, in
            which case model and optimizer are as they were.

    Source:
        GARD, section 3.4.
    """
    adapter = adapter_name(model, adapter)
    sites = lora_sites(model, adapter)
    check(sites, edits, optimizer, unsupported(model, adapter), model)
    report = make_edits(model, adapter, edits, optimizer, seed)
    if report.reset:
        warnings.warn(
            f"the optimizer state of {len(report.reset)} target(s) ('{report.reset[0]}', ...) has "
            f"a layout that gradrank does not know ({type(optimizer).__name__}); it starts afresh "
            "there.",
            RuntimeWarning,
            stacklevel=2,
        )
    return report


@torch.no_grad()
def make_edits(
    model: nn.Module, adapter: str, edits: Mapping[str, Edit], optimizer: Any, seed: int = 0
) -> EditReport:
    """Make edits that the guard has let through; see :func:`edit`.

    Args:
        model: The PEFT model.
        adapter: Name of the adapter.
        edits: Edits by target name.
        optimizer: The optimizer, or None.
        seed: Seed of random new rows.

    Returns:
        What was done.
    """
    sites = lora_sites(model, adapter)
    before = {name: site.rank for name, site in sites.items()}
    used = parameters_in_use(sites)
    after = {name: 0 if isinstance(e, Drop) else e.rank for name, e in edits.items()}
    wanted = {name: e for name, e in edits.items() if after[name] != before[name]}
    reset = _operate(model, adapter, sites, wanted, optimizer, seed) if wanted else ()
    grown = {name: max(rank - before[name], 0) for name, rank in after.items()}
    return EditReport(
        {name: (before[name], rank) for name, rank in after.items()},
        (used, parameters_in_use(lora_sites(model, adapter))),
        sum(rank * _cost(sites[name]) for name, rank in grown.items() if rank),
        reset,
    )


def _operate(
    model: nn.Module,
    adapter: str,
    sites: Mapping[str, LoraSite],
    edits: Mapping[str, Edit],
    optimizer: Any,
    seed: int,
) -> tuple[str, ...]:
    """Make edits that are known to be possible; the targets whose state was reset."""
    ordered = sorted(edits, key=lambda name: isinstance(edits[name], Grow))
    inner = None if optimizer is None else inner_optimizer(optimizer)
    reset: list[str] = []
    with Rollback() as rollback:
        rollback.remember_config(model, adapter)
        store = store_for(inner)
        incisions = [_plan(sites[name], edits[name], seed, store) for name in ordered]
        agree(incisions)
        replace, fixed = Replace(rollback, model, inner), FixedShape(rollback, store)
        for incision in incisions:
            known = (fixed if incision.site.masked else replace).apply(incision)
            reset += [] if known else [incision.site.name]
        sync_config(model, adapter)
        if any(isinstance(e, Drop) for e in edits.values()):
            name_targets(model, adapter)
    return tuple(reset)


def parameters_in_use(sites: Mapping[str, LoraSite]) -> int:
    """Return the adapter parameters in use; masked components are not.

    Args:
        sites: Live LoRA layers.

    Returns:
        The number of parameters.
    """
    return sum(site.rank * _cost(site) for site in sites.values())


def _cost(site: LoraSite) -> int:
    return int(site.raw("A").shape[1] + site.raw("B").shape[0])


def _plan(site: LoraSite, edit: Edit, seed: int, store: Store) -> Incision:
    """Work out new factors without touching the layer."""
    if isinstance(edit, Drop):
        return Incision(site, 0)
    rank = site.rank
    A, B = store.read(site.raw("A"))[:rank], store.read(site.raw("B"))[:, :rank]
    seed = seed_of(seed, "grow", site.name)
    if isinstance(edit, Grow):
        carry = Carry.select(range(rank), fresh=edit.rank - rank)
        return _grown(Incision(site, rank, {"A": A, "B": B}, {"A": carry, "B": carry}), edit, seed)
    if edit.by == "norm":
        kept = strongest(A, B, edit.rank)
        carry = Carry.select(kept)
        index = torch.tensor(kept, device=A.device)
        kept_factors = {"A": A.index_select(0, index), "B": B.index_select(1, index)}
        return Incision(site, edit.rank, kept_factors, {"A": carry, "B": carry})
    found = min(edit.rank, A.shape[1])  # a rank above d_in has rows to spare
    cut = truncate(A, B, found)
    factors = {"A": cut.A.to(A.dtype), "B": cut.B.to(B.dtype)}
    fresh = edit.rank - found
    carries = {"A": Carry.rotate(cut.to_a, fresh), "B": Carry.rotate(cut.to_b, fresh)}
    return _grown(Incision(site, found, factors, carries), Grow(edit.rank), seed)


def _grown(incision: Incision, edit: Grow, seed: int) -> Incision:
    """Append new rows to A and zeros to B, if there are fewer components than wanted."""
    A, B = incision.values["A"], incision.values["B"]
    count = edit.rank - incision.rank
    if not count:
        return incision
    rows = fresh_rows(A, count, seed, edit.sketch).to(A.dtype)
    columns = B.new_zeros(B.shape[0], count)
    values = {"A": torch.cat([A, rows]), "B": torch.cat([B, columns], 1)}
    return dataclasses.replace(incision, rank=edit.rank, values=values)
