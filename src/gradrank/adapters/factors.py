"""The pair of linear layers behind an adapter, and the reasons why a form cannot stand on it."""

from collections.abc import Iterable
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from gradrank.adapters.baking import form_behind
from gradrank.core.errors import OptionError, TargetError, nearest

_UNSUPPORTED = (Embedding, MultiheadAttention, ParamWrapper)


def linears(layer: nn.Module, adapter: str) -> tuple[nn.Linear, nn.Linear]:
    """Return ``lora_A`` and ``lora_B`` of an adapter.

    Args:
        layer: A LoRA layer on a linear target.
        adapter: Name of the adapter.

    Returns:
        The two linear layers.

    Raises:
        TargetError: If the module is no LoRA layer, lacks the adapter, or is of a kind whose
            factors are not linear layers.
    """
    if not isinstance(layer, LoraLayer):
        raise TargetError(f"a {type(layer).__name__} is not a LoRA layer. Pass one of PEFT's.")
    if isinstance(layer, _UNSUPPORTED) or adapter in layer.lora_embedding_A:
        raise TargetError(
            f"the LoRA layer is of kind {type(layer).__name__}, whose factors are not the pair of "
            "linear layers that a form needs. Leave it out of the targets."
        )
    if adapter not in layer.lora_A:
        raise TargetError(
            f"the layer has no adapter '{adapter}'. {nearest(adapter, layer.lora_A.keys())}"
        )
    a: Any = layer.lora_A[adapter]
    b: Any = layer.lora_B[adapter]
    for linear in (a, b):
        if not isinstance(linear, nn.Linear):
            raise TargetError(
                f"the factors of this LoRA {type(layer).__name__} are {type(linear).__name__} "
                "modules, and a form needs linear layers. Leave it out of the targets."
            )
    return a, b


def plain_linears(layer: nn.Module, adapter: str) -> tuple[nn.Linear, nn.Linear]:
    """Return ``lora_A`` and ``lora_B`` of an adapter that can be given a form.

    Args:
        layer: A LoRA layer on a linear target.
        adapter: Name of the adapter.

    Returns:
        The two linear layers.

    Raises:
        TargetError: As :func:`linears`, and if the adapter has a form already, is merged, sharded
            or of a variant of LoRA that uses its factors in another way.
    """
    a, b = linears(layer, adapter)
    for linear in (a, b):
        if parametrize.is_parametrized(linear):
            form = form_behind(linear)
            raise TargetError(
                f"adapter '{adapter}' already has "
                + (f"form '{form.kind}'. Call detach first." if form else "a parametrization.")
            )
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None and not isinstance(variant, DoraLinearVariant):
        raise TargetError(
            f"adapter '{adapter}' is a {type(variant).__name__}, which uses its factors in its "
            "own way. Use plain LoRA, rsLoRA or DoRA."
        )
    check_unmerged(layer, adapter)
    check_whole(adapter, (a.weight, b.weight))
    if a.weight.shape != (a.out_features, a.in_features) or a.out_features != b.in_features:
        raise TargetError(
            f"the factors of adapter '{adapter}' are {list(a.weight.shape)} and "
            f"{list(b.weight.shape)}, not a whole pair of rank {a.out_features} (sharded?). "
            "Attach forms before the model is sharded."
        )
    return a, b


def check_unmerged(layer: nn.Module, adapter: str) -> None:
    """Refuse an adapter that is merged.

    Args:
        layer: A LoRA layer.
        adapter: Name of the adapter.

    Raises:
        TargetError: If it is.
    """
    if adapter in getattr(layer, "merged_adapters", ()):
        raise TargetError(
            f"adapter '{adapter}' is merged into the base weight, from which it could not be "
            "subtracted again afterwards. Call unmerge first."
        )


def check_whole(adapter: str, tensors: Iterable[Tensor]) -> None:
    """Refuse an adapter whose tensors are sharded.

    Args:
        adapter: Name of the adapter.
        tensors: Its tensors.

    Raises:
        TargetError: If one is a DTensor.
    """
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        raise TargetError(
            f"adapter '{adapter}' is sharded (FSDP2), where parameters cannot change shape. "
            "Attach and detach forms before fully_shard, or on a model that is not sharded."
        )


def check_active(active: int, rank: int, least: int = 1) -> None:
    """Refuse a number of active components that the layer cannot have.

    Args:
        active: Components that are to count.
        rank: Components of the layer.
        least: Fewest components that may be active.

    Raises:
        OptionError: If it is not an integer in ``least..rank``.
    """
    if isinstance(active, bool) or not isinstance(active, int) or not least <= active <= rank:
        off = " To switch a target off altogether, drop it." if least else ""
        raise OptionError(
            f"active={active!r} is not an integer in {least}..{rank}, the rank of the layer.{off}"
        )
