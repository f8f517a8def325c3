"""Slow, obviously right forms: the update ``B A`` as explicit sums over components, in float64."""

from torch import Tensor


def update_of_components(A: Tensor, B: Tensor, active: int) -> Tensor:
    """Add up the outer products of the first components only."""
    total = A.new_zeros((B.shape[0], A.shape[1]), dtype=B.double().dtype)
    for k in range(active):
        for i in range(B.shape[0]):
            for j in range(A.shape[1]):
                total[i, j] += B[i, k].double() * A[k, j].double()
    return total


def update_of_singular(P: Tensor, lam: Tensor, Q: Tensor) -> Tensor:
    """Add up ``λ_k p_k q_kᵀ``."""
    total = P.new_zeros((P.shape[0], Q.shape[1]), dtype=P.double().dtype)
    for k in range(len(lam)):
        total += lam[k].double() * P[:, k].double()[:, None] * Q[k].double()[None, :]
    return total


def update_of_partition(A: Tensor, B_d: Tensor, B_s: Tensor, dominant: Tensor) -> Tensor:
    """Walk over the output rows: each takes the next row of its block, times its part of A."""
    rank, rows = B_d.shape[1], []
    upper, lower = iter(B_d.double()), iter(B_s.double())
    for is_dominant in dominant.tolist():
        if is_dominant:
            rows.append(sum_of(next(upper), A[:rank]))
        else:
            rows.append(sum_of(next(lower), A[rank:]))
    total = A.new_zeros((len(rows), A.shape[1])).double()
    for i, row in enumerate(rows):
        total[i] = row
    return total


def sum_of(weights: Tensor, rows: Tensor) -> Tensor:
    """Add up rows with weights."""
    total = rows.new_zeros(rows.shape[1]).double()
    for weight, row in zip(weights, rows, strict=True):
        total += weight * row.double()
    return total


def one_component_too_many(A: Tensor, B: Tensor, active: int) -> Tensor:
    """The broken twin: an off-by-one in what is active."""
    return update_of_components(A, B, min(active + 1, A.shape[0]))


def singular_with_squares(P: Tensor, lam: Tensor, Q: Tensor) -> Tensor:
    """The broken twin: multiplies by the square of λ, as if both factors carried it."""
    return update_of_singular(P, lam * lam, Q)


def partition_with_shared_rows(A: Tensor, B_d: Tensor, B_s: Tensor, dominant: Tensor) -> Tensor:
    """The broken twin: the other rows read the first rows of A, as the dominant ones do."""
    width = B_s.shape[1]
    shifted = A.clone()
    shifted[B_d.shape[1] :] = A[:width]
    return update_of_partition(shifted, B_d, B_s, dominant)
