"""Slow, obviously right pruning of ``P diag(λ) Q``: sums of components, and a run with a mask."""

from collections.abc import Sequence

import torch
from torch import Tensor


def update_of_kept(P: Tensor, lam: Tensor, Q: Tensor, kept: Sequence[int]) -> Tensor:
    """Add up ``λ_k p_k q_kᵀ`` over the kept components, in float64."""
    total = torch.zeros(P.shape[0], Q.shape[1], dtype=torch.float64)
    for k in kept:
        for i in range(P.shape[0]):
            total[i] += float(P[i, k]) * float(lam[k]) * Q[k].double()
    return total


def update_with_lam_left_behind(P: Tensor, lam: Tensor, Q: Tensor, kept: Sequence[int]) -> Tensor:
    """The broken twin: P and Q are selected, and λ keeps its first entries."""
    total = torch.zeros(P.shape[0], Q.shape[1], dtype=torch.float64)
    for place, k in enumerate(kept):
        total += float(lam[place]) * torch.outer(P[:, k].double(), Q[k].double())
    return total


def masked_run(
    data: Sequence[tuple[Tensor, Tensor]],
    W: Tensor,
    scaling: float,
    start: tuple[Tensor, Tensor, Tensor],
    kept: Sequence[int],
    after: int,
    lr: float,
    forget: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Train P, λ, Q with Adam at full size; from some step on only the kept components count.

    ``forget=True`` is the broken twin, whose optimizer loses its memory where it prunes.
    """
    P, lam, Q = (tensor.detach().clone().requires_grad_() for tensor in start)
    optimizer = torch.optim.Adam([P, lam, Q], lr)
    mask = torch.ones_like(lam)
    for step, (x, y) in enumerate(data):
        if step == after:
            mask = torch.zeros_like(lam)
            mask[list(kept)] = 1
            if forget:
                optimizer.state.clear()
        out = x @ (W + scaling * (P * (lam * mask)) @ Q).T
        optimizer.zero_grad()
        ((out - y) ** 2).mean().backward()
        optimizer.step()
    return P.detach(), lam.detach(), Q.detach()
