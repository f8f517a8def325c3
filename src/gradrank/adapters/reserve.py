"""Forms before a model is wrapped, real ranks afterwards, and other ranks for a checkpoint."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from gradrank.adapters.edits import Drop, Edit, Grow, Select, Shrink
from gradrank.adapters.factors import check_unmerged, check_whole
from gradrank.adapters.forms import attach_mask, detach
from gradrank.adapters.guard import check
from gradrank.adapters.surgery import edit, make_edits
from gradrank.adapters.svd import check_unformed, restart, start_svd
from gradrank.adapters.swap import Incision, Replace, Rollback
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

    Component masks and SVD forms go. The weights in use stay as they are (``P diag(lam)`` becomes
    B), bitwise, and so does the function but for the rounding of a shorter sum. Targets of which
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


def refit(
    model: nn.Module, ranks: Mapping[str, int], optimizer: Any = None, adapter: str | None = None
) -> None:
    """Give LoRA layers other ranks whose values will be loaded next.

    The optimizer's state follows where its layout is known, and begins afresh elsewhere, without
    a warning: it will be loaded too.

    Args:
        model: The PEFT model.
        ranks: Rank by target name; a target that is missing or has rank 0 is dropped, and
            switched off where it has the SVD form at a fixed shape.
        optimizer: The optimizer, if it exists already.
        adapter: Name of the adapter, if several are active.

    Raises:
        SurgeryError: If an edit is refused, or a rank is for a target that this model has lost.
    """
    adapter = adapter_name(model, adapter)
    sites, impossible = lora_sites(model, adapter), unsupported(model, adapter)
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
    edits = {
        name: _refitted(site, ranks.get(name, 0))
        for name, site in sites.items()
        if ranks.get(name, 0) != site.rank
    }
    check(sites, edits, optimizer, impossible, model, beyond=True)
    make_edits(model, adapter, edits, optimizer)


def _refitted(site: LoraSite, rank: int) -> Edit:
    if rank > site.rank:
        return Grow(rank)
    if not rank and not (site.masked and site.form == "svd"):
        return Drop()
    return Select(tuple(range(rank))) if site.form == "svd" else Shrink(rank, by="norm")
