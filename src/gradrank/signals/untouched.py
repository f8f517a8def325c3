"""A guard that hands a model back as it was found: flags, modes, random state, configuration."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradrank.ops.four_bit import quantised_layout

_SETTINGS = ("use_cache", "problem_type")


@contextlib.contextmanager
def untouched(model: nn.Module, seed: int) -> Iterator[None]:
    """Freeze and quieten a model inside the block; restore everything after it.

    Inside: no parameter requires a gradient, dropout is off, the generation cache is off, 4-bit
    weights keep the layout of their quantisation, and the random state is seeded. After it, also
    on an exception or Ctrl-C: ``requires_grad``, every module's training flag, the configuration
    and the random states are as before. ``.grad`` fields are never touched.

    Gradient checkpointing works only in training mode, so modules that checkpoint keep their own
    training flag on, and nothing below them does; drop-out rates of their own are zero inside.

    Args:
        model: The model.
        seed: Seed of the random state inside the block.

    Yields:
        None.
    """
    guards = (
        _seeded(model, seed),
        _configured(model),
        _frozen(model),
        _quiet(model),
        quantised_layout(model),
    )
    with contextlib.ExitStack() as stack:
        for guard in guards:
            stack.enter_context(guard)
        yield


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed, which would also seed accelerators that this model does not use.
        torch.default_generator.manual_seed(seed)
        for index in devices:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def _configured(model: nn.Module) -> Iterator[None]:
    config = getattr(model, "config", None)
    # transformers notes the kind of labels that a classifier was first called with.
    settings = {key: getattr(config, key) for key in _SETTINGS if hasattr(config, key)}
    try:
        if settings.get("use_cache"):
            config.use_cache = False  # pyright: ignore[reportOptionalMemberAccess]
        yield
    finally:
        for key, value in settings.items():
            setattr(config, key, value)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    checkpointing = [m for m, _ in modes if getattr(m, "gradient_checkpointing", False) is True]
    rates = [(module, name, rate) for module in checkpointing for name, rate in _drop_rates(module)]
    handles: list[RemovableHandle] = []
    try:
        model.eval()
        for module in checkpointing:
            module.training = True
            handles.append(module.register_forward_pre_hook(_start_graph))
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, rate in rates:
            setattr(module, name, rate)
        for handle in handles:
            handle.remove()


def _drop_rates(module: nn.Module) -> list[tuple[str, float]]:
    """Rates that a module passes to functional dropout or layer drop itself."""
    own = vars(module).items()
    return [(name, rate) for name, rate in own if "drop" in name and isinstance(rate, float)]


def _start_graph(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    # Reentrant checkpointing gives gradients only to blocks whose input asks for one, and in a
    # frozen model the first block's does not.
    x = args[0] if args else None
    if not torch.is_grad_enabled() or not isinstance(x, Tensor) or x.requires_grad:
        return None
    if not x.is_floating_point():
        return None
    return (x.detach().requires_grad_().clone(), *args[1:])
