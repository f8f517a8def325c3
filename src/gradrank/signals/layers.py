"""Which modules of a model can carry a LoRA adapter, and how they are named and shaped."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel

from gradrank.core.errors import TargetError
from gradrank.core.targets import Target, select_names

ALL_LINEAR = "all-linear"

# Heads that a fine-tuning run trains in full (PEFT's modules_to_save) or leaves alone.
_HEADS = ("lm_head", "embed_out", "score", "classifier", "classification_head", "qa_outputs")
# Parts of a task head that stand beside the pre-trained model: DistilBERT's, DeBERTa's, XLNet's. A
# pooler within it (BERT's) is pre-trained, and so is all of a model without a head.
_BESIDE_BASE = ("pre_classifier", "pooler", "sequence_summary", "logits_proj")
_ADAPTER_PARTS = (".lora_", ".modules_to_save.", ".original_module.")


@dataclass(frozen=True, slots=True)
class Site:
    """A target and the live module that it stands for.

    Attributes:
        target: The target.
        module: The module whose inputs and output gradients are observed.
    """

    target: Target
    module: nn.Module


def find_sites(model: nn.Module, targets: str | Sequence[str] = ALL_LINEAR) -> list[Site]:
    """Find the modules that may receive capacity.

    Names are those of the base model: the prefixes and suffixes that PEFT adds are removed, so a
    model and its PEFT wrapping have the same targets.

    Args:
        model: The model, plain or wrapped by PEFT.
        targets: ``"all-linear"``, or names (full, or their last dotted parts as in PEFT, or
            ``re:`` and an expression).

    Returns:
        The sites, in model order.

    Raises:
        TargetError: If nothing matches, or a wanted module cannot carry LoRA.
    """
    named = {name: module for name, module in _base_modules(model) if name}
    sites = {
        name: Site(Target(name, *shape, kind), module)
        for name, module in named.items()
        if (shape := _shape(module)) and (kind := _kind(module)) and not _is_adapter(name)
    }
    refused = {name: why for name, module in named.items() if (why := _refusal(module))}
    if isinstance(targets, str) and not targets.startswith("re:"):
        targets = [part.strip() for part in targets.split(",") if part.strip()]
    elif isinstance(targets, str):
        targets = [targets]
    if list(targets) == [ALL_LINEAR]:
        _refuse(refused, "'all-linear' would have to skip")
        heads = _head_names(model, sites)
        chosen = [site for name, site in sites.items() if name not in heads]
        if not chosen:
            raise TargetError(
                f"'all-linear' matches nothing in {type(model).__name__}: it has no linear layer "
                "besides its head."
            )
        return chosen
    names = select_names([*sites, *refused], list(targets))
    _refuse({name: refused[name] for name in names if name in refused}, "the targets include")
    return [sites[name] for name in sites if name in set(names)]


def head_beside_base(model: nn.Module) -> tuple[str, ...]:
    """Return the modules of a task head that are one only because of where they stand.

    Args:
        model: The model, plain or wrapped by PEFT.

    Returns:
        Names of modules beside the pre-trained model, in a fixed order; none where the model is
        not known to hold a pre-trained one under a name of its own.
    """
    model = unwrapped(model)
    first = {name.partition(".")[0] for name, _ in _base_modules(model)}
    if getattr(model, "base_model_prefix", "") not in first - {""}:
        return ()
    return tuple(name for name in _BESIDE_BASE if name in first)


def ambiguous_suffixes(model: nn.Module, targets: Sequence[Target]) -> bool:
    """Tell whether some target's name is also the dotted suffix of another module's name.

    PEFT matches names in a ``target_modules`` list by suffix, so an ambiguous name would adapt a
    module that the plan does not mean.

    Args:
        model: The model.
        targets: The targets.

    Returns:
        True if an anchored expression must be used instead of a list.
    """
    names = {name for name, _ in _base_modules(model)}
    suffixes = {name[i + 1 :] for name in names for i, char in enumerate(name) if char == "."}
    return any(target.name in suffixes for target in targets)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel, DeepSpeed and torch.compile.

    Args:
        model: The model.

    Returns:
        The model that they wrap, or the model itself.
    """
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif type(model).__module__.startswith("deepspeed.") and hasattr(model, "module"):
            model = model.get_submodule("module")
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Tell whether a model or a part of it runs through torch.compile.

    Args:
        model: The model.

    Returns:
        Whether hooks that are set later may go unseen.
    """
    modules: list[Any] = list(model.modules())
    return any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in modules
    )


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules by their names in the base model, without what PEFT puts around them."""
    model = unwrapped(model)
    prefix = "base_model.model." if hasattr(model, "peft_config") else ""
    for name, module in model.named_modules():
        yield name.removeprefix(prefix).removesuffix(".base_layer"), module


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (d_in, d_out), or None for a module that is no linear layer."""
    if hasattr(module, "base_layer"):
        return None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        d_in, d_out = getattr(module, "weight").shape  # noqa: B009 - untyped module attribute
        return int(d_in), int(d_out)
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(d_in, int) and isinstance(d_out, int) and d_in > 0 and d_out > 0:
        return d_in, d_out
    return None


def _kind(module: nn.Module) -> str | None:
    if type(module).__name__ == "Conv1D":
        return "conv1d"
    if isinstance(module, nn.Bilinear) or any(True for _ in module.children()):
        return None
    quantized = any(not p.is_floating_point() for p in module.parameters(recurse=False))
    if isinstance(module, nn.Linear) and not quantized:
        return "linear"
    # bitsandbytes, GPTQ, AWQ, HQQ, ...: all show in_features and out_features, and PEFT wraps
    # them; observing needs only their inputs and output gradients.
    return "quantized-linear"


def _refusal(module: nn.Module) -> str | None:
    """Return why a module that holds linear maps cannot be a target, or None."""
    own = dict(module.named_parameters(recurse=False))
    experts = [name for name, p in own.items() if p.dim() == 3 and "expert" in _words(module)]
    if experts:
        return f"holds expert weights in 3-D parameters ({', '.join(sorted(experts))})"
    if isinstance(module, nn.MultiheadAttention):
        return "fuses its projections in one parameter (nn.MultiheadAttention)"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "is only read, and never called, by the nn.MultiheadAttention around it"
    return None


def _words(module: nn.Module) -> str:
    return type(module).__name__.lower()


def _refuse(refused: dict[str, str], opening: str) -> None:
    if not refused:
        return
    shown = "; ".join(f"'{name}' {why}" for name, why in list(refused.items())[:4])
    more = f"; and {len(refused) - 4} more" if len(refused) > 4 else ""
    raise TargetError(
        f"{opening} modules that gradrank cannot adapt: {shown}{more}. Name the targets to adapt "
        "instead, for example targets=['q_proj', 'k_proj', 'v_proj', 'o_proj']."
    )


def _is_adapter(name: str) -> bool:
    return any(part in f".{name}." for part in _ADAPTER_PARTS)


def _head_names(model: nn.Module, sites: dict[str, Site]) -> set[str]:
    """Names of output layers: the model's own output embedding and task heads."""
    heads = {name for name in sites if any(part in _HEADS for part in name.split("."))}
    beside = head_beside_base(model)
    heads |= {name for name in sites if name.partition(".")[0] in beside}
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    return heads | {name for name, site in sites.items() if site.module is output}


def base_parameters(model: nn.Module) -> int:
    """Count a model's parameters without adapters; tied weights once, packed ones unpacked.

    Args:
        model: The model.

    Returns:
        The number of parameters.
    """
    total = 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        # 4-bit weights of bitsandbytes are packed in bytes and remember their true shape.
        state = getattr(parameter, "quant_state", None)
        total += math.prod(state.shape) if state is not None else parameter.numel()
    return total
