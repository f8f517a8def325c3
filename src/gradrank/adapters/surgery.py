"""Surgery on live LoRA layers: ranks change for real, with the optimizer, all or nothing."""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradrank.adapters.directions import unit_rows
from gradrank.adapters.edits import Drop, Edit, Grow, Partition, Select
from gradrank.adapters.guard import check
from gradrank.adapters.optimizers import inner_optimizer
from gradrank.adapters.partitioning import plain_edit, planned
from gradrank.adapters.rollback import Rollback
from gradrank.adapters.stores import Store, agree, store_for
from gradrank.adapters.swap import AXIS, FixedShape, Incision, Replace
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

    Growth leaves the function as it is; shrinking and selecting keep what the edit says. The
    optimizer's moments follow: sliced or rotated with the components that stay, and for new
    components set so that their first step is no larger than the others'. PEFT's configuration is
    kept in step. Edits that shrink are made before those that grow. Gradients of edited factors
    are cleared, so call it after ``optimizer.step()``.

    Args:
        model: The PEFT model, possibly wrapped for several processes.
        edits: :class:`Shrink`, :class:`Grow`, :class:`Select`, :class:`Partition` or
            :class:`Drop` by target name.
        optimizer: The optimizer that holds the factors; None if there is none.
        adapter: Name of the adapter, if several are active.
        seed: Seed of random new rows.

    Returns:
        What was done.

    Raises:
        SurgeryError: If any edit is refused, with all reasons; or what went wrong on the way, in
            which case model and optimizer are as they were.

    Source:
        GARD, section 3.4; PiLoRA, section 3.3 (partitions).
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
    used = {name: site.parameters for name, site in sites.items()}
    after = {name: _rank_after(e) for name, e in edits.items()}
    edits = {name: plain_edit(sites[name], e) for name, e in edits.items()}
    wanted = {name: e for name, e in edits.items() if _changes(e, before[name])}
    reset = _operate(model, adapter, sites, wanted, optimizer, seed) if wanted else ()
    uses = {name: site.parameters for name, site in lora_sites(model, adapter).items()}
    return EditReport(
        {name: (before[name], rank) for name, rank in after.items()},
        (sum(used.values()), sum(uses.values())),
        sum(max(uses.get(name, 0) - used[name], 0) for name in edits),
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
    inner = None if optimizer is None else inner_optimizer(optimizer)
    with Rollback() as rollback:
        rollback.remember_config(model, adapter)
        reset = operate(rollback, model, sites, edits, inner, seed)
        sync_config(model, adapter)
        if any(isinstance(e, Drop) for e in edits.values()):
            name_targets(model, adapter)
    return reset


def operate(
    rollback: Rollback,
    model: nn.Module,
    sites: Mapping[str, LoraSite],
    edits: Mapping[str, Edit],
    optimizer: Any,
    seed: int,
) -> tuple[str, ...]:
    """Change layers and optimizer, and leave PEFT's configuration to the caller.

    Args:
        rollback: Takes it all back if something fails, here or later in the caller.
        model: The PEFT model.
        sites: Live LoRA layers.
        edits: Edits that are known to be possible and to change something.
        optimizer: The optimizer inside accelerate's wrapper, or None.
        seed: Seed of random new rows.

    Returns:
        The targets whose optimizer state was reset.
    """
    ordered = sorted(edits, key=lambda name: isinstance(edits[name], Grow))
    store = store_for(optimizer)
    incisions = [_plan(sites[name], edits[name], seed, store) for name in ordered]
    agree(incisions)
    replace, fixed = Replace(rollback, model, optimizer), FixedShape(rollback, store)
    reset: list[str] = []
    for incision in incisions:
        known = (fixed if incision.site.masked else replace).apply(incision)
        reset += [] if known else [incision.site.name]
    return tuple(reset)


def parameters_in_use(sites: Mapping[str, LoraSite]) -> int:
    """Return the adapter parameters in use; masked components are not.

    Args:
        sites: Live LoRA layers.

    Returns:
        The number of parameters: lam, which a stock adapter folds into B, is not counted, and the
        zeros that it stores for a neuron partition are not.
    """
    return sum(site.parameters for site in sites.values())


def _rank_after(edit: Edit) -> int:
    if isinstance(edit, Drop):
        return 0
    if isinstance(edit, Partition):
        return edit.split.lora_rank
    return len(edit.components) if isinstance(edit, Select) else edit.rank


def _changes(edit: Edit, rank: int) -> bool:
    if isinstance(edit, Drop | Partition):
        return True  # a target that is switched off too
    if isinstance(edit, Select):
        return edit.components != tuple(range(rank))
    return edit.rank != rank


def _plan(site: LoraSite, edit: Edit, seed: int, store: Store) -> Incision:
    """Work out new factors without touching the layer."""
    if isinstance(edit, Drop):
        return Incision(site, 0)
    rank = site.rank
    used = {f: store.read(raw).narrow(AXIS[f], 0, rank) for f, raw in site.learned().items()}
    if isinstance(edit, Partition):
        return planned(site, edit, used, seed)
    seed = seed_of(seed, "grow", site.name)
    if isinstance(edit, Grow):
        carry = Carry.select(range(rank), fresh=edit.rank - rank)
        return _grown(Incision(site, rank, used, dict.fromkeys(used, carry)), edit, seed)
    A, B = used["A"], used["B"]
    if isinstance(edit, Select):
        return _selected(site, used, edit.components)
    if edit.by == "norm":
        return _selected(
            site, used, strongest(A, B * used["lam"] if "lam" in used else B, edit.rank)
        )
    found = min(edit.rank, A.shape[1])  # a rank above d_in has rows to spare
    cut = truncate(A, B, found)
    factors = {"A": cut.A.to(A.dtype), "B": cut.B.to(B.dtype)}
    fresh = edit.rank - found
    carries = {"A": Carry.rotate(cut.to_a, fresh), "B": Carry.rotate(cut.to_b, fresh)}
    return _grown(Incision(site, found, factors, carries), Grow(edit.rank), seed)


def _selected(site: LoraSite, used: Mapping[str, Tensor], kept: tuple[int, ...]) -> Incision:
    """Keep the named components as they are."""
    index = torch.tensor(kept, dtype=torch.long, device=used["A"].device)
    values = {factor: value.index_select(AXIS[factor], index) for factor, value in used.items()}
    carries = dict.fromkeys(values, Carry.select(kept)) if kept else {}
    return Incision(site, len(kept), values, carries)


def _grown(incision: Incision, edit: Grow, seed: int) -> Incision:
    """Append rows to A beside zeros in B, or in the SVD form to Q and P beside zeros in lam."""
    values = dict(incision.values)
    A, B = values["A"], values["B"]
    count = edit.rank - incision.rank
    if not count:
        return incision
    if "lam" in values:
        rows = unit_rows(A, count, seed, edit.sketch)
        columns = unit_rows(B.T, count, seed_of(seed, "P")).T
        values["lam"] = torch.cat([values["lam"], values["lam"].new_zeros(count)])
    else:
        rows = fresh_rows(A, count, seed, edit.sketch)
        columns = B.new_zeros(B.shape[0], count)
    values["A"] = torch.cat([A, rows.to(A.dtype)])
    values["B"] = torch.cat([B, columns.to(B.dtype)], 1)
    return dataclasses.replace(incision, rank=edit.rank, values=values)
