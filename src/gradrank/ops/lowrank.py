"""Low-rank factors ``B A``: truncation to fewer directions, and fresh directions to grow into."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradrank.ops.moments import wide_dtype


@dataclass(frozen=True, slots=True)
class Truncation:
    """A product of fewer directions, and how gradients with respect to its factors follow.

    Attributes:
        A: ``[k, d_in]``.
        B: ``[d_out, k]``.
        to_a: ``[k, r]``: the gradient of the new A is ``to_a @ gradient of the old A``.
        to_b: ``[k, r]``: that of the new B is ``gradient of the old B @ to_b.T``.
    """

    A: Tensor
    B: Tensor
    to_a: Tensor
    to_b: Tensor


def truncate(A: Tensor, B: Tensor, rank: int) -> Truncation:
    r"""Keep the leading singular directions of ``B A``, without ever forming the product.

    With the thin decompositions :math:`A^T = Q_A R_A`, :math:`B = Q_B R_B`, the singular values of
    :math:`BA` are those of the small :math:`R_B R_A^T = U S V^T`, and the best rank-k
    approximation is :math:`(B A V_k)(V_k^T)` with :math:`V_k = Q_A V`. The new A is
    :math:`a V_k^T`, where a is the root mean square of the old rows' norms, so that A keeps the
    scale that training gave it; the new B is :math:`B A V_k / a`. Where ``B A`` has fewer than k
    directions, the rest of the new A is orthogonal to them, with zeros in B, and lies in the span
    of the old A as far as that reaches.

    The gradient follows: with :math:`G = \partial L / \partial (BA)`, that of A is
    :math:`B^T G` and the new B is :math:`B R` for a small R, so that the new one's is
    :math:`R^T (B^T G)`; and likewise for B, where the new A lies in the span of the old one.

    Args:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        rank: Directions k to keep, in ``1..min(r, d_in)``.

    Returns:
        The truncation, in float64 (float32 on devices without it), on the factors' device.

    Source:
        Eckart and Young, Psychometrika 1936; GARD, section 3.4 (ranks that shrink).
    """
    left, right = B.detach().to(wide_dtype(B)), A.detach().to(wide_dtype(A))
    q_a, r_a = torch.linalg.qr(right.T)
    r_b = torch.linalg.qr(left).R
    kept = torch.linalg.svd(r_b @ r_a.T, full_matrices=True).Vh[:rank].T
    scale = right.norm() / max(right.shape[0], 1) ** 0.5
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    directions = q_a @ kept
    mixing = right @ directions / scale
    # The old gradient of B sees the new A through A' = to_b A; rows of A may depend on one
    # another, and what the stored precision cannot tell from that must not blow the moments up.
    to_b = scale * kept.T @ torch.linalg.pinv(r_a.T, rtol=_noise(A))
    return Truncation(scale * directions.T, left @ mixing, mixing.T, to_b)


def strongest(A: Tensor, B: Tensor, rank: int) -> tuple[int, ...]:
    r"""Return the components with the largest magnitude :math:`\|B_{:i}\| \|A_{i:}\|`.

    Args:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        rank: How many to keep.

    Returns:
        Their indices, ascending; ties go to the first.
    """
    size = B.detach().double().norm(dim=0) * A.detach().double().norm(dim=1)
    order = torch.argsort(size, descending=True, stable=True)[:rank]
    return tuple(sorted(order.tolist()))


def fresh_rows(A: Tensor, count: int, seed: int, sketch: Tensor | None = None) -> Tensor:
    """Return new rows for A, outside its span and orthogonal to one another.

    Each has the root mean square norm of the old rows. Where A spans everything already, rows
    are plainly random.

    Args:
        A: Rows that exist, ``[r, d_in]``.
        count: How many rows to return.
        seed: Seed of random rows; the global random state is neither read nor changed.
        sketch: One-sided sketch ``[s, d_in]`` of the gradient of the weight: the rows are then
            its leading right singular directions outside the span of A, and random ones only
            where it has no more.

    Returns:
        ``[count, d_in]``, in float64 (float32 on devices without it), on A's device.

    Source:
        GARD, section 3.4 (ranks that grow); Halko, Martinsson and Tropp, SIAM Review 2011, for
        the directions of a matrix from its sketch.
    """
    old = A.detach().to(wide_dtype(A))
    norm = float(old.norm()) / max(old.shape[0], 1) ** 0.5 or 3**-0.5
    taken = _span(old, _noise(A))
    rows = old[:0]
    if sketch is not None:
        rows = _leading(sketch.detach().to(old), taken, count, max(_noise(sketch), 1e-4))
        taken = torch.cat([taken, rows])
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(count, old.shape[1], generator=generator, dtype=torch.float64).to(old)
    missing = count - rows.shape[0]
    room = old.shape[1] - taken.shape[0]
    outside = torch.linalg.qr(torch.cat([taken, random[: min(missing, room)]]).T).Q.T
    rows = torch.cat([rows, outside[taken.shape[0] :]])
    rows = torch.cat([rows, random[rows.shape[0] :]])
    return rows / rows.norm(dim=1, keepdim=True) * norm


def _span(old: Tensor, noise: float) -> Tensor:
    """Orthonormal rows that span the given ones, ``[rank of old, d_in]``."""
    q, r = torch.linalg.qr(old.T)
    left, values, _ = torch.linalg.svd(r, full_matrices=False)
    return (q @ left).T[values > noise * values[:1]]


def _leading(sketch: Tensor, taken: Tensor, count: int, noise: float) -> Tensor:
    """Leading right singular directions of a sketch outside a span; fewer where it has no more."""
    outside = sketch - (sketch @ taken.T) @ taken
    # From the small Gram matrix: values below 1e-8 of the largest are lost, far below the noise.
    squares, left = torch.linalg.eigh(outside @ outside.T)
    leading = squares.flip(0)[:count].clamp_min(0).sqrt()
    directions = left.flip(1).T[:count] @ outside
    directions = directions[leading > noise * float(sketch.norm())]
    return torch.linalg.qr(directions.T).Q.T


def _noise(stored: Tensor) -> float:
    """Relative size below which a singular value of a stored matrix is rounding."""
    return torch.finfo(stored.dtype).eps
