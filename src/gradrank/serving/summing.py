"""A combined adapter against the sum that it stands for."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from gradrank.adapters.view import adapter_name, lora_sites
from gradrank.core.errors import PlanError
from gradrank.serving.adapter import Adapter, Update
from gradrank.serving.check import Reference, logits


def check_sum(
    model: PeftModel,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    inputs: Mapping[str, Tensor],
    wanted: Reference,
) -> float:
    """Check that a model with a combined adapter computes the sum of several.

    Args:
        model: The base model with the combined adapter.
        adapters: What was combined.
        weights: One per adapter.
        inputs: The check inputs.
        wanted: Of the model.

    Returns:
        Largest difference of a logit.

    Raises:
        PlanError: If it is more than rounding.
    """
    difference = wanted.difference(summed_logits(model, adapters, weights, inputs))
    types = [update.a.dtype for adapter in adapters for update in adapter.updates.values()]
    allowed = max((wanted.tolerance(kind) for kind in types), default=wanted.noise)
    if not difference <= allowed:
        raise PlanError(
            f"the combined adapter differs from the sum of the {len(adapters)} adapters by "
            f"{difference:.3g} in its logits, more than {allowed:.3g}; nothing was written. Please "
            "report this with the adapters' configurations."
        )
    return difference


def summed_logits(
    model: PeftModel,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    inputs: Mapping[str, Tensor],
) -> Tensor:
    """Compute logits with every adapter's own factors and scale, one after another, added up.

    Args:
        model: The base model with an adapter that is switched off meanwhile.
        adapters: What to add up.
        weights: One per adapter.
        inputs: Model inputs.

    Returns:
        Logits.
    """
    name = adapter_name(model)
    scales: list[tuple[Any, float]] = []
    handles = []
    try:
        for target, site in lora_sites(model, name).items():
            parts = [
                (adapter.updates[target], weight)
                for adapter, weight in zip(adapters, weights, strict=True)
                if target in adapter.updates
            ]
            scales.append((site.layer, site.layer.scaling[name]))
            site.layer.scaling[name] = 0.0
            handles.append(site.layer.register_forward_hook(_adding(parts)))
        return logits(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
        for layer, scale in scales:
            layer.scaling[name] = scale


def _adding(parts: Sequence[tuple[Update, float]]) -> Any:
    def hook(_layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].float()
        for update, weight in parts:
            a, b = (factor.to(x.device).float() for factor in (update.a, update.b))
            low = functional.linear(functional.linear(x, a), b)
            output = output + (weight * update.scaling * low).to(output.dtype)
        return output

    return hook
