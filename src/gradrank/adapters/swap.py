"""Put new factors in place: as new parameters, or inside parameters of a fixed shape."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from gradrank.adapters.layer_forms import set_active
from gradrank.adapters.optimizers import OptimizerChange, carry_state
from gradrank.adapters.stores import Store
from gradrank.adapters.view import LoraSite, adapter_config, layer_alpha
from gradrank.core.errors import SurgeryError
from gradrank.ops.moments import Carry
from gradrank.signals.layers import unwrapped
from gradrank.signals.path import RANK_AXIS

AXIS = RANK_AXIS


@dataclass(frozen=True)
class Incision:
    """The new factors of one layer, worked out but not yet in place.

    Attributes:
        site: The layer.
        rank: Rank after the edit; 0 for a target that is dropped, or at a fixed shape switched
            off.
        values: New ``"A" [rank, d_in]``, ``"B" [d_out, rank]`` and in the SVD form
            ``"lam" [rank]``.
        carries: Per factor, how the components of its optimizer state follow; the state of a
            factor that is missing begins afresh.
    """

    site: LoraSite
    rank: int
    values: Mapping[str, Tensor] = field(default_factory=dict)
    carries: Mapping[str, Carry] = field(default_factory=dict)


class Rollback:
    """A context manager that undoes what was done inside if something fails there."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._undo.clear()
            return
        failed = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as another:  # the rest has to be undone too
                failed.append(f"{type(another).__name__}: {another}")
        if isinstance(error, Exception):
            state = "was undone; model and optimizer are as they were"
            if failed:
                state = f"could not be undone entirely ({'; '.join(failed)}); load a checkpoint"
            raise SurgeryError(
                f"moving capacity failed and {state}: {type(error).__name__}: {error}"
            ) from error

    def push(self, undo: Callable[[], object]) -> None:
        """Remember how to undo what is about to be done.

        Args:
            undo: Called, last one first, if a later step fails.
        """
        self._undo.append(undo)

    def remember_config(self, model: nn.Module, adapter: str) -> None:
        """Remember PEFT's configuration of an adapter.

        Args:
            model: The PEFT model.
            adapter: Name of the adapter.
        """
        held = vars(adapter_config(model, adapter))
        before = dict(held)

        def undo() -> None:
            held.clear()
            held.update(before)

        self.push(undo)


class Replace:
    """Replaces parameters by ones of another shape, in the layer and in the optimizer."""

    def __init__(self, rollback: Rollback, model: nn.Module, optimizer: Any) -> None:
        self._rollback, self._model = rollback, unwrapped(model)
        self._optimizer = optimizer
        self._change = None if optimizer is None else OptimizerChange(optimizer)
        self._held: set[int] = set()
        if self._change is not None:
            rollback.push(self._change.rollback)
            groups = self._change.optimizer.param_groups
            self._held = {id(parameter) for group in groups for parameter in group["params"]}

    def apply(self, incision: Incision) -> bool:
        """Put one layer's new factors in place.

        Args:
            incision: The new factors.

        Returns:
            Whether the optimizer's state could be carried.
        """
        site = incision.site
        if incision.rank == 0:
            self._drop(site)
            return True
        self._remember(site)
        known = [self._replace(site, factor, incision) for factor in site.factors]
        site.linear("A").out_features = site.linear("B").in_features = incision.rank
        site.layer.r[site.adapter] = incision.rank
        site.layer.lora_alpha[site.adapter] = layer_alpha(site.layer, site.adapter, incision.rank)
        return all(known)

    def _replace(self, site: LoraSite, factor: str, incision: Incision) -> bool:
        old = site.raw(factor)
        value = incision.values[factor].to(device=old.device, dtype=old.dtype).contiguous()
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        known = True
        if self._change is not None and id(old) in self._held:
            state = dict(self._optimizer.state.get(old, {}))
            carry = incision.carries[factor]
            carried = carry_state(self._optimizer, old, state, carry, AXIS[factor])
            known = not carried.reset
            self._change.replace(old, new, carried.state)
        site.assign(factor, new)
        return known

    def _remember(self, site: LoraSite) -> None:
        learned = site.learned()
        rank, alpha = site.layer.r[site.adapter], site.layer.lora_alpha[site.adapter]

        def undo() -> None:
            for factor, parameter in learned.items():
                site.assign(factor, parameter)
            site.linear("A").out_features = site.linear("B").in_features = rank
            site.layer.r[site.adapter] = rank
            site.layer.lora_alpha[site.adapter] = alpha

        self._rollback.push(undo)

    def _drop(self, site: LoraSite) -> None:
        base = site.layer.get_base_layer()
        factors = site.learned().values()
        places = [
            (parent, leaf)
            for parent in self._model.modules()
            for leaf, child in parent._modules.items()
            if child is site.layer
        ]
        for parent, leaf in places:
            self._rollback.push(functools.partial(setattr, parent, leaf, site.layer))
            setattr(parent, leaf, base)
        for parameter in factors:
            if self._change is not None and id(parameter) in self._held:
                self._change.remove(parameter)


class FixedShape:
    """Writes new factors into the first components of parameters whose shape stays.

    Under DistributedDataParallel, FSDP2 and DeepSpeed parameters cannot be replaced; components
    that are not in use are zero in the moments and masked in the weights. An incision of the
    present rank needs no mask.
    """

    def __init__(self, rollback: Rollback, store: Store) -> None:
        self._rollback, self._store = rollback, store

    def apply(self, incision: Incision) -> bool:
        """Write one layer's new factors.

        Args:
            incision: The new factors.

        Returns:
            Whether the optimizer's state could be carried.
        """
        site, before = incision.site, incision.site.rank
        known = True
        for factor, raw in site.learned().items():
            axis, carry = AXIS[factor], incision.carries.get(factor)
            if carry is None or not carry.carried:
                self._forget(raw)
            else:
                known &= self._carry(raw, _widened(carry, before, raw.shape[axis]), axis)
            there = self._store.read(raw).clone()
            self._rollback.push(functools.partial(self._store.write, raw, there))
            self._store.write(raw, _padded(incision.values[factor], raw.shape[axis], axis))
            self._rollback.push(functools.partial(setattr, raw, "grad", raw.grad))
            raw.grad = None
        if incision.rank != before:
            self._rollback.push(lambda: set_active(site.layer, site.adapter, before))
            set_active(site.layer, site.adapter, incision.rank)
        return known

    def _forget(self, raw: nn.Parameter) -> None:
        """Let the state of one factor begin afresh."""
        if self._store.moments(raw):
            self._rollback.push(self._store.forget(raw))

    def _carry(self, raw: nn.Parameter, carry: Carry, axis: int) -> bool:
        """Carry the moments of one factor, in place; False if their layout is unknown."""
        store = self._store
        held = store.moments(raw)
        if not held:
            return True
        carried = carry_state(store.family, raw, held, carry, axis)
        if carried.reset:
            self._rollback.push(store.forget(raw))
            return False
        there = {k: v.clone() if isinstance(v, Tensor) else v for k, v in held.items()}
        self._rollback.push(functools.partial(store.write_moments, raw, there))
        store.write_moments(raw, carried.state)
        return True


def _widened(carry: Carry, used: int, size: int) -> Carry:
    """The same carry for a factor of ``size`` components of which only ``used`` are in use."""
    blank = size - carry.size
    if carry.matrix is None:
        return dataclasses.replace(carry, blank=blank)
    # What is not in use has zero moments, so that any weight on it is right; zero is simplest.
    matrix = nn.functional.pad(carry.matrix, (0, size - used))
    return dataclasses.replace(carry, matrix=matrix, blank=blank)


def _padded(value: Tensor, size: int, axis: int) -> Tensor:
    shape = list(value.shape)
    shape[axis] = size - value.shape[axis]
    return torch.cat([value, value.new_zeros(shape)], axis)
