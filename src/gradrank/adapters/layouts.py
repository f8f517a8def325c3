"""What optimizers keep per parameter: known keys, their layouts, and how they are carried."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradrank.core.errors import TargetError
from gradrank.ops.moments import Carry, Role, carry_centred, carry_factored, carry_tensor

# What a key holds, wherever it has the parameter's shape. The names are those of torch and of
# nearly every optimizer written for it; any other key resets the state.
_ROLES: dict[str, Role] = {
    "exp_avg": "first",  # the Adam family, Lion; in transformers' Adafactor a mean of updates
    "momentum_buffer": "first",  # SGD, Muon; in RMSprop of scaled gradients
    "grad_avg": "first",
    "exp_avg_sq": "second",
    "max_exp_avg_sq": "second",
    "square_avg": "second",
    "sum": "second",
    "variance": "second",
    "exp_inf": "magnitude",
}
SCALARS = ("step", "mu_product", "RMS", "unorm_vec")
_FACTORED = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))  # torch, transformers


def carry_known(state: Mapping[str, Any], carry: Carry, axis: int) -> dict[str, Any]:
    """Carry a state whose layout is known.

    Args:
        state: The state, whole tensors.
        carry: The edit.
        axis: Rank axis of the parameter.

    Returns:
        The new state.
    """
    new = {}
    for key, value in state.items():
        if key in _ROLES and value is not None:
            new[key] = carry_tensor(value, carry, axis, _ROLES[key])
        else:
            new[key] = copied(value)
    if "square_avg" in state and "grad_avg" in state:
        new["square_avg"] = carry_centred(state["square_avg"], state["grad_avg"], carry, axis)
    for pair in _FACTORED:
        if pair[0] in state:
            along, across = pair[axis], pair[1 - axis]
            # torch keeps the reduced axis with length 1, transformers drops it.
            at = axis if state[along].dim() == 2 else 0
            new[along], new[across] = carry_factored(state[along], state[across], carry, at)
    return new


def misfits(optimizer: Any, parameter: Tensor, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what in a state is unknown, or has another layout than its key promises.

    Args:
        optimizer: The optimizer, for its name.
        parameter: The parameter.
        state: Its state.

    Returns:
        One entry per key that does not fit.
    """
    shape = tuple(parameter.shape)
    layouts = dict.fromkeys(_ROLES, shape)
    if len(shape) == 2:
        layouts |= {"row_var": (shape[0], 1), "col_var": (1, shape[1])}
        layouts |= {"exp_avg_sq_row": shape[:1], "exp_avg_sq_col": shape[1:]}
    partner = {a: b for pair in _FACTORED for a, b in (pair, pair[::-1])}
    kind = type(optimizer).__name__
    found = []
    for key, value in state.items():
        if key in SCALARS:
            fits = not isinstance(value, Tensor) or value.numel() == 1
        elif key in layouts and partner.get(key, key) in state:
            fits = (value is None and key in _ROLES) or is_plain(value, layouts[key])
        else:
            fits = False
        if not fits:
            found.append(f"{key} ({describe(value)}, not a layout known of {kind})")
    return tuple(found)


def is_plain(value: Any, shape: tuple[int, ...], allow_bytes: bool = False) -> bool:
    """Tell whether a value is an ordinary tensor; subclasses hold quantised or sharded values.

    Args:
        value: Anything.
        shape: The shape it must have.
        allow_bytes: Whether it may hold 8-bit codes.

    Returns:
        Whether it is.
    """
    return (
        type(value) in {Tensor, nn.Parameter}
        and tuple(value.shape) == tuple(shape)
        and (value.is_floating_point() or (allow_bytes and value.dtype == torch.uint8))
    )


def describe(value: Any) -> str:
    """Return the kind and the shape of a value, for messages.

    Args:
        value: Anything.

    Returns:
        The text.
    """
    kind = type(value).__name__
    return f"{kind} {tuple(value.shape)}" if isinstance(value, Tensor) else kind


def copied(value: Any) -> Any:
    """Return a value that shares no storage with the given one.

    Args:
        value: Anything; only tensors are copied.

    Returns:
        The copy.
    """
    return value.detach().clone() if isinstance(value, Tensor) else value


def place(optimizer: Any, parameter: Tensor) -> tuple[int, int]:
    """Return group and position of a parameter.

    Args:
        optimizer: The optimizer.
        parameter: The parameter.

    Returns:
        Index of the group, index in the group.

    Raises:
        TargetError: If the optimizer does not hold it.
    """
    for index, group in enumerate(optimizer.param_groups):
        for position, held in enumerate(group["params"]):
            if held is parameter:
                return index, position
    raise TargetError(
        f"the optimizer holds no such parameter of shape {tuple(parameter.shape)}. Build the "
        "optimizer from the model's trainable parameters, after the adapter is there."
    )


def comes_from(thing: Any, module: str) -> bool:
    """Tell whether a thing is of a class, or of a child of one, that a package defines.

    Args:
        thing: Anything.
        module: Name of the package or module.

    Returns:
        Whether it is.
    """
    names = (cls.__module__ for cls in type(thing).__mro__)
    return any(name == module or name.startswith(module + ".") for name in names)
