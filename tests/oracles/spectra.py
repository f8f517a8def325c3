"""Slow twins of the spectrum's numbers: fractions, loops, explicit matrices."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def effective_rank(values: Sequence[int | Fraction], energy: Fraction) -> int:
    """Smallest k whose leading sum reaches ``energy`` of the total, in exact arithmetic."""
    ordered = sorted((Fraction(value) for value in values), reverse=True)
    total = sum(ordered)
    if total == 0:
        return 0
    for k in range(1, len(ordered) + 1):
        if sum(ordered[:k]) >= energy * total:
            return k
    raise AssertionError("the whole spectrum holds all of its energy")


def fractional_rank(values: Sequence[int | Fraction], energy: Fraction) -> Fraction:
    """Where the piecewise linear cumulative energy reaches ``energy`` of the total."""
    ordered = sorted((Fraction(value) for value in values), reverse=True)
    wanted = energy * sum(ordered)
    if not sum(ordered):
        return Fraction(0)
    position = Fraction(0)
    for value in ordered:
        if wanted <= value:
            return position + wanted / value
        wanted -= value
        position += 1
    raise AssertionError("the whole spectrum holds all of its energy")


def entropy_rank(values: Sequence[float]) -> float:
    """``exp(-Σ p log p)`` with ``p`` the shares of the singular values ``sqrt(λ)``."""
    sigma = [math.sqrt(value) for value in values if value > 0]
    if not sigma:
        return 0.0
    shares = [s / sum(sigma) for s in sigma]
    return math.exp(-sum(p * math.log(p) for p in shares))


def stable_rank(values: Sequence[float]) -> float:
    """``||S||_F² / ||S||_2²``."""
    return sum(values) / max(values) if max(values) > 0 else 0.0


def centred_gram(rows: Tensor) -> Tensor:
    """Gram matrix of gradients whose mean was subtracted first."""
    centred = rows.double() - rows.double().mean(dim=0)
    return centred @ centred.T / rows.shape[0]


def eigenvalues(rows: Tensor) -> Tensor:
    """Squared singular values of the explicit ``S = M^{-1/2} [g_1 .. g_M]``."""
    values = torch.linalg.svdvals(rows.double().T / math.sqrt(rows.shape[0])).square()
    return torch.nn.functional.pad(values, (0, rows.shape[0] - values.numel()))
