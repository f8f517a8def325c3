"""Products ``B A`` of thin factors: their singular values and balanced factors of fewer directions.

The product itself is never formed: two thin QR decompositions and an SVD of a small matrix do.
"""

import torch
from torch import Tensor

from gradrank.ops.moments import wide_dtype


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Return the singular values of ``B A`` that double precision can tell from zero.

    Args:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.

    Returns:
        ``[k]`` with ``k <= min(r, d_in, d_out)``, descending, float64 (float32 on devices without
        it), on the factors' device. Their number is the numerical rank of the product.

    Examples:
        >>> A, B = torch.eye(2, 5), torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> singular_values(torch.cat([A, A]), torch.cat([B, 0 * B], 1)).tolist()
        [3.0, 2.0]
    """
    left, right = _wide(A, B)
    if not A.shape[0]:
        return left.new_zeros(0)
    values = torch.linalg.svdvals(_triangle(left) @ _triangle(right.T).T)
    # Of the factors, not of the product: where parts of it cancel, what is left is rounding.
    size = left.norm() * right.norm()
    noise = torch.finfo(left.dtype).eps * max(left.shape[0], right.shape[1]) * size
    return values[values > noise]


def balanced(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Return factors of the best approximation of ``B A`` by fewer directions.

    With :math:`BA = U S V^T` they are :math:`S_k^{1/2} V_k^T` and :math:`U_k S_k^{1/2}`: rows and
    columns come in order of strength, are orthogonal, and a direction has the same norm in both
    factors, so that neither runs out of the range of a short floating-point type.

    Args:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        rank: Directions k to keep, in ``1..min(r, d_in, d_out)``.

    Returns:
        ``[k, d_in]`` and ``[d_out, k]``, in float64 (float32 on devices without it).

    Source:
        Eckart and Young, Psychometrika 1936.
    """
    left, right = _wide(A, B)
    q_b, r_b = torch.linalg.qr(left)
    q_a, r_a = torch.linalg.qr(right.T)
    u, values, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    roots = values[:rank].sqrt()
    return roots[:, None] * (vh[:rank] @ q_a.T), (q_b @ u[:, :rank]) * roots


def _wide(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return B.detach().to(wide_dtype(B)), A.detach().to(wide_dtype(A))


def _triangle(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix, mode="r").R
