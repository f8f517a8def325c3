"""The tensors of a statistic, as named parts: checked, moved, and taken out by their prefix."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gradrank.core.errors import MeasurementError


def refuse_non_finite(tensors: dict[str, Tensor], batch: int) -> None:
    """Raise if any tensor holds NaN or infinity.

    Args:
        tensors: Gradients or sketches per target.
        batch: Index of the batch.

    Raises:
        MeasurementError: Naming the batch and the first targets concerned.
    """
    if not tensors:
        return
    first = next(iter(tensors.values())).device
    sums = [tensor.sum(dtype=torch.float64).to(first) for tensor in tensors.values()]
    finite = torch.isfinite(torch.stack(sums)).tolist()
    if all(finite):
        return
    bad = [name for name, ok in zip(tensors, finite, strict=True) if not ok]
    shown = ", ".join(f"'{name}'" for name in bad[:3]) + (" and others" if len(bad) > 3 else "")
    raise MeasurementError(
        f"the gradient of {shown} is NaN or infinite in batch {batch} ({len(bad)} of "
        f"{len(tensors)} targets). Look at that batch, or measure in float32 or bfloat16."
    )


def to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move vectors to the CPU, equal lengths together: a copy per length, not one per target.

    Args:
        tensors: Vectors by name, ``[D]`` each.

    Returns:
        The same vectors on the CPU.
    """
    groups: dict[tuple[torch.device, torch.Size], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.shape), []).append(name)
    moved: dict[str, Tensor] = {}
    for names in groups.values():
        stacked = torch.stack([tensors[name] for name in names]).cpu()
        moved |= dict(zip(names, stacked.unbind(), strict=True))
    return moved


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose keys begin with a prefix, without it.

    Args:
        tensors: Tensors by key.
        prefix: The prefix.

    Returns:
        Tensors by the rest of their keys.
    """
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
