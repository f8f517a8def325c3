"""Adapters in the SVD form in training, shared by the tests of pruning."""

from typing import Any

import torch
from torch import Tensor, nn

from adapters.surgery_cases import LR, OPTIMIZERS, sites, train, trainable, trained
from cases import CASES, Case
from gradrank.adapters.reserve import start_svd

LLAMA = CASES["llama"]
WIDE = 6


def started(
    fixed: bool = False, rank: int = WIDE, case: Case = LLAMA, steps: int = 2, **options: Any
) -> Any:
    """A trained adapter of rank 4, widened and in the SVD form; no optimizer yet."""
    model, _ = trained(case, steps=steps, **options)
    start_svd(model, dict.fromkeys(sites(model), rank), seed=1, fixed=fixed)
    return model


def svd_trained(
    fixed: bool = False, optimizer: Any = "adamw", steps: int = 3, **options: Any
) -> tuple[Any, Any]:
    """The same, some steps into training in its form."""
    model = started(fixed, **options)
    build = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    made = build(trainable(model))
    train(model, made, options.get("case", LLAMA), steps)
    return model, made


def used(site: Any) -> dict[str, Tensor]:
    """The components in use of every factor."""
    raw = {name: tensor.detach() for name, tensor in site.learned().items()}
    found = {"A": raw["A"][: site.rank], "B": raw["B"][:, : site.rank]}
    return found | ({"lam": raw["lam"][: site.rank]} if "lam" in raw else {})


def gradients(model: Any, seed: int) -> None:
    """Equal gradients for the components in use, whatever the shapes; zero for the others."""
    for index, site in enumerate(sites(model).values()):
        for number, (factor, value) in enumerate(used(site).items()):
            generator = torch.Generator().manual_seed(97 * seed + 3 * index + number)
            raw = site.raw(factor)
            raw.grad = torch.zeros_like(raw)
            part = raw.grad
            for axis, size in enumerate(value.shape):
                part = part.narrow(axis, 0, size)
            part.copy_(torch.randn(value.shape, generator=generator))


def selections(model: nn.Module, least: int = 1) -> dict[str, tuple[int, ...]]:
    """Another selection for every target: order changed, some dropped, some kept whole."""
    kinds = [(4, 1, 2), (0,), (5, 0), tuple(range(WIDE)), (3, 2, 1, 0)]
    kinds += [()] if least == 0 else []
    return {
        name: tuple(k for k in kinds[i % len(kinds)] if k < site.rank)
        for i, (name, site) in enumerate(sites(model).items())
    }


def momentum(params: Any) -> Any:
    return torch.optim.SGD(params, LR, momentum=0.9)
