"""The SVD form of a whole adapter: how training with it starts, and starts again."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradrank.adapters.baking import form_behind, strip
from gradrank.adapters.directions import orthonormal_rows
from gradrank.adapters.edits import Edit, Grow, Select
from gradrank.adapters.forms import attach_svd
from gradrank.adapters.guard import SVD_SETTING, check, wrapping
from gradrank.adapters.layer_forms import FORM_NAMES
from gradrank.adapters.optimizers import inner_optimizer
from gradrank.adapters.rollback import Rollback
from gradrank.adapters.stores import agree, store_for
from gradrank.adapters.surgery import operate
from gradrank.adapters.swap import FixedShape, Incision
from gradrank.adapters.view import LoraSite, adapter_name, lora_sites, sync_config, unsupported
from gradrank.core.errors import SurgeryError, nearest
from gradrank.ops.sketch import seed_of


@torch.no_grad()
def start_svd(
    model: nn.Module,
    ranks: Mapping[str, int],
    adapter: str | None = None,
    seed: int = 0,
    fixed: bool = False,
    init: str = "svd",
) -> dict[str, int]:
    """Widen LoRA layers to the ranks they start from, and give them the SVD form.

    Before the optimizer exists, which needs the new parameters, and before the model is wrapped
    (DistributedDataParallel). The function stays as it is: new components are random directions
    with a zero in lam.

    Args:
        model: The PEFT model.
        ranks: Rank by target name, to be cut off at ``min(d_in, d_out)``; a layer that has more,
            or is not named, keeps its rank.
        adapter: Name of the adapter, if several are active.
        seed: Seed of random directions; every target has its own.
        fixed: Whether shapes stay from now on, as DistributedDataParallel needs; otherwise
            components are removed for real, in one process.
        init: ``svd`` (orthonormal P and Q; λ, the singular values, is zero in a new adapter) or
            ``keep`` (P = B, Q = A and λ = 1); see :func:`gradrank.adapters.forms.attach_svd`.

    Returns:
        Rank by target name. Layers that have more components than ``min(d_in, d_out)`` keep their
        factors, with lam = 1, since so many directions cannot be orthonormal.

    Raises:
        SurgeryError: If a layer has a form already or cannot be widened, a rank is for a target
            that carries no adapter, or the model is sharded; nothing is changed then.

    Source:
        AdaLoRA, arXiv 2303.10512, section 3.1; IGU-LoRA, section 3 (the form, started above the
        budget).
    """
    adapter = adapter_name(model, adapter)
    sites = lora_sites(model, adapter)
    check_unformed(sites, ranks)
    held = wrapping(model)
    if held in {"FSDP", "DeepSpeed"}:
        raise SurgeryError(f"nothing was changed: {SVD_SETTING.format(held)}.")
    most = {name: min(_widths(site)) for name, site in sites.items()}
    widths = {n: max(min(ranks.get(n, 0), most[n]), site.rank) for n, site in sites.items()}
    wider: dict[str, Edit] = {name: Grow(rank) for name, rank in widths.items()}
    check(sites, wider, None, unsupported(model, adapter), model)
    grown = {name: wider[name] for name, rank in widths.items() if rank != sites[name].rank}
    with Rollback() as rollback:
        rollback.remember_config(model, adapter)
        operate(rollback, model, sites, grown, None, seed)
        for name, site in sites.items():
            rollback.push(functools.partial(_undo_form, site, _copies(site)))
            chosen = "keep" if site.rank > most[name] else init
            attach_svd(site.layer, adapter, chosen, seed_of(seed, "svd", name), fixed)
        sync_config(model, adapter)
    return {name: site.rank for name, site in sites.items()}


@torch.no_grad()
def restart(
    model: nn.Module,
    optimizer: Any,
    adapter: str | None = None,
    seed: int = 0,
    init: str = "svd",
) -> None:
    """Begin afresh with the components in use: a zero update, and no memory in the optimizer.

    P and Q become random and orthonormal and lam zero, or, with ``keep``, Q random with rows as
    long as those of a new LoRA factor, P zero and lam one. The parameters stay the same objects.

    Args:
        model: The PEFT model, with layers in the SVD form; others are left alone.
        optimizer: Its optimizer; None if there is none yet.
        adapter: Name of the adapter, if several are active.
        seed: Seed of P and Q; every target has its own, equal in all processes.
        init: ``svd`` or ``keep``.

    Raises:
        SurgeryError: If no layer has the SVD form, or an edit of them would be refused; or what
            went wrong on the way, in which case model and optimizer are as they were.
    """
    adapter = adapter_name(model, adapter)
    sites = {n: site for n, site in lora_sites(model, adapter).items() if site.form == "svd"}
    if not sites:
        raise SurgeryError(
            f"no layer of adapter '{adapter}' has the SVD form, and only its components can be "
            "restarted. Call start_svd first."
        )
    check(sites, {n: Select(tuple(range(s.rank))) for n, s in sites.items()}, optimizer, {}, model)
    inner = None if optimizer is None else inner_optimizer(optimizer)
    store = store_for(inner)
    incisions = [
        _afresh(site, seed_of(seed, "restart", name), init) for name, site in sites.items()
    ]
    agree(incisions)
    with Rollback() as rollback:
        change = FixedShape(rollback, store)
        for incision in incisions:
            change.apply(incision)


def _afresh(site: LoraSite, seed: int, init: str) -> Incision:
    raw, rank = site.learned(), site.rank
    rows = orthonormal_rows(rank, raw["A"], seed_of(seed, "Q"))
    if init == "keep":
        # PEFT draws A uniformly from +-1/sqrt(d_in), so that its rows are this long on average.
        zeros = raw["B"].new_zeros(raw["B"].shape[0], rank)
        values = {"A": rows * 3**-0.5, "B": zeros, "lam": raw["lam"].new_ones(rank)}
    else:
        columns = orthonormal_rows(rank, raw["B"].T, seed_of(seed, "P")).T
        values = {"A": rows, "B": columns, "lam": raw["lam"].new_zeros(rank)}
    return Incision(site, rank, values)


def check_unformed(sites: Mapping[str, LoraSite], ranks: Mapping[str, int]) -> None:
    """Refuse names that are unknown, and layers that have a form already.

    Args:
        sites: Live LoRA layers.
        ranks: Rank by target name.

    Raises:
        SurgeryError: If a name is no layer's, or a layer has a form.
    """
    unknown = [name for name in ranks if name not in sites]
    if unknown:
        raise SurgeryError(
            f"ranks are reserved for {len(unknown)} target(s) without a LoRA layer: '{unknown[0]}'"
            f" is unknown. {nearest(unknown[0], sites)}"
        )
    formed = [name for name, site in sites.items() if site.form != "plain"]
    if formed:
        kind = FORM_NAMES[sites[formed[0]].form]
        raise SurgeryError(
            f"{len(formed)} layer(s) have {kind} already ('{formed[0]}', ...). Reserve "
            "once, before the optimizer is made; gradrank.settle(model) makes layers plain again."
        )


def _widths(site: LoraSite) -> tuple[int, int]:
    # Not from the factors, which may be flattened or empty here (ZeRO-3).
    return site.linear("A").in_features, site.linear("B").out_features


def _copies(site: LoraSite) -> dict[str, tuple[nn.Parameter, Tensor]]:
    return {factor: (raw, raw.detach().clone()) for factor, raw in site.learned().items()}


def _undo_form(site: LoraSite, before: Mapping[str, tuple[nn.Parameter, Tensor]]) -> None:
    """Make a layer plain again, with the parameters and the values it had."""
    for factor, (raw, value) in before.items():
        if form_behind(site.linear(factor)) is not None:
            strip(site.linear(factor), raw)
        with torch.no_grad():
            raw.copy_(value)
