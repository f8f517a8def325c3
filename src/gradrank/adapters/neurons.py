"""Room for neuron partitions, made before the optimizer exists and the model is wrapped."""

import functools
from collections.abc import Mapping

import torch
from torch import nn

from gradrank.adapters.baking import form_behind, strip
from gradrank.adapters.edits import Edit, Grow
from gradrank.adapters.forms import attach_partition_mask
from gradrank.adapters.guard import check
from gradrank.adapters.rollback import Rollback
from gradrank.adapters.surgery import operate
from gradrank.adapters.svd import check_unformed
from gradrank.adapters.view import LoraSite, adapter_name, lora_sites, sync_config, unsupported
from gradrank.core.errors import SurgeryError


@torch.no_grad()
def reserve_neurons(
    model: nn.Module,
    ranks: Mapping[str, int],
    supplementary: Mapping[str, int],
    adapter: str | None = None,
    fixed: bool = False,
    seed: int = 0,
) -> dict[str, int]:
    """Give LoRA layers the rank of the first stage, and at a fixed shape room for the second.

    The function stays as it is. At a fixed shape (DistributedDataParallel, FSDP2, DeepSpeed) the
    factors are widened to ``r + r'`` components of which the first r are in use, and from then on
    no parameter changes its shape.

    Args:
        model: The PEFT model.
        ranks: Rank r by target name; a layer that is not named keeps its rank.
        supplementary: Rank r' by target name, 0 or more, of what the second stage adds.
        adapter: Name of the adapter, if several are active.
        fixed: Whether shapes stay from now on.
        seed: Seed of new rows of A.

    Returns:
        Rank in use by target name.

    Raises:
        SurgeryError: If a layer has a form already, cannot be widened, or has a higher rank than
            the one asked for; nothing is changed then.

    Source:
        PiLoRA, section 3.3 (two ranks in one layer).
    """
    adapter = adapter_name(model, adapter)
    sites = lora_sites(model, adapter)
    check_unformed(sites, {**ranks, **supplementary})
    above = [name for name, rank in ranks.items() if sites[name].rank > rank]
    if above:
        name = above[0]
        raise SurgeryError(
            f"{len(above)} layer(s) have a higher rank than the first stage is to train with: "
            f"'{name}' has {sites[name].rank}, above {ranks[name]}. Give the method that rank "
            f"(rank={sites[name].rank}), or build the adapter with a lower one."
        )
    first = {name: ranks.get(name, site.rank) for name, site in sites.items()}
    check(
        sites,
        {name: Grow(r) for name, r in first.items()},
        None,
        unsupported(model, adapter),
        model,
    )
    width = {n: r + supplementary.get(n, 0) if fixed else r for n, r in first.items()}
    wider: dict[str, Edit] = {n: Grow(r) for n, r in width.items() if r > sites[n].rank}
    with Rollback() as rollback:
        rollback.remember_config(model, adapter)
        operate(rollback, model, sites, wider, None, seed)
        for name, site in sites.items() if fixed else ():
            rollback.push(functools.partial(_strip, site, site.learned()))
            attach_partition_mask(site.layer, adapter, first[name])
        sync_config(model, adapter)
    return first


def _strip(site: LoraSite, learned: Mapping[str, nn.Parameter]) -> None:
    for factor, raw in learned.items():
        if form_behind(site.linear(factor)) is not None:
            strip(site.linear(factor), raw)
