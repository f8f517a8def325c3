"""Slow, dense, float64 twins of compressing, combining and merging adapters."""

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from gradrank.serving.adapter import Adapter, Update


def product_of(update: Update) -> Tensor:
    """The update as loops over its components would add it up."""
    total = torch.zeros(update.b.shape[0], update.a.shape[1], dtype=torch.float64)
    for k in range(update.a.shape[0]):
        total += update.scaling * torch.outer(update.b[:, k].double(), update.a[k].double())
    return total


def squared_singular_values(update: Update) -> list[float]:
    """Energies of all directions, from the dense product, rounding noise set to zero."""
    values = torch.linalg.svdvals(product_of(update))
    return [float(v) ** 2 if v > 1e-12 * values[0] else 0.0 for v in values]


def truncated(update: Update, rank: int) -> Tensor:
    """The nearest matrix of that rank, from the SVD of the dense product."""
    left, values, right = torch.linalg.svd(product_of(update), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def first_components(update: Update, rank: int) -> Tensor:
    """A broken twin of truncation: the first components as they stand."""
    return update.scaling * update.b.double()[:, :rank] @ update.a.double()[:rank]


def most_energy(adapter: Adapter, budget: int) -> float:
    """The most energy that any choice of ranks keeps within the budget, by trying all of them."""
    names = list(adapter.updates)
    energies = {name: squared_singular_values(adapter.updates[name]) for name in names}
    costs = {name: sum(product_of(adapter.updates[name]).shape) for name in names}
    best = 0.0
    for ranks in product(*(range(adapter.updates[name].rank + 1) for name in names)):
        spent = sum(rank * costs[name] for name, rank in zip(names, ranks, strict=True))
        if spent <= budget:
            kept = (sum(energies[n][:rank]) for n, rank in zip(names, ranks, strict=True))
            best = max(best, sum(kept))
    return best


def proportional_energy(adapter: Adapter, budget: int) -> float:
    """A broken twin of the knapsack: the same share of every update's rank."""
    kept, whole = 0.0, sum(update.parameters for update in adapter.updates.values())
    for update in adapter.updates.values():
        kept += sum(squared_singular_values(update)[: update.rank * budget // whole])
    return kept


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The dense sum of all updates of every module."""
    found: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, update in adapter.updates.items():
            part = weight * product_of(update)
            found[name] = found[name] + part if name in found else part
    return found


def scale_of_the_first(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """A broken twin: every update with the scale of the first adapter, as one alpha would give."""
    scale = next(iter(adapters[0].updates.values())).scaling
    found: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, update in adapter.updates.items():
            part = weight * scale * update.b.double() @ update.a.double()
            found[name] = found[name] + part if name in found else part
    return found


def merged(
    weights: Mapping[str, Tensor], adapter: Adapter, magnitudes: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Weights ``[d_out, d_in]`` plus updates, row by row."""
    found = {}
    for name, weight in weights.items():
        rows = []
        delta = product_of(adapter.updates[name])
        for i in range(weight.shape[0]):
            row = weight[i].double() + delta[i]
            if magnitudes:
                row = row * magnitudes[name].flatten()[i].double() / row.norm()
            rows.append(row)
        found[name] = torch.stack(rows)
    return found


def merged_in_steps(weights: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """A broken twin: the update is rounded to the weight's type before it is added."""
    return {
        name: weight + product_of(adapter.updates[name]).to(weight.dtype)
        for name, weight in weights.items()
    }
