"""Rows of a matrix that was only seen through two sketches: how much energy any set of them holds.

From ``Ĝ = Q X`` (single-pass low-rank approximation) everything that is asked about rows needs only
the *row factors* F with ``F Fᵀ = Ĝ Ĝᵀ``: of a set M of rows, the squared singular values of
``Ĝ[M, :]`` are the eigenvalues of the small Gram matrix ``F[M]ᵀ F[M]``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradrank.ops.sketch import fold_rows


def row_factors(range_sketch: Tensor, corange_sketch: Tensor, out_signs: Tensor) -> Tensor:
    r"""Return factors of a matrix's rows, ``F Fᵀ = Ĝ Ĝᵀ``, from its two sketches.

    With ``Y = G V``, ``W = Uᵀ G`` and Q an orthonormal basis of the range of Y, G is approximated
    by :math:`\hat G = Q X`, :math:`X = (U^\top Q)^{+} W`. A QR decomposition :math:`X^\top = Z R`
    then gives :math:`F = Q R^\top`, free of Z, which no energy depends on.

    Args:
        range_sketch: Y, ``[d_out, k]``.
        corange_sketch: W, ``[c, d_in]``.
        out_signs: Signs of U, ``[d_out]``.

    Returns:
        ``[d_out, min(k, d_out, d_in)]``, float32. Unit: that of G.

    Source:
        Tropp, Yurtsever, Udell and Cevher, SIAM J. Matrix Anal. Appl. 2017, algorithm 4.
    """
    basis, _ = torch.linalg.qr(range_sketch.double())
    mixed = fold_rows(basis, out_signs, corange_sketch.shape[0])
    core = torch.linalg.lstsq(mixed, corange_sketch.double(), driver="gelsd").solution
    upper = torch.linalg.qr(core.mT, mode="r").R
    return (basis @ upper.mT).float()


def row_energies(factors: Tensor) -> Tensor:
    """Return the squared length of every row.

    Args:
        factors: F, ``[m, k]``.

    Returns:
        ``[m]``, float64. Unit: that of F, squared.

    Examples:
        >>> row_energies(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist()
        [25.0, 1.0]
    """
    return factors.double().square().sum(-1)


def by_energy(factors: Tensor) -> Tensor:
    """Return the rows' places, largest energy first, the first row of equals first.

    Args:
        factors: F, ``[m, k]``.

    Returns:
        ``[m]``, int64.
    """
    return torch.argsort(row_energies(factors), descending=True, stable=True)


def split_energies(
    factors: Tensor, order: Tensor, cuts: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Return the energies of the directions of both groups of rows, for several places to cut.

    Costs one pass over F for all cuts, and two small eigenvalue problems per cut.

    Args:
        factors: F, ``[m, k]``.
        order: Places of the rows, ``[m]``; the first rows make the first group.
        cuts: Sizes of the first group, increasing, each in ``1..m-1``.

    Returns:
        Per cut the squared singular values of the first group ``[min(cut, k)]`` and of the rest
        ``[min(m - cut, k)]``: float64, descending, 0 or more. Unit: that of F, squared.
    """
    ordered = factors.double()[order]
    pieces = torch.tensor_split(ordered, list(cuts))
    grams = torch.stack([piece.mT @ piece for piece in pieces])
    first = grams.cumsum(0)[:-1]
    # Summed from the end, not taken off the whole: what is left may be tiny beside it.
    rest = grams.flip(0).cumsum(0).flip(0)[1:]
    values = torch.linalg.eigvalsh(torch.stack([first, rest])).flip(-1).clamp_min(0)
    m, k = ordered.shape
    return [
        (values[0, i, : min(cut, k)], values[1, i, : min(m - cut, k)]) for i, cut in enumerate(cuts)
    ]
