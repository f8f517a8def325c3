"""The LoRA layers of a model as gradrank names them, and what PEFT's configuration says of them."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import nn
from torch.nn.utils import parametrize

from gradrank.adapters.baking import form_behind
from gradrank.adapters.layer_forms import stored_components
from gradrank.adapters.parametrizations import ComponentMask, Singular
from gradrank.adapters.partitioned import Partitioned, PartitionMask
from gradrank.adapters.site import LoraSite
from gradrank.core.errors import SurgeryError
from gradrank.core.scales import alpha_for, anchored
from gradrank.core.targets import Target
from gradrank.signals.layers import find_sites, unwrapped

PREFIX = "base_model.model."
_FORMS = (ComponentMask, Singular, Partitioned, PartitionMask)


def adapter_name(model: nn.Module, adapter: str | None = None) -> str:
    """Return the adapter that is meant: the given one, or the only active one.

    Args:
        model: A PEFT model.
        adapter: Its name, if several are there.

    Returns:
        The name.

    Raises:
        SurgeryError: If the model has no LoRA adapter, or it is not clear which is meant.
    """
    configs = getattr(unwrapped(model), "peft_config", None)
    if not configs:
        raise SurgeryError(
            f"a {type(unwrapped(model)).__name__} carries no PEFT adapter. Wrap it first: "
            "get_peft_model(model, config), or gradrank.apply(plan, model)."
        )
    if adapter is None:
        found: Any = getattr(unwrapped(model), "active_adapters", configs)
        # A property of PEFT's models, a method of transformers' own.
        called: Any = found() if callable(found) else found
        active = list(called)
        if len(active) != 1:
            raise SurgeryError(
                f"{len(active)} adapters are active ({', '.join(active)}); name the one to work "
                "on with adapter=..."
            )
        adapter = active[0]
    if adapter is None or adapter not in configs:
        raise SurgeryError(f"adapter '{adapter}' is unknown. Known: {', '.join(configs)}.")
    return adapter


def adapter_config(model: nn.Module, adapter: str) -> Any:
    """Return PEFT's configuration of an adapter.

    Args:
        model: A PEFT model, possibly wrapped for several processes.
        adapter: Name of the adapter.
    """
    configs: Any = unwrapped(model).peft_config
    return configs[adapter]


def lora_sites(model: nn.Module, adapter: str) -> dict[str, LoraSite]:
    """Return the live LoRA layers of an adapter.

    Args:
        model: A PEFT model, possibly wrapped for several processes.
        adapter: Name of the adapter.

    Returns:
        Layers by name in the base model, in model order.
    """
    return {
        name: LoraSite(name, layer, adapter)
        for name, layer in _layers(model, adapter)
        if _why_not(layer, adapter) is None
    }


def unsupported(model: nn.Module, adapter: str) -> dict[str, str]:
    """Return the LoRA layers whose rank gradrank cannot change, and why.

    Args:
        model: A PEFT model.
        adapter: Name of the adapter.

    Returns:
        The reason by name in the base model.
    """
    found = {name: _why_not(layer, adapter) for name, layer in _layers(model, adapter)}
    return {name: why for name, why in found.items() if why is not None}


def _layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    for path, layer in unwrapped(model).named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
            name = re.sub(r"(\.base_layer)+$", "", path.removeprefix(PREFIX))
            if isinstance(layer, ParamWrapper):
                # Several may be nested around one module, one per parameter.
                name = f"{name}.{layer.parameter_name}"
            yield name, layer


def _why_not(layer: Any, adapter: str) -> str | None:
    kind = type(layer).__name__
    if isinstance(layer, ParamWrapper | MultiheadAttention):
        return f"is adapted by a {kind} LoRA layer, which fuses several maps in one"
    if adapter not in layer.lora_A or not isinstance(layer.lora_A[adapter], nn.Linear):
        return f"is adapted by a {kind} LoRA layer; only linear ones can change their rank"
    for linear in (layer.lora_A[adapter], layer.lora_B[adapter]):
        form = form_behind(linear)
        if parametrize.is_parametrized(linear) and not isinstance(form, _FORMS):
            return "has a parametrization that gradrank did not make, which no edit can see through"
    return None


def lora_targets(model: nn.Module, adapter: str) -> tuple[Target, ...]:
    """Return the targets that an adapter sits on.

    Args:
        model: A PEFT model.
        adapter: Name of the adapter.

    Returns:
        The targets, in model order.
    """
    names = list(lora_sites(model, adapter))
    found = {site.target.name: site.target for site in find_sites(model, names)}
    return tuple(found[name] for name in names if name in found)


def sync_config(model: nn.Module, adapter: str) -> None:
    """Write the ranks and scales of the live layers into PEFT's configuration.

    Every pattern is anchored and escaped, and layers whose rank gradrank cannot change are
    written too, since what they fall back to may change. A save at any moment then loads in
    stock PEFT.

    Args:
        model: A PEFT model.
        adapter: Name of the adapter.
    """
    config = adapter_config(model, adapter)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in _layers(model, adapter):
        plain = _why_not(layer, adapter) is not None
        ranks[name] = layer.r[adapter] if plain else stored_components(layer, adapter)
        alphas[name] = layer_alpha(layer, adapter, ranks[name])
    if not ranks:
        return
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    usual = [alphas[name] for name, rank in ranks.items() if rank == config.r]
    config.lora_alpha = Counter(usual).most_common(1)[0][0]
    config.rank_pattern = {anchored(n): rank for n, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {anchored(n): a for n, a in alphas.items() if a != config.lora_alpha}
    if config.init_lora_weights == "orthogonal":
        # PEFT initialises before it loads, and refuses odd ranks of this kind.
        config.init_lora_weights = True


def name_targets(model: nn.Module, adapter: str) -> None:
    """Name the remaining targets in PEFT's configuration, after some were dropped.

    Full names as a list, which servers read too, unless one is the end of another module's name;
    then one anchored expression.

    Args:
        model: A PEFT model.
        adapter: Name of the adapter.
    """
    config = adapter_config(model, adapter)
    layers = _layers(model, adapter)
    names = [name for name, layer in layers if not isinstance(layer, ParamWrapper)]
    known = set(names)
    if any(_ends_in(path, known) for path in _paths(model)):
        config.target_modules = "^(?:" + "|".join(re.escape(name) for name in names) + ")$"
        # PEFT takes neither beside an expression, which has chosen the layers already.
        config.layers_to_transform = config.layers_pattern = None
    else:
        config.target_modules = known or None


def _paths(model: nn.Module) -> Iterator[str]:
    return (path.removeprefix(PREFIX) for path, _ in unwrapped(model).named_modules())


def _ends_in(path: str, names: Collection[str]) -> bool:
    """Whether PEFT would take a module for one of the names, though it is not that one."""
    parts = path.split(".")
    return any(".".join(parts[i:]) in names for i in range(1, len(parts)))


def layer_alpha(layer: Any, adapter: str, rank: int) -> float:
    """Return the alpha that gives a layer its present scale at some rank.

    Args:
        layer: A LoRA layer.
        adapter: Name of the adapter.
        rank: The rank.
    """
    scaling, root = float(layer.scaling[adapter]), bool(layer.use_rslora.get(adapter))
    present = layer.lora_alpha[adapter]
    divisor = math.sqrt(rank) if root else rank
    return present if present / divisor == scaling else alpha_for(scaling, rank, root)
