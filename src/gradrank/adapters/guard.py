"""The guard: every reason why an edit must not be made, found before anything is touched."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from gradrank.adapters.baking import gathered
from gradrank.adapters.edits import Drop, Edit, Grow, Partition, Select, Shrink
from gradrank.adapters.optimizers import inner_optimizer, refusals
from gradrank.adapters.partitioning import misfits, plain_edit
from gradrank.adapters.stores import is_zero
from gradrank.adapters.view import LoraSite, adapter_config
from gradrank.core.errors import SurgeryError, nearest
from gradrank.signals.distributed import is_distributed

# Initialisations that change the base weight by the rank, and do so again on every load.
_RESIDUAL = ("pissa", "olora", "corda", "loftq")
SVD_SETTING = (
    "the SVD form trains under DDP or in one process, and not under {}; use DDP, or a method that "
    "does without it"
)


def check(
    sites: Mapping[str, LoraSite],
    edits: Mapping[str, Edit],
    optimizer: Any = None,
    impossible: Mapping[str, str] | None = None,
    model: nn.Module | None = None,
    beyond: bool = False,
) -> None:
    """Refuse edits that cannot be made, with every reason at once.

    Args:
        sites: Live LoRA layers by target name.
        edits: Edits by target name.
        optimizer: The optimizer that holds the factors, or None if none exists yet.
        impossible: Layers that can never be edited, with the reason.
        model: The model as it is trained, for what lies in its wrapping and PEFT's configuration.
        beyond: Whether a rank may grow above ``min(d_in, d_out)``, which is waste, but what a
            checkpoint may hold.

    Raises:
        SurgeryError: Naming every reason; nothing has been changed.
    """
    impossible = impossible or {}
    found: list[tuple[str, str]] = []
    for name, edit in edits.items():
        if name in sites:
            found += [(name, why) for why in _layer(sites[name], edit, beyond)]
        else:
            why = impossible.get(name, f"carries no LoRA adapter. {nearest(name, sites)}")
            found.append((name, why))
    known = {name: sites[name] for name in edits if name in sites}
    reasons = _grouped(found)
    reasons += _setting(known, optimizer, model)
    if optimizer is not None and not _kept_by_zero(known, optimizer):
        reasons += refusals(optimizer, _trained(known, optimizer))
    dropped = [n for n, site in known.items() if isinstance(plain_edit(site, edits[n]), Drop)]
    if dropped and len(dropped) == len(sites) and not impossible:
        reasons.append("every target would be dropped, and no adapter would be left")
    if reasons:
        listed = "".join(f"\n- {reason}" for reason in reasons)
        raise SurgeryError(
            f"capacity cannot be moved; nothing was changed. {len(reasons)} reason(s):{listed}"
        )


def _kept_by_zero(sites: Mapping[str, LoraSite], optimizer: Any) -> bool:
    """Whether DeepSpeed holds everything in partitions that can be written to (ZeRO-1 and 2)."""
    return is_zero(inner_optimizer(optimizer)) and all(
        site.masked and hasattr(raw, "_hp_mapping")
        for site in sites.values()
        for raw in site.learned().values()
    )


def _grouped(found: Iterable[tuple[str, str]]) -> list[str]:
    """One line per distinct reason, with the targets that it holds for."""
    names: dict[str, list[str]] = {}
    for name, why in found:
        names.setdefault(why, []).append(name)
    lines = []
    for why, group in names.items():
        listed = ", ".join(f"'{name}'" for name in group[:3])
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        lines.append(f"{listed}{more}{': each' if len(group) > 1 else ''} {why}")
    return lines


def _trained(sites: Mapping[str, LoraSite], optimizer: Any) -> dict[str, nn.Parameter]:
    """The factors whose state has to be carried: not those that are frozen and held by no one."""
    groups = getattr(inner_optimizer(optimizer), "param_groups", [])
    held = {id(parameter) for group in groups for parameter in group["params"]}
    factors = {
        f"{name}.lora_{factor}" if factor != "lam" else f"{name}.lam": raw
        for name, site in sites.items()
        for factor, raw in site.learned().items()
    }
    return {name: p for name, p in factors.items() if p.requires_grad or id(p) in held}


def _layer(site: LoraSite, edit: Edit, beyond: bool) -> Iterator[str]:
    """Reasons of one layer."""
    layer, adapter = site.layer, site.adapter
    if adapter in layer.merged_adapters:
        yield "is merged into its base weight; unmerge the adapter first (model.unmerge_adapter())"
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        yield f"uses the LoRA variant {variant} (DoRA and the like), whose parts depend on the rank"
    if layer.lora_bias.get(adapter):
        yield "trains a bias on lora_B, which no budget of ranks counts; use lora_bias=False"
    shapes = {factor: tuple(raw.shape) for factor, raw in site.learned().items()}
    if site.partition is not None and not site.partition.supplementary_rank:
        shapes.pop("B_s", None)  # empty, and rightly so
    if any(0 in s or len(s) != (1 if f == "lam" else 2) for f, s in shapes.items()):
        listed = sorted(set(shapes.values()))
        yield f"has sharded or flattened factors of shapes {listed} (ZeRO-3, FSDP1)"
        return
    yield from _parameters(site)
    yield from _wanted(site, edit, beyond)


def _wanted(site: LoraSite, edit: Edit, beyond: bool) -> Iterator[str]:
    """Reasons that lie in what one layer is to become."""
    if not isinstance(edit, Edit):
        yield f"was given {edit!r}, which is no edit; use Shrink, Grow, Select, Partition or Drop"
    elif site.partition is not None and not isinstance(edit, Drop):
        yield "has a neuron partition already; call gradrank.settle(model) first"
    elif isinstance(edit, Partition):
        if found := tuple(misfits(site, edit, beyond)):
            yield from found
        elif not isinstance(plain := plain_edit(site, edit), Partition):
            yield from _wanted(site, plain, beyond)
    elif isinstance(edit, Drop):
        yield from _drop(site)
    elif isinstance(edit, Select):
        yield from _select(site, edit)
    else:
        yield from _rank(site, edit, beyond)


def _parameters(site: LoraSite) -> Iterator[str]:
    for factor in site.factors:
        parameter: Any = site.raw(factor)
        hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        if not site.masked and any(hooks):
            yield (
                f"has hooks on its factor {factor}, which a new parameter would lose; use the "
                "fixed-shape mode (gradrank.reserve), or remove them"
            )
        if parameter.is_meta:
            yield f"has its factor {factor} on the meta device"
        elif not parameter.is_floating_point():
            yield f"has a quantised factor {factor} ({parameter.dtype})"
        elif not bool(torch.isfinite(gathered(parameter)).all()):
            yield f"has NaN or infinite values in its factor {factor}; training has diverged"


def _drop(site: LoraSite) -> Iterator[str]:
    if site.masked:
        yield "has a fixed shape and cannot be dropped before gradrank.settle(model)"
    if len(site.layer.r) > 1:
        yield f"carries other adapters too ({', '.join(sorted(site.layer.r))})"


def _select(site: LoraSite, edit: Select) -> Iterator[str]:
    beyond = [number for number in edit.components if number >= site.rank]
    if beyond:
        yield f"has rank {site.rank} and no component {', '.join(map(str, beyond))} to keep"
    elif not edit.components and not (site.masked and site.form != "mask"):
        off = "keep at least one" if site.masked else "use Drop() to remove the adapter"
        yield f"would keep no component; {off}"


def _rank(site: LoraSite, edit: Shrink | Grow, beyond: bool) -> Iterator[str]:
    now, width = site.rank, site.raw("A").shape[1]
    most = min(width, site.raw("B").shape[0])
    reserved = site.raw("A").shape[0] if site.masked else None
    # A target that is switched off may stay so.
    if isinstance(edit.rank, bool) or not isinstance(edit.rank, int) or edit.rank < min(1, now):
        yield f"would get rank {edit.rank!r}; a rank is a whole number from 1 (or Drop())"
    elif isinstance(edit, Shrink) and edit.rank > now:
        yield f"has rank {now} and cannot shrink to {edit.rank}"
    elif isinstance(edit, Grow) and edit.rank < now:
        yield f"has rank {now} and cannot grow to {edit.rank}"
    elif reserved is not None and edit.rank > reserved:
        yield f"would get rank {edit.rank}, above the rank reserved for it, {reserved}"
    elif isinstance(edit, Grow) and edit.rank > max(most, now) and not beyond:
        yield f"would get rank {edit.rank}, above min(d_in, d_out), {most}"
    elif isinstance(edit, Shrink) and edit.by == "svd" and site.form == "svd" and edit.rank < now:
        yield (
            "has the SVD form, whose components are trained one by one and would be lost in a new "
            "decomposition; use Shrink(rank, by='norm') or Select(components)"
        )
    if isinstance(edit, Grow) and edit.sketch is not None:
        shape = tuple(edit.sketch.shape)
        if len(shape) != 2 or shape[1] != width or not edit.sketch.is_floating_point():
            yield f"got a gradient sketch {shape} of {edit.sketch.dtype}, not floats [s, {width}]"
        elif not bool(torch.isfinite(edit.sketch).all()):
            yield "got a gradient sketch with NaN or infinite values"


def _setting(
    sites: Mapping[str, LoraSite], optimizer: Any, model: nn.Module | None
) -> Iterator[str]:
    """Reasons that lie in how the model is built and trained."""
    adapters = {site.adapter for site in sites.values()}
    configs = {name: adapter_config(model, name) for name in adapters} if model is not None else {}
    for adapter, config in configs.items():
        start = str(config.init_lora_weights)
        if start.lower().startswith(_RESIDUAL):
            yield (
                f"adapter '{adapter}' began with init_lora_weights='{start}', which takes the "
                "first directions of that rank out of the base weight, again at every load; with "
                "another rank a save would load as another function. Save it as plain LoRA first "
                "(save_pretrained with path_initial_model_for_weight_conversion)"
            )
    plain = [name for name, site in sites.items() if not site.masked]
    formed = [site for site in sites.values() if site.form == "svd"]
    if not plain and not formed:
        return
    fixed = wrapping(model, optimizer) if model is not None else None
    yield from _svd_setting(formed, fixed, optimizer)
    if not plain:
        return
    if any(_is_sharded(sites[name]) for name in plain):
        yield (
            "the factors are sharded over processes (FSDP2, DTensor), where a parameter cannot "
            "change its shape; call gradrank.reserve(model, ...) before sharding"
        )
    elif fixed in {"DistributedDataParallel", "DeepSpeed"} or (
        is_distributed() and optimizer is not None
    ):
        yield (
            f"the model trains under {fixed or 'several processes'}, where a parameter that is "
            "replaced silently stops being synchronised; call gradrank.reserve(model, ...) before "
            "wrapping (fixed shape, component mask), and gradrank.settle(model) after training"
        )


def _svd_setting(formed: list[LoraSite], fixed: str | None, optimizer: Any) -> Iterator[str]:
    """Reasons of layers that have the SVD form."""
    sharded = fixed == "FSDP" or any(_is_sharded(site) for site in formed)
    if formed and (sharded or fixed == "DeepSpeed" or is_zero(inner_optimizer(optimizer))):
        yield SVD_SETTING.format("FSDP" if sharded else "DeepSpeed")


def _is_sharded(site: LoraSite) -> bool:
    return any(hasattr(raw, "full_tensor") for raw in site.learned().values())


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
