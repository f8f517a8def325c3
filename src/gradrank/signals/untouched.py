"""A guard that hands a model back as it was found: flags, modes, random state, configuration."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def untouched(model: nn.Module, seed: int) -> Iterator[None]:
    """Freeze and quieten a model inside the block; restore everything after it.

    Inside: no parameter requires a gradient, dropout is off, the generation cache is off, and the
    random state is seeded. After it, also on an exception or Ctrl-C: ``requires_grad``, every
    module's training flag, the configuration and the random states are as before. ``.grad``
    fields are never touched.

    Gradient checkpointing works only in training mode, so modules that checkpoint keep their own
    training flag on, and nothing below them does.

    Args:
        model: The model.
        seed: Seed of the random state inside the block.

    Yields:
        None.
    """
    frozen = [p for p in model.parameters() if p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            model.eval()
            for module, _ in modes:
                if getattr(module, "gradient_checkpointing", False) is True:
                    module.training = True
            if cached:
                config.use_cache = False  # pyright: ignore[reportOptionalMemberAccess]
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for module, training in modes:
                module.training = training
            if cached:
                config.use_cache = cached  # pyright: ignore[reportOptionalMemberAccess]
