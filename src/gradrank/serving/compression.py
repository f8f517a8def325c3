"""Smaller ranks for a trained adapter, by the singular values of its updates."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gradrank.allocation import allocate_gains
from gradrank.core.budget import Budget
from gradrank.core.errors import PlanError
from gradrank.ops.products import balanced
from gradrank.serving.adapter import Adapter, Update
from gradrank.serving.energy import TargetEnergy, energy

_SHOWN = 12


@dataclass(frozen=True, slots=True)
class TargetLoss:
    """What a smaller rank costs one module.

    Attributes:
        rank_before: Rank of the trained update.
        rank_after: Rank it was given; 0: the module is no longer adapted.
        energy: Squared Frobenius norm of the trained update.
        kept: Share of the energy that is kept.
    """

    rank_before: int
    rank_after: int
    energy: float
    kept: float


@dataclass(frozen=True)
class Losses:
    """What smaller ranks cost an adapter. Energies are before rounding to the adapter's type.

    Attributes:
        budget: What might be spent, in parameters.
        parameters_before: Parameters of all factors before.
        parameters_after: And after.
        targets: Loss by module name.
    """

    budget: int
    parameters_before: int
    parameters_after: int
    targets: Mapping[str, TargetLoss]

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of all updates together."""
        return math.fsum(target.energy for target in self.targets.values())

    @property
    def kept(self) -> float:
        """Share of the energy of all updates that is kept."""
        lost = math.fsum(t.energy * (1 - t.kept) for t in self.targets.values())
        whole = self.energy
        return 1.0 - lost / whole if whole else 1.0

    @property
    def dropped(self) -> tuple[str, ...]:
        """Modules that are no longer adapted."""
        gone = (n for n, t in self.targets.items() if t.rank_before and not t.rank_after)
        return tuple(gone)

    def to_dict(self) -> dict[str, Any]:
        """Return the losses as plain data."""
        return {
            "budget": self.budget,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "energy": self.energy,
            "kept": self.kept,
            "targets": {
                name: {
                    "rank_before": target.rank_before,
                    "rank_after": target.rank_after,
                    "energy": target.energy,
                    "kept": target.kept,
                }
                for name, target in self.targets.items()
            },
        }

    def lines(self, most: int = _SHOWN) -> tuple[str, ...]:
        """Return the losses as lines for a terminal, the modules that lost most first.

        Args:
            most: How many modules to name.
        """
        lines = [
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters (budget "
            f"{self.budget:,}); {self.kept:.2%} of the energy of all updates is kept"
        ]
        losing = [(n, t) for n, t in self.targets.items() if t.kept < 1]
        losing.sort(key=lambda item: item[1].kept)
        lines.extend(
            f"{name}: rank {t.rank_before} -> {t.rank_after}, {t.kept:.2%} kept"
            for name, t in losing[:most]
        )
        if len(losing) > most:
            lines.append(f"and {len(losing) - most} modules that lost less")
        return tuple(lines)


def compress(
    adapter: Adapter,
    budget: Any,
    *,
    base_parameters: int | None = None,
    solver: str = "exact",
) -> tuple[Adapter, Losses]:
    r"""Re-allocate the ranks of a trained adapter under a budget in parameters, without data.

    Direction k of an update, with singular value :math:`\sigma_k` of ``scaling * B A``, keeps the
    energy :math:`\sigma_k^2` and costs ``d_in + d_out`` parameters. The exact knapsack keeps the
    directions with the most energy that fit; the slack is smaller than any next direction with
    an energy above zero. Directions of zeros are left out even where the budget would hold them.

    All updates get one scale: the adapter's own if it has one only, else 1. An update that keeps
    its rank keeps its factors; the others get balanced ones, see
    :func:`gradrank.ops.products.balanced`. Modules that are saved whole and biases pass through.

    Args:
        adapter: The trained adapter.
        budget: Parameters, ``"200000"``, ``"uniform:4"``, ``"0.5%"`` or a
            :class:`gradrank.core.budget.Budget`. ``uniform`` is over the adapter's own targets.
        base_parameters: Parameters of the base model, which a percentage needs.
        solver: ``exact``, or ``greedy`` for adapters too large for the exact one.

    Returns:
        The smaller adapter, in the same type, and what it lost.

    Raises:
        BudgetError: If the budget cannot be read, or not even one direction fits.
        PlanError: If the adapter is more than low-rank updates in a way that compression would
            break, by name, or all its updates are zero.
    """
    refuse(adapter, "compressed")
    found = energy(adapter)
    targets = [update.target for update in adapter.updates.values()]
    limit = Budget.parse(budget).resolve(targets, base_parameters or 0)
    useful = {name: len(own.singular_values) for name, own in found.items()}
    if not any(useful.values()):
        raise PlanError("all updates of the adapter are zero, so there is nothing to keep.")
    if sum(useful[target.name] * target.cost for target in targets) > limit:
        gains = {n: [value * value for value in own.singular_values] for n, own in found.items()}
        useful = allocate_gains(targets, gains, limit, solver=solver)
    return _cut(adapter, found, useful, limit)


def truncate(adapter: Adapter, rank: int) -> tuple[Adapter, Losses]:
    """Cut every update to its strongest directions.

    Args:
        adapter: The adapter.
        rank: Largest rank to leave, at least 1.

    Returns:
        The smaller adapter, in the same type, and what it lost.

    Raises:
        PlanError: As :func:`compress` raises it.
    """
    refuse(adapter, "cut to a smaller rank")
    found = energy(adapter)
    ranks = {name: min(rank, len(own.singular_values)) for name, own in found.items()}
    if not any(ranks.values()):
        raise PlanError("all updates of the adapter are zero, so there is nothing to keep.")
    limit = sum(rank * update.target.cost for update in adapter.updates.values())
    return _cut(adapter, found, ranks, limit)


def refuse(adapter: Adapter, what: str) -> None:
    """Refuse an adapter whose updates mean more than their low-rank product.

    Args:
        adapter: The adapter.
        what: What would be done to it, for the message.

    Raises:
        PlanError: If it has DoRA magnitudes, biases of factors, low-rank embeddings, a start that
            changes the base weights, or no updates.
    """
    config = adapter.config
    start = config.get("init_lora_weights")
    embedding = next((key for key in adapter.other if ".lora_embedding_" in key), None)
    why = None
    if config.get("use_dora") or any(".lora_magnitude_vector" in key for key in adapter.other):
        why = "DoRA magnitudes (use_dora) belong to the whole update"
    elif config.get("lora_bias") or any(key.endswith(".lora_B.bias") for key in adapter.other):
        why = "biases of the factors (lora_bias) belong to the factors as they are"
    elif embedding:
        why = f"the low-rank embedding '{embedding.partition('.lora_')[0]}' has a rank of its own"
    elif isinstance(start, str):
        why = (
            f"init_lora_weights={start!r} has changed the base weights, and the factors hold what "
            "was taken out of them; convert it to plain LoRA with PEFT first"
        )
    elif not adapter.updates:
        why = "it updates no linear module"
    if why:
        raise PlanError(f"the adapter cannot be {what}: {why}.")


def common_scale(updates: Iterable[Update]) -> float:
    """Return one scale for several updates: their own if they have one only, else 1.

    Args:
        updates: The updates.
    """
    scales = {update.scaling for update in updates}
    return scales.pop() if len(scales) == 1 and 0 not in scales else 1.0


def _cut(
    adapter: Adapter, found: Mapping[str, TargetEnergy], ranks: Mapping[str, int], limit: int
) -> tuple[Adapter, Losses]:
    scale = common_scale(adapter.updates.values())
    kept = (_reduced(u, ranks[name], scale) for name, u in adapter.updates.items() if ranks[name])
    smaller = replace(adapter.with_updates(kept), other=_other(adapter, ranks))
    losses = {
        name: TargetLoss(
            update.rank, ranks[name], found[name].energy, found[name].kept(ranks[name])
        )
        for name, update in adapter.updates.items()
    }
    return smaller, Losses(limit, adapter.parameters, smaller.parameters, losses)


def _reduced(update: Update, rank: int, scale: float) -> Update:
    if rank == update.rank:
        return update.folded(scale)
    ratio = update.scaling / scale
    root = abs(ratio) ** 0.5
    a, b = balanced(update.a, update.b, rank)
    b = b * math.copysign(root, ratio)
    dtype = update.a.dtype
    return replace(update, a=(root * a).to(dtype), b=b.to(dtype), scaling=scale)


def _other(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the further tensors by the names that they have once some layers are plain again."""
    gone = [f"{name}.base_layer." for name, rank in ranks.items() if not rank]
    found = {}
    for key, tensor in adapter.other.items():
        prefix = next((prefix for prefix in gone if key.startswith(prefix)), "")
        plain = prefix.removesuffix("base_layer.") + key.removeprefix(prefix)
        found[plain] = tensor
    return found
