"""The LoRA layers of a model as gradrank names them, and what PEFT's configuration says of them."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from gradrank.adapters.baking import form_behind, learned_tensors
from gradrank.adapters.forms import active_components, form_of
from gradrank.core.errors import SurgeryError
from gradrank.core.targets import Target
from gradrank.signals.layers import find_sites, unwrapped

PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LoraSite:
    """One live LoRA layer.

    Attributes:
        name: Name of the adapted module in the base model.
        layer: PEFT's layer.
        adapter: Name of the adapter.
    """

    name: str
    layer: Any
    adapter: str

    @property
    def rank(self) -> int:
        """Rank in use; under a mask the active components alone."""
        return active_components(self.layer, self.adapter)

    @property
    def masked(self) -> bool:
        """Whether the layer has a fixed shape and a component mask."""
        return form_of(self.layer, self.adapter) == "mask"

    @property
    def scaling(self) -> float:
        """Scale of the update, ``scaling * B A``."""
        return float(self.layer.scaling[self.adapter])

    def linear(self, factor: str) -> nn.Linear:
        """Return the linear module that holds a factor.

        Args:
            factor: ``"A"`` or ``"B"``.
        """
        return (self.layer.lora_A if factor == "A" else self.layer.lora_B)[self.adapter]

    def raw(self, factor: str) -> nn.Parameter:
        """Return the parameter behind a factor: what the optimizer holds.

        Args:
            factor: ``"A"`` (``[r, d_in]``) or ``"B"`` (``[d_out, r]``).
        """
        linear: Any = self.linear(factor)
        if form_behind(linear) is None:
            return linear.weight
        return learned_tensors(linear)["original"]


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
        active = list(getattr(unwrapped(model), "active_adapters", configs))
        if len(active) != 1:
            raise SurgeryError(
                f"{len(active)} adapters are active ({', '.join(active)}); name the one to work "
                "on with adapter=..."
            )
        adapter = active[0]
    if adapter is None or adapter not in configs:
        raise SurgeryError(f"adapter '{adapter}' is unknown. Known: {', '.join(configs)}.")
    return adapter


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
    for name, layer in unwrapped(model).named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
            yield name.removeprefix(PREFIX).removesuffix(".base_layer"), layer


def _why_not(layer: Any, adapter: str) -> str | None:
    kind = type(layer).__name__
    if kind in {"ParamWrapper", "MultiheadAttention"}:
        return f"is adapted by a {kind} LoRA layer, which fuses several maps in one"
    if adapter not in layer.lora_A or not isinstance(layer.lora_A[adapter], nn.Linear):
        return f"is adapted by a {kind} LoRA layer; only linear ones can change their rank"
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

    Every pattern is anchored and escaped. A save at any moment then loads in stock PEFT.

    Args:
        model: A PEFT model.
        adapter: Name of the adapter.
    """
    config: Any = unwrapped(model).peft_config[adapter]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    sites = lora_sites(model, adapter)
    ranks = {name: site.rank for name, site in sites.items()}
    if ranks:
        config.r = Counter(ranks.values()).most_common(1)[0][0]
    root = bool(config.use_rslora)
    alphas = {name: alpha_for(site.scaling, ranks[name], root) for name, site in sites.items()}
    for name, site in sites.items():
        site.layer.lora_alpha[adapter] = alphas[name]
    if alphas:
        usual = [alphas[name] for name, rank in ranks.items() if rank == config.r]
        config.lora_alpha = Counter(usual).most_common(1)[0][0]
    config.rank_pattern = {_anchor(n): rank for n, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {_anchor(n): a for n, a in alphas.items() if a != config.lora_alpha}


def name_targets(model: nn.Module, adapter: str, dropped: Mapping[str, Any]) -> None:
    """Name the remaining targets in PEFT's configuration, after some were dropped.

    Args:
        model: A PEFT model.
        adapter: Name of the adapter.
        dropped: The dropped targets by name.
    """
    config: Any = unwrapped(model).peft_config[adapter]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    if dropped:
        names = lora_sites(model, adapter)
        config.target_modules = "^(?:" + "|".join(re.escape(name) for name in names) + ")$"


def alpha_for(scaling: float, rank: int, root: bool) -> float:
    """Return the alpha from which PEFT computes a scale, to the last bit where that exists.

    Args:
        scaling: The scale.
        rank: Rank of the layer.
        root: Whether PEFT divides by the root of the rank (rsLoRA) or by the rank.

    Returns:
        The alpha; a whole number where it is one.

    Examples:
        >>> alpha_for(2.0, 7, root=False)
        14
    """
    divisor = math.sqrt(rank) if root else rank
    alpha = scaling * divisor
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    whole = float(round(alpha))
    exact = next((a for a in (whole, *near) if a / divisor == scaling), alpha)
    return int(exact) if exact.is_integer() else exact


def _anchor(name: str) -> str:
    return "^" + re.escape(name)
