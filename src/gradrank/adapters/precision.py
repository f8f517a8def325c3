"""Master weights: whatever is trained is held in float32, also on a base in half precision.

AdamW's step is about the learning rate in size. Next to a weight of 0.02 bfloat16 knows no
difference below 1e-4, so that weights held in it do not move at usual rates. PEFT holds adapters in
float32 for that reason, but the copies of whole modules that it trains beside them
(``modules_to_save``: task heads) keep the dtype of the base.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_HALF = (torch.bfloat16, torch.float16)


def train_in_float32(model: nn.Module) -> None:
    """Hold the trained copies of whole modules of a PEFT model in float32.

    Around such a module its neighbours stay as they are: what it gets is cast to float32, and what
    it gives to the dtype that it had, so that the model runs with autocast and without.

    Args:
        model: A model that PEFT has wrapped. Modules in float32 are not touched.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for trained in module.modules_to_save.values():
                before = to_float32(trained)
                if before is not None:
                    _cast_around(trained, before)


@contextlib.contextmanager
def held_in_float32(module: nn.Module) -> Iterator[None]:
    """Hold a module in float32 while it is trained inside the block, and round it afterwards.

    Args:
        module: The module; its neighbours stay as they are.

    Yields:
        Nothing.
    """
    tensors = [(tensor, tensor.dtype) for tensor in (*module.parameters(), *module.buffers())]
    before = to_float32(module)
    handles = [] if before is None else _cast_around(module, before)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensor, dtype in tensors:
            tensor.data = tensor.data.to(dtype)
            tensor.grad = None


def _cast_around(module: nn.Module, neighbours: torch.dtype) -> list[RemovableHandle]:
    return [
        module.register_forward_pre_hook(_Cast(torch.float32), with_kwargs=True),
        module.register_forward_hook(_CastBack(neighbours)),
    ]


def to_float32(module: nn.Module) -> torch.dtype | None:
    """Cast parameters and buffers in half precision to float32, in place.

    The parameters stay the objects that they are, so that ties and references to them hold. Packed
    (quantised) weights are left alone.

    Args:
        module: The module.

    Returns:
        The half precision that was found first; None if there was nothing to cast.
    """
    found = None
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dtype in _HALF:
            found = found or tensor.dtype
            tensor.data = tensor.data.float()
    return found


@dataclass(frozen=True, slots=True)
class _Cast:
    """Casts what a module gets; no closure, so that models can be copied and pickled."""

    dtype: torch.dtype

    def __call__(self, _module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _cast(args, self.dtype), _cast(kwargs, self.dtype)


@dataclass(frozen=True, slots=True)
class _CastBack:
    """Casts what a module gives."""

    dtype: torch.dtype

    def __call__(self, _module: Any, _args: Any, output: Any) -> Any:
        return _cast(output, self.dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors in plain tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {name: _cast(item, dtype) for name, item in value.items()}
    return value
