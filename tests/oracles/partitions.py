"""Slow, obviously right neuron partitions: rows walked one by one, in float64."""

import torch
from torch import Tensor


def hidden(
    x: Tensor, W0: Tensor, A: Tensor, B: Tensor, dominant: Tensor, rank: int, scaling: float
) -> Tensor:
    """``h = W0 x + s ((M * B_d) A_d x + (not M * B_s) A_s x)`` with masks as products."""
    x, W0, A, B = (tensor.double() for tensor in (x, W0, A, B))
    mask = dominant.double()[:, None]
    upper = (mask * B[:, :rank]) @ A[:rank]
    lower = ((1 - mask) * B[:, rank:]) @ A[rank:]
    return x @ W0.T + scaling * (x @ (upper + lower).T)


def hidden_without_masks(
    x: Tensor, W0: Tensor, A: Tensor, B: Tensor, dominant: Tensor, rank: int, scaling: float
) -> Tensor:
    """The broken twin: every row sees both groups."""
    return x.double() @ (W0.double() + scaling * B.double() @ A.double()).T


def best_update(A: Tensor, B: Tensor, dominant: Tensor, rank: int, rest: int) -> Tensor:
    """The nearest update of that partition: each group's rows cut by a dense SVD of their own."""
    whole = B.double() @ A.double()
    found = torch.zeros_like(whole)
    for rows, kept in ((dominant, rank), (~dominant, rest)):
        U, S, Vh = torch.linalg.svd(whole[rows], full_matrices=False)
        found[rows] = U[:, :kept] * S[:kept] @ Vh[:kept]
    return found


def best_update_of_all_rows(A: Tensor, B: Tensor, dominant: Tensor, rank: int, rest: int) -> Tensor:
    """The broken twin: cuts the whole update, and only then looks at the groups."""
    U, S, Vh = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    cut = [U[:, :kept] * S[:kept] @ Vh[:kept] for kept in (rank, rest)]
    return torch.where(dominant[:, None], cut[0], cut[1])
