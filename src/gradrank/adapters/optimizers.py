"""Optimizer state over an edit: carry it by its known layout, swap parameters, roll back."""

import functools
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradrank.adapters.blockwise import carry_blockwise, is_overridden, is_paged, misfits_blockwise
from gradrank.adapters.layouts import carry_known, comes_from, copied, misfits, place
from gradrank.core.errors import SurgeryError, TargetError
from gradrank.ops.moments import Carry

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
    while comes_from(optimizer, "accelerate") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def hookable_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside the wrappers of accelerate, if its steps can be watched.

    Args:
        optimizer: An optimizer, wrapped or not.

    Returns:
        The optimizer.

    Raises:
        SurgeryError: If it lets nobody look at gradients before its step.
    """
    inner = inner_optimizer(optimizer)
    if not hasattr(inner, "register_step_pre_hook"):
        raise SurgeryError(
            f"a {type(inner).__name__} does not let anybody look at gradients before its step. "
            "Use an optimizer of torch's kind."
        )
    return inner


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
        return Carried({key: copied(value) for key, value in state.items()})
    if not state or not carry.carried:
        return Carried({})
    blockwise = comes_from(optimizer, "bitsandbytes")
    wrong = misfits_blockwise if blockwise else misfits
    if problems := wrong(optimizer, parameter, state):
        return Carried({}, problems)
    if blockwise:
        return Carried(carry_blockwise(optimizer, parameter, state, carry, axis))
    return Carried(carry_known(state, carry, axis))


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
    index, position = place(optimizer, old)
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
        groups = self.optimizer.param_groups
        # An optimizer that was built from named parameters keeps their names beside them.
        lists = [g[key] for g in groups for key in ("params", "param_names") if key in g]
        self._lists = [(held, list(held)) for held in lists]
        self._state = dict(self.optimizer.state)

    def replace(self, old: Tensor, new: Tensor, state: Mapping[str, Any] | None) -> None:
        """Put a parameter in the place of another; see :func:`swap`.

        Args:
            old: The parameter that goes.
            new: The one that comes.
            state: Its state.
        """
        swap(self.optimizer, old, new, state)

    def split(self, old: Tensor, parts: Sequence[tuple[Tensor, Mapping[str, Any], str]]) -> None:
        """Put several parameters in the place of one, in one group and in this order.

        Args:
            old: The parameter that goes.
            parts: Per new parameter its state, and its name where the old one was ``weight``.
        """
        index, position = place(self.optimizer, old)
        group, here = self.optimizer.param_groups[index], slice(position, position + 1)
        group["params"][here] = [new for new, _, _ in parts]
        if "param_names" in group:
            stem = group["param_names"][position].removesuffix("weight")
            group["param_names"][here] = [stem + name for _, _, name in parts]
        self.optimizer.state.pop(old, None)
        self.optimizer.state.update({new: dict(state) for new, state, _ in parts if state})

    def remove(self, old: Tensor) -> None:
        """Take a parameter out. A group stays even when empty: schedulers count groups.

        Args:
            old: The parameter.
        """
        index, position = place(self.optimizer, old)
        group = self.optimizer.param_groups[index]
        del group["params"][position]
        if "param_names" in group:
            del group["param_names"][position]
        self.optimizer.state.pop(old, None)

    def rollback(self) -> None:
        """Restore groups, names and state: the same objects in the same order."""
        for held, before in self._lists:
            held[:] = before
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
    if any(comes_from(optimizer, module) for module in _FLATTENING):
        reasons.append(
            f"{kind} flattens or shards the parameters, so that none can change its size. "
            "Under ZeRO-1 or 2 reserve ranks first (fixed-shape mode, gradrank.reserve), or "
            "train with DDP or FSDP2."
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
            lambda p: is_paged(optimizer, p)
        ),
        "under an override of bitsandbytes' GlobalOptimManager; set optim_bits for all": (
            lambda p: held[id(p)] and is_overridden(optimizer, p)
        ),
    }
    for reason, applies in checks.items():
        if names := [name for name, p in parameters.items() if applies(p)]:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            reasons.append(f"{', '.join(names[:3])}{more}: {reason}.")
    return reasons


def _is_flattened(parameter: Tensor) -> bool:
    return bool(
        getattr(parameter, "_fsdp_flattened", False) or type(parameter).__name__ == "FlatParameter"
    )
