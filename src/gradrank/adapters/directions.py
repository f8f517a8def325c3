"""Orthonormal directions for the SVD form: those of an update, or random ones."""

import torch
from torch import Tensor

from gradrank.ops.lowrank import fresh_rows
from gradrank.ops.moments import wide_dtype


def decompose(A: Tensor, B: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of ``B A`` from QR of both factors, without forming the product.

    Args:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        seed: Seed of what the update leaves open: P and Q of a zero update, whose λ is 0, and the
            directions of P that stand for zero columns of B.

    Returns:
        P ``[d_out, r]``, λ ``[r]`` (not negative, descending) and Q ``[r, d_in]``, in float64
        (float32 on devices without it).
    """
    dtype = wide_dtype(A)
    generator = torch.Generator().manual_seed(seed)
    if not bool(B.any()) or not bool(A.any()):
        left, right = (
            torch.linalg.qr(torch.randn(n, A.shape[0], generator=generator, dtype=torch.float64)).Q
            for n in (B.shape[0], A.shape[1])
        )
        return left, A.new_zeros(A.shape[0]), right.T
    q_a, r_a = torch.linalg.qr(A.to(dtype).T)
    wide = B.to(dtype)
    empty = ~wide.any(0)
    count = int(empty.sum())
    # A zero column spans nothing, and QR would take one coordinate axis for its direction.
    filled = wide.clone()
    random = torch.randn(B.shape[0], count, generator=generator, dtype=torch.float64)
    filled[:, empty] = random.to(wide)
    q_b, r_b = torch.linalg.qr(filled)
    r_b[:, empty] = 0.0
    left, lam, right = torch.linalg.svd(r_b @ r_a.T)
    lam[len(lam) - count :] = 0.0
    return q_b @ left, lam, right @ q_a.T


def orthonormal_rows(count: int, like: Tensor, seed: int) -> Tensor:
    """Return random orthonormal rows; where there are more than their width, some are plain random.

    Args:
        count: How many.
        like: ``[..., d]``: gives width, device and dtype.
        seed: Seed; the global random state is neither read nor changed.

    Returns:
        ``[count, d]``, each of norm 1.
    """
    return unit_rows(like.new_zeros(0, like.shape[-1]), count, seed).to(like.dtype)


def unit_rows(rows: Tensor, count: int, seed: int, sketch: Tensor | None = None) -> Tensor:
    """Return new rows as :func:`gradrank.ops.lowrank.fresh_rows`, of norm 1 beside no old ones.

    Args:
        rows: Rows that exist, ``[r, d]``.
        count: How many rows to return.
        seed: Seed of random rows.
        sketch: One-sided sketch ``[s, d]`` whose directions are taken first.

    Returns:
        ``[count, d]``, in the dtype that is computed in.
    """
    found = fresh_rows(rows, count, seed, sketch)
    return found if rows.shape[0] else found / found.norm(dim=1, keepdim=True)
