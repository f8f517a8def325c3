"""Dense float64 twins of truncation and of growing directions; they form the whole product."""

import torch
from torch import Tensor


def best_approximation(A: Tensor, B: Tensor, rank: int) -> Tensor:
    """The rank-k matrix nearest to B A (Eckart and Young), by the SVD of the product."""
    left, values, right = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    total = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for i in range(min(rank, len(values))):
        total += values[i] * torch.outer(left[:, i], right[i])
    return total


def tail(A: Tensor, B: Tensor, rank: int) -> float:
    """What the best approximation misses, in the Frobenius norm."""
    values = torch.linalg.svdvals(B.double() @ A.double())
    return float(sum(float(v) ** 2 for v in values[rank:]) ** 0.5)


def first_components(A: Tensor, B: Tensor, rank: int) -> Tensor:
    """A broken twin: the first components as they stand, whatever they are worth."""
    return B.double()[:, :rank] @ A.double()[:rank]


def outer_directions(G: Tensor, A: Tensor, count: int) -> Tensor:
    """Leading right singular directions of a gradient outside the span of the rows of A."""
    basis = torch.linalg.svd(A.double(), full_matrices=False)
    span = basis.Vh[basis.S / basis.S[0] > 1e-9]
    projector = torch.eye(A.shape[1], dtype=torch.float64) - span.T @ span
    return torch.linalg.svd(G.double() @ projector, full_matrices=False).Vh[:count]


def plain_directions(G: Tensor, count: int) -> Tensor:
    """A broken twin: the same without leaving out what A spans already."""
    return torch.linalg.svd(G.double(), full_matrices=False).Vh[:count]


def alignment(rows: Tensor, directions: Tensor) -> Tensor:
    """|cosine| between each row and the direction of the same index."""
    cosines = []
    for row, direction in zip(rows.double(), directions, strict=True):
        cosines.append(float((row @ direction).abs() / (row.norm() * direction.norm())))
    return torch.tensor(cosines, dtype=torch.float64)
