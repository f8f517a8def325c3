"""The frozen weight under a LoRA layer, read and written as ``[d_out, d_in]``."""

from typing import Any

import torch
from torch import Tensor

from gradrank.core.errors import OptionError


def base_weight(layer: Any, name: str, arm: str) -> Tensor:
    """Return the frozen weight of a LoRA layer.

    Args:
        layer: PEFT's layer.
        name: Name of the target, for messages.
        arm: Name of the baseline, for messages.

    Returns:
        A view of the weight, ``[d_out, d_in]``, whatever way round the module stores it.

    Raises:
        OptionError: If the weight is quantised.
    """
    weight = layer.get_base_layer().weight
    if not torch.is_floating_point(weight) or weight.ndim != 2:
        raise OptionError(
            f"'{arm}' needs the singular directions of the base weights, and that of '{name}' is "
            f"{weight.dtype} {list(weight.shape)} (quantised?). Load the model unquantised."
        )
    return weight.T if layer.fan_in_fan_out else weight


@torch.no_grad()
def singular_parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin singular value decomposition of a weight.

    Args:
        weight: ``[d_out, d_in]``, of any floating dtype.

    Returns:
        U ``[d_out, n]``, σ ``[n]`` falling, and the rows of Vᵀ ``[n, d_in]``, in float32, with
        ``n = min(d_out, d_in)``.
    """
    return torch.linalg.svd(weight.detach().float(), full_matrices=False)
