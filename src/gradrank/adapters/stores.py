"""Where a live parameter's weight and moments really are: in place, sharded, or with DeepSpeed."""

import hashlib
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradrank.adapters.baking import gathered, sharded_like
from gradrank.signals.distributed import broadcast_in_place, gather, is_distributed


class Store:
    """Parameters and states that are where torch has them, whole or as DTensors (FSDP2)."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def family(self) -> Any:
        """The torch optimizer, which tells what its states mean; None if there is none."""
        return self._optimizer

    def read(self, raw: nn.Parameter) -> Tensor:
        """Return a whole weight; a collective call where it is sharded.

        Args:
            raw: The parameter.

        Returns:
            The weight, detached, not to be written to.
        """
        return gathered(raw)

    def write(self, raw: nn.Parameter, value: Tensor) -> None:
        """Overwrite a weight.

        Args:
            raw: The parameter.
            value: The whole new weight, equal in all processes.
        """
        _copy(raw, value)

    def moments(self, raw: nn.Parameter) -> dict[str, Any]:
        """Return the whole optimizer state of a parameter.

        Args:
            raw: The parameter.

        Returns:
            State by key; empty if there is none.
        """
        held = self._optimizer.state.get(raw, {}) if self._optimizer is not None else {}
        return {k: gathered(v) if isinstance(v, Tensor) else v for k, v in held.items()}

    def write_moments(self, raw: nn.Parameter, state: Mapping[str, Any]) -> None:
        """Overwrite the tensors of a parameter's optimizer state.

        Args:
            raw: The parameter.
            state: Whole tensors by key, of the shapes that are there.
        """
        held = self._optimizer.state[raw]
        for key, value in state.items():
            if isinstance(value, Tensor) and isinstance(held.get(key), Tensor):
                _copy(held[key], value)

    def forget(self, raw: nn.Parameter) -> Callable[[], object]:
        """Let the optimizer begin afresh with a parameter.

        Args:
            raw: The parameter.

        Returns:
            What undoes it.
        """
        state = self._optimizer.state
        held = state.pop(raw)
        return lambda: state.__setitem__(raw, held)


class ZeroStore(Store):
    """Parameters whose master weights and states DeepSpeed keeps in flat partitions (ZeRO-1/2)."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._tools: Any = importlib.import_module("deepspeed.utils")

    @property
    def family(self) -> Any:
        """The torch optimizer inside DeepSpeed's."""
        return self._optimizer.optimizer

    def read(self, raw: nn.Parameter) -> Tensor:
        """Return the master weight, float32; a collective call."""
        return self._tools.safe_get_full_fp32_param(raw).detach().clone()

    def write(self, raw: nn.Parameter, value: Tensor) -> None:
        """Overwrite the master weight and the weight that the model computes with."""
        self._tools.safe_set_full_fp32_param(raw, value.to(raw.device, torch.float32))
        _copy(raw, value)

    def moments(self, raw: nn.Parameter) -> dict[str, Any]:
        """Return the whole optimizer state; empty before the first step."""
        mapping: Any = getattr(raw, "_hp_mapping", None)
        fragment = getattr(mapping, "optim_fragment", None) if mapping is not None else None
        if not self.family.state:
            return {}
        keys = list(fragment) if fragment else ["exp_avg", "exp_avg_sq"]
        read = self._tools.safe_get_full_optimizer_state
        return {key: read(raw, key).detach().clone() for key in keys}

    def write_moments(self, raw: nn.Parameter, state: Mapping[str, Any]) -> None:
        """Overwrite the optimizer state."""
        for key, value in state.items():
            self._tools.safe_set_full_optimizer_state(raw, value, key)

    def forget(self, raw: nn.Parameter) -> Callable[[], object]:
        """Set the state to zero; DeepSpeed has no state of a single parameter to remove."""
        held = self.moments(raw)
        self.write_moments(raw, {key: torch.zeros_like(value) for key, value in held.items()})
        return lambda: self.write_moments(raw, held)


def store_for(optimizer: Any) -> Store:
    """Return where an optimizer keeps things.

    Args:
        optimizer: The optimizer inside accelerate's wrapper; None if there is none.

    Returns:
        The store.
    """
    return ZeroStore(optimizer) if is_zero(optimizer) else Store(optimizer)


def agree(incisions: Iterable[Any]) -> None:
    """Let every process make the first one's incisions, in place.

    Singular vectors have no sign of their own, and machines that differ may choose differently. As
    a rule all choose alike: a checksum shows that, and the tensors travel only where it does not.

    Args:
        incisions: New factors and carries, of equal shapes in all processes.
    """
    if not is_distributed():
        return
    tensors = [
        tensor
        for incision in incisions
        for tensor in (
            *incision.values.values(),
            *(c.matrix for c in incision.carries.values() if c.matrix is not None),
        )
        if tensor.numel()
    ]
    found = gather(_checksum(tensors))
    if any(not torch.equal(found[0], other) for other in found[1:]):
        broadcast_in_place(tensors)


def _checksum(tensors: Iterable[Tensor]) -> Tensor:
    """A digest of the bytes of tensors, ``[32]`` uint8."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def is_zero(optimizer: Any) -> bool:
    """Tell whether an optimizer is one of DeepSpeed's ZeRO optimizers.

    Args:
        optimizer: The optimizer.

    Returns:
        Whether it is.
    """
    return type(optimizer).__module__.startswith("deepspeed.runtime")


def _copy(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(sharded_like(value.detach().to(tensor.device, tensor.dtype), tensor))
