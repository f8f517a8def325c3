"""The states of bitsandbytes, some of them in 8 bits."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradrank.adapters.layouts import SCALARS, comes_from, copied, describe, is_plain, place
from gradrank.ops.blockwise import dequantise_blocks, quantise_blocks
from gradrank.ops.moments import Carry, Role, carry_tensor

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


def carry_blockwise(
    optimizer: Any, parameter: Tensor, state: Mapping[str, Any], carry: Carry, axis: int
) -> dict[str, Any]:
    """Carry a state: state1 (AdEMAMix: two of them stacked) and state2.

    Args:
        optimizer: An optimizer of bitsandbytes.
        parameter: The parameter before the edit.
        state: Its state.
        carry: The edit.
        axis: Rank axis of the parameter.

    Returns:
        The new state.
    """
    new = {key: copied(state[key]) for key in SCALARS if key in state}
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
    index, position = place(optimizer, parameter)
    config = optimizer.get_config(index, position, optimizer.param_groups[index])
    return config["optim_bits"] == 8 and numel >= config["min_8bit_size"]


def misfits_blockwise(
    optimizer: Any, parameter: Tensor, state: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return what in a state is unknown, or has another layout than its key promises.

    Args:
        optimizer: An optimizer of bitsandbytes.
        parameter: The parameter.
        state: Its state.

    Returns:
        One entry per key that does not fit.
    """
    roles = _BLOCKWISE.get(getattr(optimizer, "optimizer_name", ""), ())
    stacked = getattr(optimizer, "optimizer_name", "") == "ademamix"
    fits: dict[str, bool] = {"step": True, "unorm_vec": True}
    blocks = math.ceil(parameter.numel() / _BLOCK)
    for slot in range(1, len(roles) + 1):
        lead = (2,) if stacked and slot == 1 else ()
        values = state.get(f"state{slot}")
        eight = isinstance(values, Tensor) and values.dtype == torch.uint8
        fits[f"state{slot}"] = is_plain(values, (*lead, *parameter.shape), allow_bytes=True)
        if eight:
            fits[f"absmax{slot}"] = is_plain(state.get(f"absmax{slot}"), (*lead, blocks))
            fits[f"qmap{slot}"] = is_plain(state.get(f"qmap{slot}"), (256,))
    kind = type(optimizer).__name__
    wrong = [key for key in {**state, **fits} if not fits.get(key, False)]
    return tuple(f"{k} ({describe(state.get(k))}, not a layout known of {kind})" for k in wrong)


def is_paged(optimizer: Any, parameter: Tensor) -> bool:
    """Tell whether a state is paged, or will be.

    Args:
        optimizer: The optimizer.
        parameter: The parameter.

    Returns:
        Whether it is.
    """
    state = getattr(optimizer, "state", {}).get(parameter, {})
    if any(getattr(value, "is_paged", False) for value in state.values()):
        return True
    large = parameter.device.type != "cpu" and parameter.numel() >= _PAGED_FROM
    return bool(getattr(optimizer, "is_paged", False)) and large


def is_overridden(optimizer: Any, parameter: Tensor) -> bool:
    """Tell whether options hang on a parameter's id or position, which edits change.

    Args:
        optimizer: The optimizer.
        parameter: The parameter.

    Returns:
        Whether it does.
    """
    manager = getattr(optimizer, "mng", None)
    if manager is None or not comes_from(optimizer, "bitsandbytes"):
        return False
    index, _ = place(optimizer, parameter)
    return id(parameter) in manager.pid2config or index in {i for i, _ in manager.index2config}
