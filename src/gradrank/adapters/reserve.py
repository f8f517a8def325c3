"""Fixed shapes: reserve ranks before a model is wrapped, settle on the real ones afterwards."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gradrank.adapters.edits import Drop, Edit, Grow, Shrink
from gradrank.adapters.factors import check_unmerged, check_whole
from gradrank.adapters.forms import attach_mask, detach
from gradrank.adapters.guard import check
from gradrank.adapters.surgery import edit, make_edits
from gradrank.adapters.view import (
    adapter_name,
    layer_alpha,
    lora_sites,
    sync_config,
    unsupported,
)
from gradrank.core.errors import SurgeryError, TargetError, nearest


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
    unknown = [name for name in ceilings if name not in sites]
    if unknown:
        raise SurgeryError(
            f"ranks are reserved for {len(unknown)} target(s) without a LoRA layer: '{unknown[0]}'"
            f" is unknown. {nearest(unknown[0], sites)}"
        )
    masked = [name for name, site in sites.items() if site.masked]
    if masked:
        raise SurgeryError(
            f"{len(masked)} layer(s) have a component mask already ('{masked[0]}', ...). Reserve "
            "once, before the optimizer is made."
        )
    used = {name: site.rank for name, site in sites.items()}
    wider = {name: max(ceilings.get(name, 0), rank) for name, rank in used.items()}
    edit(model, {name: Grow(rank) for name, rank in wider.items()}, adapter=adapter)
    for name, site in sites.items():
        attach_mask(site.layer, adapter, used[name])
    sync_config(model, adapter)


def settle(model: nn.Module, adapter: str | None = None) -> Mapping[str, int]:
    """Give masked LoRA layers their real ranks: after training, or between two phases of it.

    The weights in use stay as they are, bitwise, and so does the function but for the rounding of
    a shorter sum. Optimizers and wrappings made before hold parameters that are no longer the
    model's; make them anew.

    Args:
        model: The PEFT model; layers without a mask are left alone.
        adapter: Name of the adapter, if several are active.

    Returns:
        Rank by target name.

    Raises:
        SurgeryError: If masked factors are merged or sharded; nothing is changed then.
    """
    adapter = adapter_name(model, adapter)
    sites = lora_sites(model, adapter)
    masked = {name: site for name, site in sites.items() if site.masked}
    for name, site in masked.items():
        try:
            check_unmerged(site.layer, adapter)
            check_whole(adapter, (site.raw("A"), site.raw("B")))
        except TargetError as error:
            raise SurgeryError(f"'{name}' cannot be settled: {error}") from error
    for site in masked.values():
        detach(site.layer, adapter)
        site.layer.lora_alpha[adapter] = layer_alpha(site.layer, adapter, site.rank)
    if masked:
        sync_config(model, adapter)
    return {name: site.rank for name, site in sites.items()}


def refit(
    model: nn.Module, ranks: Mapping[str, int], optimizer: Any = None, adapter: str | None = None
) -> None:
    """Give LoRA layers other ranks whose values will be loaded next.

    The optimizer's state follows where its layout is known, and begins afresh elsewhere, without
    a warning: it will be loaded too.

    Args:
        model: The PEFT model.
        ranks: Rank by target name; a target that is missing is dropped.
        optimizer: The optimizer, if it exists already.
        adapter: Name of the adapter, if several are active.
    """
    adapter = adapter_name(model, adapter)
    edits: dict[str, Edit] = {}
    for name, site in lora_sites(model, adapter).items():
        rank = ranks.get(name, 0)
        if not rank:
            edits[name] = Drop()
        elif rank != site.rank:
            edits[name] = Shrink(rank, by="norm") if rank < site.rank else Grow(rank)
    impossible = unsupported(model, adapter)
    check(lora_sites(model, adapter), edits, optimizer, impossible, model, beyond=True)
    make_edits(model, adapter, edits, optimizer)
