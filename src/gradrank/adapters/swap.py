"""Put new factors in place: as new parameters, or inside parameters of a fixed shape."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradrank.adapters.baking import strip
from gradrank.adapters.forms import attach_partition
from gradrank.adapters.layer_forms import set_active, set_partition
from gradrank.adapters.optimizers import Carried, OptimizerChange, carry_state
from gradrank.adapters.partitioned import visible
from gradrank.adapters.rollback import Rollback
from gradrank.adapters.stores import Store
from gradrank.adapters.view import LoraSite, layer_alpha
from gradrank.core.partition import NeuronPartition
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
        split: How the output rows are split, where they are; ``"B"`` is zero outside the blocks.
    """

    site: LoraSite
    rank: int
    values: Mapping[str, Tensor] = field(default_factory=dict)
    carries: Mapping[str, Carry] = field(default_factory=dict)
    split: NeuronPartition | None = None


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
        whole = [factor for factor in site.factors if incision.split is None or factor != "B"]
        known = [self._replace(site, factor, incision) for factor in whole]
        site.linear("A").out_features = site.linear("B").in_features = incision.rank
        site.layer.r[site.adapter] = incision.rank
        site.layer.lora_alpha[site.adapter] = layer_alpha(site.layer, site.adapter, incision.rank)
        if incision.split is not None:
            known.append(self._split(site, incision, incision.split))
        return all(known)

    def _replace(self, site: LoraSite, factor: str, incision: Incision) -> bool:
        old = site.raw(factor)
        value = incision.values[factor].to(device=old.device, dtype=old.dtype).contiguous()
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        known = True
        if self._change is not None and id(old) in self._held:
            carry = incision.carries.get(factor)
            carried = self._carried(old, [(carry, AXIS[factor])] if carry is not None else [])
            known = not carried.reset
            self._change.replace(old, new, carried.state)
        site.assign(factor, new)
        return known

    def _split(self, site: LoraSite, incision: Incision, split: NeuronPartition) -> bool:
        """Put two blocks in the place of B; both follow it in its group of the optimizer."""
        old, carry = site.raw("B"), incision.carries.get("B")
        whole = incision.values["B"].to(device=old.device, dtype=old.dtype)
        site.assign("B", nn.Parameter(whole, requires_grad=old.requires_grad))
        dominant, (rank, rest) = split.mask, (split.rank, split.supplementary_rank)
        rows = torch.tensor(dominant, device=old.device)
        attach_partition(site.layer, site.adapter, rows, rank, rest)
        if self._change is None or id(old) not in self._held:
            return True
        columns = {"B_d": range(rank), "B_s": range(rank, rank + rest)}
        parts, known = [], True
        for factor, group in (("B_d", True), ("B_s", False)):
            new = site.raw(factor)
            if not new.numel():
                continue
            chosen = [i for i, flag in enumerate(dominant) if flag == group]
            steps = [(carry, 1), (Carry.select(chosen), 0), (Carry.select(columns[factor]), 1)]
            carried = self._carried(old, steps if carry is not None else [])
            known &= not carried.reset
            parts.append((new, carried.state, f"parametrizations.weight.original{len(parts)}"))
        self._change.split(old, parts)
        return known

    def _carried(self, old: Tensor, steps: Sequence[tuple[Carry, int]]) -> Carried:
        """The state of a parameter after carries along some axes; afresh without any."""
        carried = Carried(dict(self._optimizer.state.get(old, {})) if steps else {})
        before = old
        for carry, axis in steps:
            if not carried.state:
                break
            carried = carry_state(self._optimizer, before, carried.state, carry, axis)
            shape = list(before.shape)
            shape[axis] = carry.size
            before = old.new_empty(shape)
        return carried

    def _remember(self, site: LoraSite) -> None:
        learned = site.learned()
        rank, alpha = site.layer.r[site.adapter], site.layer.lora_alpha[site.adapter]

        def undo() -> None:
            if "B" in learned and site.form == "partition":
                strip(site.linear("B"), learned["B"])
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
                if factor == "B" and incision.split is not None:
                    self._forget_outside(raw, incision.split)
            there = self._store.read(raw).clone()
            self._rollback.push(functools.partial(self._store.write, raw, there))
            self._store.write(raw, _padded(incision.values[factor], raw.shape[axis], axis))
            self._rollback.push(functools.partial(setattr, raw, "grad", raw.grad))
            raw.grad = None
        if incision.rank != before or incision.split is not None:
            self._rollback.push(lambda: set_active(site.layer, site.adapter, before))
        if incision.split is not None:
            set_partition(site.layer, site.adapter, incision.split)
        elif incision.rank != before:
            set_active(site.layer, site.adapter, incision.rank)
        return known

    def _forget_outside(self, raw: nn.Parameter, split: NeuronPartition) -> None:
        """Clear the moments outside of the blocks, which would move what nobody sees."""
        rows = torch.tensor(split.mask)
        inside = visible(rows, split.rank, split.lora_rank, raw.shape[1])
        held = self._store.moments(raw)
        blank = {
            key: value * inside.to(value.device)
            for key, value in held.items()
            if isinstance(value, Tensor) and value.shape == raw.shape and value.is_floating_point()
        }
        self._store.write_moments(raw, held | blank)

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
