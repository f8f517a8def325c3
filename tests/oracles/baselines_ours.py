"""Slow, obviously right twins of MiLoRA, LoRA-Dash and DyLoRA: dense matrices in float64."""

import torch
from torch import Tensor


def minor_part(weight: Tensor, rank: int) -> Tensor:
    """Keep what a weight does to the eigenvectors of W'W with the smallest eigenvalues.

    Of a wide weight the null space is left out: those directions have no singular value.
    """
    W = weight.double()
    n = min(W.shape)
    _, vectors = torch.linalg.eigh(W.T @ W)  # rising eigenvalues
    with_values = vectors[:, W.shape[1] - n :]
    total = torch.zeros_like(W)
    for k in range(rank):
        v = with_values[:, k]
        total += torch.outer(W @ v, v)
    return total


def principal_part(weight: Tensor, rank: int) -> Tensor:
    """The broken twin: the largest singular values, which is PiSSA."""
    return weight.double() - minor_part(weight, min(weight.shape) - rank)


def change_rates(weight: Tensor, update: Tensor, epsilon: float) -> list[float]:
    """Form u_i' ΔW v_i one by one."""
    U, sigma, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    rates = []
    for i in range(len(sigma)):
        coordinate = 0.0
        for row in range(weight.shape[0]):
            coordinate += float(U[row, i]) * float(update[row].double() @ Vt[i])
        rates.append(abs(coordinate) / (float(sigma[i]) + epsilon))
    return rates


def plain_changes(weight: Tensor, update: Tensor, epsilon: float) -> list[float]:
    """The broken twin: changes that are not divided by the singular values."""
    sigma = torch.linalg.svdvals(weight.double())
    rates = change_rates(weight, update, epsilon)
    return [rate * (float(s) + epsilon) for rate, s in zip(rates, sigma, strict=True)]


def dashed_weight(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, chosen: list[int], delta: Tensor
) -> Tensor:
    """Return W + s B A, and Δσ_i more of each chosen singular direction."""
    U, _, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    total = weight.double() + scaling * (B.double() @ A.double())
    for i, change in zip(chosen, delta.double(), strict=True):
        total += change * torch.outer(U[:, i], Vt[i])
    return total


def dashed_and_scaled(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, chosen: list[int], delta: Tensor
) -> Tensor:
    """The broken twin: LoRA's scale on the singular values too."""
    return dashed_weight(weight, A, B, scaling, chosen, scaling * delta)


def nested_update(A: Tensor, B: Tensor, rank: int, alpha: float, frozen: bool) -> Tensor:
    """Return α / b · B[:, :b] A[:b], through which gradients reach component b alone if frozen."""
    total = B.new_zeros(B.shape[0], A.shape[1])
    for k in range(rank):
        a, b = A[k], B[:, k]
        if frozen and k < rank - 1:
            a, b = a.detach(), b.detach()
        total = total + torch.outer(b, a)
    return alpha / rank * total


def nested_with_one_scale(A: Tensor, B: Tensor, rank: int, alpha: float, frozen: bool) -> Tensor:
    """The broken twin: α / r, as if all components counted."""
    return nested_update(A, B, rank, alpha, frozen) * rank / A.shape[0]


def nested_but_thawed(A: Tensor, B: Tensor, rank: int, alpha: float, frozen: bool) -> Tensor:
    """The other broken twin: earlier components are trained as well."""
    return nested_update(A, B, rank, alpha, not frozen)
