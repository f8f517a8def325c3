"""The guard: every reason why an edit must not be made, found before anything is touched."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from gradrank.adapters.edits import Drop, Edit, Grow, Shrink
from gradrank.adapters.optimizers import inner_optimizer, refusals
from gradrank.adapters.view import LoraSite
from gradrank.core.errors import SurgeryError, nearest
from gradrank.signals.distributed import is_distributed

SHOWN = 8


def check(
    sites: Mapping[str, LoraSite],
    edits: Mapping[str, Edit],
    optimizer: Any = None,
    impossible: Mapping[str, str] | None = None,
) -> None:
    """Refuse edits that cannot be made, with every reason at once.

    Args:
        sites: Live LoRA layers by target name.
        edits: Edits by target name.
        optimizer: The optimizer that holds the factors, or None if none exists yet.
        impossible: Layers that can never be edited, with the reason.

    Raises:
        SurgeryError: Naming every reason; nothing has been changed.
    """
    reasons: list[str] = []
    impossible = impossible or {}
    for name, edit in edits.items():
        if name not in sites:
            why = impossible.get(name, f"carries no adapter. {nearest(name, sites)}")
            reasons.append(f"'{name}' {why}")
            continue
        reasons += [f"'{name}' {why}" for why in _layer(sites[name], edit)]
    known = {name: edit for name, edit in edits.items() if name in sites}
    reasons += _setting({name: sites[name] for name in known}, optimizer)
    if optimizer is not None:
        parameters = {f"{n}.lora_{f}": sites[n].raw(f) for n in known for f in "AB"}
        reasons += refusals(optimizer, parameters)
    if all(isinstance(edits.get(name), Drop) for name in sites) and sites and edits:
        reasons.append("every target would be dropped, and no adapter would be left")
    if reasons:
        more = f"\n- and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
        listed = "".join(f"\n- {reason}" for reason in reasons[:SHOWN])
        raise SurgeryError(
            "capacity cannot be moved; nothing was changed. "
            f"{len(reasons)} reason(s):{listed}{more}"
        )


def _layer(site: LoraSite, edit: Edit) -> Iterator[str]:
    """Reasons of one layer."""
    layer, adapter = site.layer, site.adapter
    if adapter in layer.merged_adapters:
        yield "is merged into its base weight; unmerge the adapter first (model.unmerge_adapter())"
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        yield f"uses the LoRA variant {variant} (DoRA and the like), whose parts depend on the rank"
    if layer.lora_bias.get(adapter):
        yield "has a bias on lora_B, which a change of rank would not carry"
    shapes = {tuple(site.raw(factor).shape) for factor in "AB"}
    if any(0 in shape or len(shape) != 2 for shape in shapes):
        yield f"has sharded or flattened factors of shapes {sorted(shapes)} (ZeRO-3, FSDP1)"
        return
    yield from _parameters(site)
    yield from _ranks(site, edit)


def _parameters(site: LoraSite) -> Iterator[str]:
    for factor in "AB":
        parameter: Any = site.raw(factor)
        if parameter.is_meta:
            yield f"has its factor {factor} on the meta device"
        if not parameter.is_floating_point():
            yield f"has a quantised factor {factor} ({parameter.dtype})"
        hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        if not site.masked and any(hooks):
            yield (
                f"has hooks on its factor {factor}, which a new parameter would lose; use the "
                "fixed-shape mode (gradrank.reserve), or remove them"
            )


def _ranks(site: LoraSite, edit: Edit) -> Iterator[str]:
    now = site.rank
    widest = min(site.raw("A").shape[1], site.raw("B").shape[0])
    ceiling = site.raw("A").shape[0] if site.masked else widest
    if isinstance(edit, Drop):
        if site.masked:
            yield "has a fixed shape and cannot be dropped before gradrank.settle(model)"
        if len(site.layer.r) > 1:
            yield f"carries other adapters too ({', '.join(sorted(site.layer.r))})"
        return
    wrong = isinstance(edit.rank, bool) or not isinstance(edit.rank, int)
    if wrong or edit.rank < 1:
        yield f"would get rank {edit.rank!r}; a rank is a whole number from 1 (or Drop())"
    elif isinstance(edit, Shrink) and edit.rank > now:
        yield f"has rank {now} and cannot shrink to {edit.rank}"
    elif isinstance(edit, Grow) and edit.rank < now:
        yield f"has rank {now} and cannot grow to {edit.rank}"
    elif edit.rank > ceiling:
        limit = "the rank reserved for it" if site.masked else "min(d_in, d_out)"
        yield f"would get rank {edit.rank}, above {limit}, {ceiling}"
    if isinstance(edit, Grow) and edit.sketch is not None:
        width = site.raw("A").shape[1]
        if edit.sketch.dim() != 2 or edit.sketch.shape[1] != width:
            yield f"got a gradient sketch of shape {tuple(edit.sketch.shape)}, not [s, {width}]"


def _setting(sites: Mapping[str, LoraSite], optimizer: Any) -> Iterator[str]:
    """Reasons that lie in how the model is trained."""
    plain = [name for name, site in sites.items() if not site.masked]
    if not plain:
        return
    if any(hasattr(sites[name].raw(f), "full_tensor") for name in plain for f in "AB"):
        yield (
            "the factors are sharded over processes (FSDP2, DTensor), where a parameter cannot "
            "change its shape; call gradrank.reserve(model, ...) before sharding"
        )
    elif is_distributed() and optimizer is not None:
        yield (
            f"{torch.distributed.get_world_size()} processes train together, and a parameter that "
            "is replaced under DistributedDataParallel or DeepSpeed silently stops being "
            "synchronised; call gradrank.reserve(model, ...) before wrapping (fixed shape, "
            "component mask), and gradrank.settle(model) after training"
        )


def wrapping(model: nn.Module, optimizer: Any = None) -> str | None:
    """Return what keeps the shapes of parameters fixed in this run, or None.

    Args:
        model: The model as it is trained.
        optimizer: Its optimizer, if it exists.

    Returns:
        ``"DistributedDataParallel"``, ``"FSDP"``, ``"DeepSpeed"``, ``"several processes"`` or
        None.
    """
    kinds = {type(m).__module__ + "." + type(m).__name__ for m in _chain(model)}
    text = " ".join(kinds) + " " + type(inner_optimizer(optimizer)).__module__
    for word, name in (("deepspeed", "DeepSpeed"), ("DistributedDataParallel",) * 2):
        if word in text:
            return name
    if any(hasattr(p, "full_tensor") or hasattr(p, "_is_flat_param") for p in model.parameters()):
        return "FSDP"
    return "several processes" if is_distributed() else None


def _chain(model: Any) -> Iterator[nn.Module]:
    while isinstance(model, nn.Module):
        yield model
        model = getattr(model, "module", None)
