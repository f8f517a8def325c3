"""Gradient checkpointing while measuring: a model's repeated blocks, computed again going back.

Switching on the checkpointing of the model's own library would need training mode, and with it
dropout, and would work for models of that library only.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradrank.core.errors import MeasurementError
from gradrank.signals.layers import unwrapped

# What blocks that can be checkpointed inherit from in transformers, which is not imported here.
_MARKED = "GradientCheckpointingLayer"
_ABSENT = object()


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a deep model is a chain of.

    Args:
        model: The model.

    Returns:
        The outermost modules that transformers marks as blocks; else the items of the
        ``nn.ModuleList`` or ``nn.Sequential`` that repeats one class most often; empty if none
        repeats.
    """
    model = unwrapped(model)
    marked = [m for m in model.modules() if _is_marked(m)]
    if marked:
        inner = {id(part) for block in marked for part in block.modules() if part is not block}
        return [block for block in marked if id(block) not in inner]
    chains = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(item) for item in module}) == 1
        and any(True for _ in module[0].children())
    ]
    return max(chains, key=len, default=[])


def checkpoints_itself(model: nn.Module) -> bool:
    """Tell whether a model's own gradient checkpointing is on.

    Args:
        model: The model.

    Returns:
        Whether any of its modules has the flag.
    """
    return any(_checkpoints(module) for module in model.modules())


@contextlib.contextmanager
def checkpointed(model: nn.Module, preserve_rng_state: bool = True) -> Iterator[None]:
    """Let a model's blocks keep only their inputs, and compute the rest again going back.

    The mode of the modules stays as it is. A model whose own checkpointing is on is left to it.
    A block that is given a cache of keys and values runs as it always does: it would be extended
    a second time.

    Args:
        model: The model.
        preserve_rng_state: Whether random numbers are drawn again as they were.

    Yields:
        Nothing.

    Raises:
        MeasurementError: If the model has no repeated blocks.
    """
    blocks = [] if checkpoints_itself(model) else repeated_blocks(model)
    if not blocks and not checkpoints_itself(model):
        raise MeasurementError(
            f"{type(unwrapped(model)).__name__} has no repeated blocks, so it cannot be measured "
            "with checkpointing. Leave checkpointing off, or measure smaller micro-batches."
        )
    before = [(block, vars(block).get("forward", _ABSENT)) for block in blocks]
    try:
        for block in blocks:
            block.forward = _recomputed(block.forward, preserve_rng_state)
        yield
    finally:
        for block, forward in before:
            if forward is not _ABSENT:
                block.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
            else:
                vars(block).pop("forward", None)


@contextlib.contextmanager
def not_checkpointed(model: nn.Module) -> Iterator[None]:
    """Switch a model's own gradient checkpointing off.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    on: list[Any] = [module for module in model.modules() if _checkpoints(module)]
    try:
        for module in on:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True


def _checkpoints(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False) is True


def _is_marked(module: nn.Module) -> bool:
    return any(kind.__name__ == _MARKED for kind in type(module).__mro__)


def _recomputed(forward: Callable[..., Any], preserve_rng_state: bool) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or _has_cache(*args, *kwargs.values()):
            return forward(*args, **kwargs)
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs
        )

    return run


def _has_cache(*values: Any) -> bool:
    return any(type(value).__name__.endswith("Cache") for value in values)
