"""4-bit weights of bitsandbytes on a CPU, kept in the layout in which they were quantised.

On a processor with bfloat16 instructions, a 4-bit layer of bitsandbytes (0.50) rearranges its codes
in place the first time that it computes in evaluation mode, and rounds its scales to bfloat16. From
then on it computes without a gradient to its input, also in training mode; what reads its codes in
the usual order reads something else; and where a row is no whole number of blocks, the layer fails.
So whatever trains, measures or reads such layers keeps them from doing that.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_SWITCH = "support_avx512bf16_for_cpu"


def keep_quantised_layout(model: nn.Module) -> list[nn.Module]:
    """Put rearranged 4-bit weights back, and let none be rearranged from now on.

    The rounding of scales that were rounded already cannot be undone. Nothing happens on other
    processors and devices, where no layer rearranges anything.

    Args:
        model: A model with or without such layers, wrapped by PEFT or not.

    Returns:
        The layers that would have rearranged their weights.
    """
    held = []
    for module in model.modules():
        if getattr(module, _SWITCH, False):
            setattr(module, _SWITCH, False)
            held.append(module)
        _put_back(module)
    return held


@contextlib.contextmanager
def quantised_layout(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit weights in the layout in which they were quantised, for a while.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    held = keep_quantised_layout(model)
    try:
        yield
    finally:
        for module in held:
            setattr(module, _SWITCH, True)


def _put_back(module: Any) -> None:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None or not getattr(state, "packing_format_for_cpu", False):
        return
    module.state_dict()  # saving a rearranged layer puts its codes back, in place
    found = module.weight.quant_state
    if isinstance(found.absmax, torch.Tensor) and found.absmax.dim() == 2:
        # Scales that are not quantised themselves are left transposed: [blocks in a row, d_out].
        found.absmax = found.absmax.T.reshape(-1).to(torch.float32)
