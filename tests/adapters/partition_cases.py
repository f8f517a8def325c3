"""Adapters whose output rows are split, on tiny models, shared by the tests of partitions."""

from typing import Any

import torch
from torch import Tensor, nn

import gradrank as gr
from adapters.surgery_cases import sites
from gradrank.core.partition import NeuronPartition


def rows_of(site: Any, share: float = 0.4, seed: int = 0) -> list[bool]:
    """A mask with at least one row of either kind, different for every target."""
    count = site.linear("B").out_features
    salt = sum(map(ord, site.name)) + seed
    order = torch.randperm(count, generator=torch.Generator().manual_seed(salt)).tolist()
    chosen = set(order[: min(max(round(share * count), 1), count - 1)])
    return [row in chosen for row in range(count)]


def splits(model: nn.Module, rank: int = 4, rest: int = 1, **options: Any) -> dict[str, Any]:
    return {
        name: NeuronPartition.of(rows_of(site, **options), rank, rest)
        for name, site in sites(model).items()
    }


def partitions(
    model: nn.Module, start: str = "restart", rank: int = 4, rest: int = 1, **options: Any
) -> dict[str, Any]:
    """A Partition edit for every target."""
    return {n: gr.Partition(s, start) for n, s in splits(model, rank, rest, **options).items()}


def update(site: Any) -> Tensor:
    """The update that PEFT would merge."""
    with torch.no_grad():
        return site.layer.get_delta_weight(site.adapter)


def whole_b(site: Any) -> Tensor:
    """B as the layer uses it, [d_out, r + r']."""
    return site.linear("B").weight.detach()


def shake(model: nn.Module, scale: float = 0.05, seed: int = 3) -> None:
    """Give everything behind the adapters values, the zeros of B too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in sites(model).values():
            for raw in site.learned().values():
                raw.add_(scale * torch.randn(raw.shape, generator=generator).to(raw))
