"""Forms before a model is wrapped, real ranks afterwards, and other ranks for a checkpoint."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from gradrank.adapters.baking import form_behind, install
from gradrank.adapters.edits import Drop, Edit, Grow, Partition, Select, Shrink
from gradrank.adapters.factors import check_unmerged, check_whole
from gradrank.adapters.forms import attach_mask, detach
from gradrank.adapters.guard import check
from gradrank.adapters.layer_forms import set_active, set_partition
from gradrank.adapters.optimizers import inner_optimizer
from gradrank.adapters.rollback import Rollback
from gradrank.adapters.surgery import edit, make_edits
from gradrank.adapters.svd import check_unformed, restart, start_svd
from gradrank.adapters.swap import Incision, Replace
from gradrank.adapters.view import (
    PREFIX,
    LoraSite,
    adapter_name,
    layer_alpha,
    lora_sites,
    name_targets,
    sync_config,
    unsupported,
)
from gradrank.core.errors import SurgeryError, TargetError
from gradrank.core.partition import Capacity, NeuronPartition
from gradrank.signals.layers import unwrapped

__all__ = ["refit", "reserve_ranks", "restart", "settle", "start_svd"]


@torch.no_grad()
def reserve_ranks(
    model: nn.Module, ceilings: Mapping[str, int], adapter: str | None = None
) -> None:
    """Widen LoRA layers to the ranks they may reach, and mask what is not in use.

    Before the optimizer exists and before the model is wrapped (DistributedDataParallel, FSDP2,
    DeepSpeed): from then on no parameter changes its shape. The function stays as it is.

    Args:
        model: The PEFT model.
        ceilings: Largest rank by target name.
        adapter: Name of the adapter, if several are active.

    Raises:
        SurgeryError: If a layer has a form already or cannot be widened, or a ceiling is for a
            target that carries no adapter; nothing is changed then.
    """
    adapter = adapter_name(model, adapter)
    sites = lora_sites(model, adapter)
    check_unformed(sites, ceilings)
    used = {name: site.rank for name, site in sites.items()}
    wider = {name: max(ceilings.get(name, 0), rank) for name, rank in used.items()}
    edit(model, {name: Grow(rank) for name, rank in wider.items()}, adapter=adapter)
    for name, site in sites.items():
        attach_mask(site.layer, adapter, used[name])
    sync_config(model, adapter)


def settle(model: nn.Module, adapter: str | None = None) -> Mapping[str, int]:
    """Give LoRA layers plain factors of their real ranks: after training, or between two phases.

    Component masks, SVD forms and neuron partitions go. The weights in use stay as they are (``P
    diag(lam)`` becomes B, and the blocks of a partition a B of rank ``r + r'`` with zeros outside
    them), bitwise, and so does the function but for the rounding of a shorter sum. Targets of which
    nothing is in use lose their adapter. Optimizers and wrappings made before hold parameters
    that are no longer the model's; make them anew.

    Args:
        model: The PEFT model; plain layers are left alone.
        adapter: Name of the adapter, if several are active.

    Returns:
        Rank by target name; 0 for a target that lost its adapter.

    Raises:
        SurgeryError: If factors are merged or sharded, a target that is to lose its adapter
            carries others, or no adapter would be left; nothing is changed then.
    """
    adapter = adapter_name(model, adapter)
    sites = lora_sites(model, adapter)
    ranks = {name: site.rank for name, site in sites.items()}
    formed = {name: site for name, site in sites.items() if site.form != "plain"}
    empty = {name: site for name, site in formed.items() if not site.rank}
    for name, site in formed.items():
        try:
            check_unmerged(site.layer, adapter)
            check_whole(adapter, site.learned().values())
        except TargetError as error:
            raise SurgeryError(f"'{name}' cannot be settled: {error}") from error
    _check_dropped(empty.values(), len(empty) == len(sites) and not unsupported(model, adapter))
    for site in formed.values():
        detach(site.layer, adapter)
        site.layer.lora_alpha[adapter] = layer_alpha(site.layer, adapter, site.rank)
    with Rollback() as rollback:
        replace = Replace(rollback, model, None)
        for site in empty.values():
            replace.apply(Incision(site, 0))
    if formed:
        sync_config(model, adapter)
    if empty:
        name_targets(model, adapter)
    return ranks


def _check_dropped(empty: Iterable[LoraSite], all_of_them: bool) -> None:
    for site in empty:
        if len(site.layer.r) > 1:
            raise SurgeryError(
                f"'{site.name}' cannot be settled: no component is in use, and it carries other "
                f"adapters too ({', '.join(sorted(site.layer.r))}). Delete those first."
            )
        if all_of_them:
            raise SurgeryError(
                "no target has a component in use, and no adapter would be left to settle. Keep "
                "at least one component."
            )


@torch.no_grad()
def refit(
    model: nn.Module,
    ranks: Mapping[str, int],
    optimizer: Any = None,
    adapter: str | None = None,
    partitions: Mapping[str, NeuronPartition] | None = None,
) -> None:
    """Give LoRA layers other shapes whose values will be loaded next.

    The optimizer's state follows where its layout is known, and begins afresh elsewhere, without
    a warning: it will be loaded too.

    Args:
        model: The PEFT model.
        ranks: Rank by target name (``r + r'`` of a partition); a target that is missing or has
            rank 0 is dropped, and switched off where it has a fixed shape that allows it.
        optimizer: The optimizer, if it exists already.
        adapter: Name of the adapter, if several are active.
        partitions: How rows are split, by target name; a target that is missing has one rank for
            all of them.

    Raises:
        SurgeryError: If an edit is refused, a rank is for a target that this model has lost, or an
            optimizer holds the blocks of a partition that would have to go.
    """
    adapter = adapter_name(model, adapter)
    sites = lora_sites(model, adapter)
    _check_lost(model, ranks)
    wanted: dict[str, Capacity] = {name: ranks.get(name, 0) for name in sites}
    wanted |= {name: p for name, p in (partitions or {}).items() if name in sites and p.is_split}
    moved = {n: c for n, c in wanted.items() if c != (sites[n].partition or sites[n].rank)}
    room = {n: c for n, c in moved.items() if sites[n].form == "partition-mask"}
    compact = [sites[n] for n in moved if sites[n].form == "partition"]
    _check_room(sites, room)
    _check_held(compact, optimizer)
    with Rollback() as rollback:
        rollback.remember_config(model, adapter)
        for site in compact:
            _make_plain(rollback, site)
        edits = {n: _refitted(sites[n], c) for n, c in moved.items() if n not in room}
        check(sites, edits, optimizer, unsupported(model, adapter), model, beyond=True)
        make_edits(model, adapter, edits, optimizer)
        for name, capacity in room.items():
            if isinstance(capacity, int):
                set_active(sites[name].layer, adapter, capacity)
            else:
                set_partition(sites[name].layer, adapter, capacity)
        sync_config(model, adapter)


def _check_lost(model: nn.Module, ranks: Mapping[str, int]) -> None:
    modules = dict(unwrapped(model).named_modules())
    lost = [
        name
        for name, rank in ranks.items()
        if rank and not isinstance(modules.get(PREFIX + name), LoraLayer | None)
    ]
    if lost:
        raise SurgeryError(
            f"{len(lost)} target(s) of the checkpoint ('{lost[0]}', ...) have lost their adapter "
            "in this model, and it cannot come back. Build the adapter anew, and load into that."
        )


def _check_room(sites: Mapping[str, LoraSite], room: Mapping[str, Capacity]) -> None:
    """Refuse what does not fit layers whose shape is fixed."""
    for name, capacity in room.items():
        site = sites[name]
        rows, width = site.raw("B").shape
        rank = capacity if isinstance(capacity, int) else capacity.lora_rank
        fits = isinstance(capacity, int) or capacity.d_out == rows
        merged = site.adapter in site.layer.merged_adapters
        if rank > width or not fits or merged:
            raise SurgeryError(
                f"'{name}' has {rows} rows and room for rank {width}, and the checkpoint has "
                f"rank {rank}{'' if fits else ' on another number of rows'}; or its adapter is "
                "merged. Reserve for the method that wrote the checkpoint, and unmerge."
            )


def _check_held(compact: Iterable[LoraSite], optimizer: Any) -> None:
    groups = [] if optimizer is None else inner_optimizer(optimizer).param_groups
    held = {id(parameter) for group in groups for parameter in group["params"]}
    for site in compact:
        if any(id(raw) in held for raw in site.learned().values()):
            raise SurgeryError(
                f"'{site.name}' has a neuron partition whose blocks an optimizer holds, and the "
                "checkpoint has another shape. Build the adapter and the optimizer anew, and load "
                "into those."
            )


def _make_plain(rollback: Rollback, site: LoraSite) -> None:
    """Expand a compact partition, in a way that can be undone."""
    b, learned = site.linear("B"), site.learned()
    held: Any = form_behind(b)

    def undo() -> None:
        if form_behind(b) is None:
            b.weight = nn.Parameter(held.compose(**blocks), requires_grad=True)
            install(b, held)
            for factor, parameter in learned.items():
                site.assign(factor, parameter)

    blocks = {f"original{i}": learned[f].detach() for i, f in enumerate(("B_d", "B_s"))}
    rollback.push(undo)
    detach(site.layer, site.adapter)


def _refitted(site: LoraSite, capacity: Capacity) -> Edit:
    if isinstance(capacity, NeuronPartition):
        return Partition(capacity)
    if capacity > site.rank:
        return Grow(capacity)
    if not capacity and not (site.masked and site.form == "svd"):
        return Drop()
    return Select(tuple(range(capacity))) if site.form == "svd" else Shrink(capacity, by="norm")
