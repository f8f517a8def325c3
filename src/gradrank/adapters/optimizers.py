"""Optimizer state over an edit: carry it by its known layout, swap parameters, roll back."""

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradrank.core.errors import TargetError
from gradrank.ops.moments import (
    Carry,
    Role,
    carry_centred,
    carry_factored,
    carry_tensor,
    dequantise_blocks,
    quantise_blocks,
)

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
_SCALARS = ("step", "mu_product", "RMS", "unorm_vec")
_FACTORED = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))  # torch, transformers
# bitsandbytes: what state1 and state2 hold, by the name of its kernel.
_BLOCKWISE: dict[str, tuple[Role, ...]] = {
    "adam": ("first", "second"),
    "lamb": ("first", "second"),
    "ademamix": ("first", "second"),
    "momentum": ("first",),
    "lars": ("first",),
    "lion": ("first",),
    "rmsprop": ("second",),
    "adagrad": ("second",),
}
_BLOCK = 256
_QMAPS = ("dynamic", "udynamic")
_PAGED_FROM = 100_000
_FLATTENING = (
    "deepspeed.runtime",
    "fairscale",
    "megatron",
    "torch.distributed.optim.zero_redundancy_optimizer",
)


@dataclass(frozen=True, slots=True)
class Carried:
    """The state of one parameter after an edit.

    Attributes:
        state: The new state; empty where the optimizer shall begin afresh.
        reset: Why it begins afresh, one entry per key that could not be carried; else empty.
    """

    state: dict[str, Any]
    reset: tuple[str, ...] = ()


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside the wrappers of accelerate.

    Args:
        optimizer: An optimizer, wrapped or not.

    Returns:
        The optimizer that holds groups and state.
    """
    while _comes_from(optimizer, "accelerate") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def carry_state(
    optimizer: Any, parameter: Tensor, state: Mapping[str, Any], carry: Carry, axis: int
) -> Carried:
    """Carry the state of one parameter over an edit, without touching optimizer or state.

    Moments of the parameter's shape follow :func:`gradrank.ops.moments.carry_tensor`; Adafactor's
    row and column means :func:`gradrank.ops.moments.carry_factored`, an approximation when
    components go or come; step counts are kept. A selection is bitwise, a rotation exact for what
    is linear in the gradient (all first moments but the two of scaled gradients: RMSprop's
    momentum and Adafactor's ``exp_avg``).

    Moments that bitsandbytes keeps in 8 bits are dequantised, carried and quantised again, as
    each of its own steps does, so that they move by up to one rounding; whether the result has 8
    or 32 bits follows its own rule for the new size.

    Args:
        optimizer: The optimizer, for its family and options.
        parameter: The parameter before the edit.
        state: Its state, with full tensors (not the shards of a distributed one).
        carry: The edit.
        axis: Rank axis of the parameter.

    Returns:
        The new state, sharing no storage that a step writes to with the old one. If any key is
        unknown or has an unexpected layout, the whole state is dropped, and named.
    """
    optimizer = inner_optimizer(optimizer)
    axis %= parameter.dim()
    carry.check(parameter.shape[axis])
    if carry.keeps_all(parameter.shape[axis]):
        return Carried({key: _copy(value) for key, value in state.items()})
    if not state or not carry.carried:
        return Carried({})
    blockwise = _comes_from(optimizer, "bitsandbytes")
    misfits = _misfits_blockwise if blockwise else _misfits
    if problems := misfits(optimizer, parameter, state):
        return Carried({}, problems)
    if blockwise:
        return Carried(_carry_blockwise(optimizer, parameter, state, carry, axis))
    return Carried(_carry_known(state, carry, axis))


def swap(optimizer: Any, old: Tensor, new: Tensor, state: Mapping[str, Any] | None) -> None:
    """Put a parameter in the place of another: same group, same position.

    Args:
        optimizer: The optimizer, wrapped by accelerate or not.
        old: The parameter that goes.
        new: The one that comes; ``old`` itself to exchange its state only.
        state: The new one's state; empty or None to begin afresh.

    Raises:
        TargetError: If the optimizer does not hold ``old``, or holds ``new`` already.
    """
    optimizer = inner_optimizer(optimizer)
    index, position = _place(optimizer, old)
    if new is not old and any(
        any(map(functools.partial(operator.is_, new), group["params"]))
        for group in optimizer.param_groups
    ):
        raise TargetError(
            f"the optimizer holds the new parameter {tuple(new.shape)} already. Pass a new one."
        )
    optimizer.param_groups[index]["params"][position] = new
    optimizer.state.pop(old, None)
    if state:
        optimizer.state[new] = dict(state)


class OptimizerChange:
    """Changes of an optimizer's parameters that can be taken back, as long as no step is taken.

    Attributes:
        optimizer: The optimizer that holds groups and state.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = inner_optimizer(optimizer)
        self._groups = [(g["params"], list(g["params"])) for g in self.optimizer.param_groups]
        self._state = dict(self.optimizer.state)

    def replace(self, old: Tensor, new: Tensor, state: Mapping[str, Any] | None) -> None:
        """Put a parameter in the place of another; see :func:`swap`.

        Args:
            old: The parameter that goes.
            new: The one that comes.
            state: Its state.
        """
        swap(self.optimizer, old, new, state)

    def remove(self, old: Tensor) -> None:
        """Take a parameter out. A group stays even when empty: schedulers count groups.

        Args:
            old: The parameter.
        """
        index, position = _place(self.optimizer, old)
        del self.optimizer.param_groups[index]["params"][position]
        self.optimizer.state.pop(old, None)

    def rollback(self) -> None:
        """Restore groups and state: the same objects in the same order."""
        for params, before in self._groups:
            params[:] = before
        self.optimizer.state.clear()
        self.optimizer.state.update(self._state)


def refusals(optimizer: Any, parameters: Mapping[str, Tensor] | Sequence[Tensor]) -> list[str]:
    """List every reason why the states of some parameters cannot be carried.

    Args:
        optimizer: The optimizer, wrapped by accelerate or not.
        parameters: The parameters, by name or plain.

    Returns:
        The reasons, each with what to do; empty if there is none.
    """
    optimizer = inner_optimizer(optimizer)
    if isinstance(parameters, Sequence):
        parameters = {f"#{i} {tuple(p.shape)}": p for i, p in enumerate(parameters)}
    kind = type(optimizer).__name__
    reasons = []
    if any(_comes_from(optimizer, module) for module in _FLATTENING):
        reasons.append(
            f"{kind} flattens or shards the parameters, so that none can change its size. Use the "
            "fixed-shape mode, or DDP without it."
        )
    if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
        reasons.append(f"{kind} has no state per LoRA component. Use AdamW, SGD or Adafactor.")
    groups = getattr(optimizer, "param_groups", [])
    held = Counter(id(p) for group in groups for p in group["params"])
    checks: dict[str, Callable[[Tensor], Any]] = {
        "not in the optimizer; build the optimizer after the adapter": lambda p: not held[id(p)],
        "in the optimizer more than once; list each parameter once": lambda p: held[id(p)] > 1,
        "flattened by FSDP; use FSDP2, or the fixed-shape mode": _is_flattened,
        "stepped by a hook during backward; use an optimizer that steps afterwards": (
            lambda p: getattr(p, "_post_accumulate_grad_hooks", None)
        ),
        "paged by bitsandbytes; use its optimizer without paging": (
            lambda p: _is_paged(optimizer, p)
        ),
        "under an override of bitsandbytes' GlobalOptimManager; set optim_bits for all": (
            lambda p: held[id(p)] and _is_overridden(optimizer, p)
        ),
    }
    for reason, applies in checks.items():
        if names := [name for name, p in parameters.items() if applies(p)]:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            reasons.append(f"{', '.join(names[:3])}{more}: {reason}.")
    return reasons


def _carry_known(state: Mapping[str, Any], carry: Carry, axis: int) -> dict[str, Any]:
    new = {}
    for key, value in state.items():
        if key in _ROLES and value is not None:
            new[key] = carry_tensor(value, carry, axis, _ROLES[key])
        else:
            new[key] = _copy(value)
    if "square_avg" in state and "grad_avg" in state:
        new["square_avg"] = carry_centred(state["square_avg"], state["grad_avg"], carry, axis)
    for pair in _FACTORED:
        if pair[0] in state:
            along, across = pair[axis], pair[1 - axis]
            # torch keeps the reduced axis with length 1, transformers drops it.
            at = axis if state[along].dim() == 2 else 0
            new[along], new[across] = carry_factored(state[along], state[across], carry, at)
    return new


def _misfits(optimizer: Any, parameter: Tensor, state: Mapping[str, Any]) -> tuple[str, ...]:
    """What in a state is unknown, or has another layout than its key promises."""
    shape = tuple(parameter.shape)
    layouts = dict.fromkeys(_ROLES, shape)
    if len(shape) == 2:
        layouts |= {"row_var": (shape[0], 1), "col_var": (1, shape[1])}
        layouts |= {"exp_avg_sq_row": shape[:1], "exp_avg_sq_col": shape[1:]}
    partner = {a: b for pair in _FACTORED for a, b in (pair, pair[::-1])}
    kind = type(optimizer).__name__
    found = []
    for key, value in state.items():
        if key in _SCALARS:
            fits = not isinstance(value, Tensor) or value.numel() == 1
        elif key in layouts and partner.get(key, key) in state:
            fits = (value is None and key in _ROLES) or _is_plain(value, layouts[key])
        else:
            fits = False
        if not fits:
            found.append(f"{key} ({_describe(value)}, not a layout known of {kind})")
    return tuple(found)


def _is_plain(value: Any, shape: tuple[int, ...], allow_bytes: bool = False) -> bool:
    """Whether a value is an ordinary tensor; subclasses hold quantised or sharded values."""
    return (
        type(value) in {Tensor, nn.Parameter}
        and tuple(value.shape) == tuple(shape)
        and (value.is_floating_point() or (allow_bytes and value.dtype == torch.uint8))
    )


def _describe(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} {tuple(value.shape)}" if isinstance(value, Tensor) else kind


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _place(optimizer: Any, parameter: Tensor) -> tuple[int, int]:
    """Group and position of a parameter."""
    for index, group in enumerate(optimizer.param_groups):
        for position, held in enumerate(group["params"]):
            if held is parameter:
                return index, position
    raise TargetError(
        f"the optimizer holds no such parameter of shape {tuple(parameter.shape)}. Build the "
        "optimizer from the model's trainable parameters, after the adapter is there."
    )


def _comes_from(thing: Any, module: str) -> bool:
    names = (cls.__module__ for cls in type(thing).__mro__)
    return any(name == module or name.startswith(module + ".") for name in names)


def _is_flattened(parameter: Tensor) -> bool:
    return bool(
        getattr(parameter, "_fsdp_flattened", False) or type(parameter).__name__ == "FlatParameter"
    )


def _carry_blockwise(
    optimizer: Any, parameter: Tensor, state: Mapping[str, Any], carry: Carry, axis: int
) -> dict[str, Any]:
    """The states of bitsandbytes: state1 (AdEMAMix: two of them stacked) and state2."""
    new = {key: _copy(state[key]) for key in _SCALARS if key in state}
    numel = parameter.numel() // parameter.shape[axis] * carry.size
    eight = _wants_8_bits(optimizer, parameter, numel)
    for slot, role in enumerate(_BLOCKWISE[optimizer.optimizer_name]):
        dense = _dequantised(state, slot + 1, parameter.dim())
        lead = dense.dim() - parameter.dim()
        moved = carry_tensor(dense, carry, axis + lead, role)
        qmap = state.get(f"qmap{slot + 1}", optimizer.name2qmap.get(_QMAPS[slot]))
        new |= {f"state{slot + 1}": moved}
        if eight and qmap is not None:
            new |= _quantised(moved, slot + 1, qmap.to(moved.device), lead)
    return new


def _dequantised(state: Mapping[str, Any], slot: int, dims: int) -> Tensor:
    values = state[f"state{slot}"]
    if values.dtype != torch.uint8:
        return values
    absmax, qmap = state[f"absmax{slot}"], state[f"qmap{slot}"]
    if values.dim() == dims:
        return dequantise_blocks(values, absmax, qmap, _BLOCK)
    pairs = zip(values, absmax, strict=True)
    return torch.stack([dequantise_blocks(v, a, qmap, _BLOCK) for v, a in pairs])


def _quantised(moved: Tensor, slot: int, qmap: Tensor, lead: int) -> dict[str, Tensor]:
    found = [quantise_blocks(m, qmap, _BLOCK) for m in (moved if lead else [moved])]
    values, scales = zip(*found, strict=True)
    return {
        f"state{slot}": torch.stack(values) if lead else values[0],
        f"absmax{slot}": torch.stack(scales) if lead else scales[0],
        f"qmap{slot}": qmap,
    }


def _wants_8_bits(optimizer: Any, parameter: Tensor, numel: int) -> bool:
    """Whether bitsandbytes would itself keep the states of that many elements in 8 bits."""
    index, position = _place(optimizer, parameter)
    config = optimizer.get_config(index, position, optimizer.param_groups[index])
    return config["optim_bits"] == 8 and numel >= config["min_8bit_size"]


def _misfits_blockwise(
    optimizer: Any, parameter: Tensor, state: Mapping[str, Any]
) -> tuple[str, ...]:
    roles = _BLOCKWISE.get(getattr(optimizer, "optimizer_name", ""), ())
    stacked = getattr(optimizer, "optimizer_name", "") == "ademamix"
    fits: dict[str, bool] = {"step": True, "unorm_vec": True}
    blocks = math.ceil(parameter.numel() / _BLOCK)
    for slot in range(1, len(roles) + 1):
        lead = (2,) if stacked and slot == 1 else ()
        values = state.get(f"state{slot}")
        eight = isinstance(values, Tensor) and values.dtype == torch.uint8
        fits[f"state{slot}"] = _is_plain(values, (*lead, *parameter.shape), allow_bytes=True)
        if eight:
            fits[f"absmax{slot}"] = _is_plain(state.get(f"absmax{slot}"), (*lead, blocks))
            fits[f"qmap{slot}"] = _is_plain(state.get(f"qmap{slot}"), (256,))
    kind = type(optimizer).__name__
    wrong = [key for key in {**state, **fits} if not fits.get(key, False)]
    return tuple(f"{k} ({_describe(state.get(k))}, not a layout known of {kind})" for k in wrong)


def _is_paged(optimizer: Any, parameter: Tensor) -> bool:
    state = getattr(optimizer, "state", {}).get(parameter, {})
    if any(getattr(value, "is_paged", False) for value in state.values()):
        return True
    large = parameter.device.type != "cpu" and parameter.numel() >= _PAGED_FROM
    return bool(getattr(optimizer, "is_paged", False)) and large


def _is_overridden(optimizer: Any, parameter: Tensor) -> bool:
    """Whether bitsandbytes holds options by the parameter's id or position, which edits change."""
    manager = getattr(optimizer, "mng", None)
    if manager is None or not _comes_from(optimizer, "bitsandbytes"):
        return False
    index, _ = _place(optimizer, parameter)
    return id(parameter) in manager.pid2config or index in {i for i, _ in manager.index2config}
