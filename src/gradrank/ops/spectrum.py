"""Gram matrices of gradients, their eigenvalues, and what one number can say about a spectrum.

Two measures of "how many directions" are kept apart: *effective rank* (by energy threshold, as in
GARD, or by entropy) and *stable rank*.
"""

import torch
from torch import Tensor

# Eigenvalues of a float64 Gram matrix below this share of the largest are rounding noise.
_NOISE = 1e-13


def gram_matrix(rows: Tensor) -> Tensor:
    r"""Return the Gram matrix of a set of gradients.

    With :math:`S = M^{-1/2} [g_1 \dots g_M]` this is :math:`C = S^\top S`, not centred.

    Args:
        rows: One gradient (or its sketch) per row, ``[M, D]``. Unit: loss per weight.

    Returns:
        ``[M, M]``, float64, symmetric. Unit: squared loss per squared weight.

    Source:
        GARD, section 3.2.

    Notes:
        Products are accumulated in float64, in column blocks, so that a dense row needs no
        float64 copy of itself.

    Examples:
        >>> gram_matrix(torch.eye(2)).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    count, width = rows.shape
    gram = rows.new_zeros((count, count), dtype=torch.float64)
    step = 1 << 18
    for start in range(0, width, step):
        block = rows[:, start : start + step].double()
        gram += block @ block.T
    return gram / max(count, 1)


def centre(gram: Tensor) -> Tensor:
    """Return the Gram matrix of the same gradients with their mean removed (a covariance).

    Args:
        gram: ``[..., M, M]``.

    Returns:
        ``[..., M, M]``: double-centred, ``(I - 11ᵀ/M) C (I - 11ᵀ/M)``.
    """
    column = gram.mean(dim=-1, keepdim=True)
    row = gram.mean(dim=-2, keepdim=True)
    return gram - column - row + column.mean(dim=-2, keepdim=True)


def eigenvalues(gram: Tensor) -> Tensor:
    """Return the eigenvalues of Gram matrices, largest first, rounding noise set to zero.

    Args:
        gram: ``[..., M, M]``, symmetric positive semi-definite.

    Returns:
        ``[..., M]``, float64, descending, non-negative.
    """
    values = torch.linalg.eigvalsh(gram.double()).flip(-1)
    floor = values[..., :1].clamp_min(0) * _NOISE
    return torch.where(values > floor, values, torch.zeros_like(values))


def effective_rank(values: Tensor, energy: float = 0.9) -> Tensor:
    r"""Return the energy-based effective rank of spectra.

    :math:`\hat r = \min\{k : \sum_{i \le k} \lambda_i \ge \alpha \sum_i \lambda_i\}`, and 0 for a
    spectrum that is zero everywhere.

    Args:
        values: Eigenvalues, ``[..., M]``, descending, non-negative.
        energy: Threshold α in (0, 1].

    Returns:
        ``[...]``, int64, in ``[0, M]``. Unit: directions.

    Raises:
        ValueError: If ``energy`` is outside (0, 1].

    Source:
        GARD, section 3.2 (the unnumbered definition of the effective rank).

    Notes:
        A relative tolerance of 1e-12 keeps a flat spectrum from needing one direction too many
        because of rounding.

    Examples:
        >>> int(effective_rank(torch.tensor([6.0, 3.0, 1.0]), energy=0.9))
        2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}; the threshold must lie in (0, 1].")
    cumulative = values.double().cumsum(-1)
    total = cumulative[..., -1:]
    needed = (cumulative < total * (energy - 1e-12)).sum(-1) + 1
    return torch.where(total[..., 0] > 0, needed, torch.zeros_like(needed))


def fractional_rank(values: Tensor, energy: float = 0.9) -> Tensor:
    r"""Return the energy-based effective rank of spectra, read between the whole numbers.

    The cumulative energy is taken as a line between one direction and the next:
    :math:`k - 1 + (\alpha E - \sum_{i<k} \lambda_i) / \lambda_k` with :math:`k = \hat r` and
    :math:`E = \sum_i \lambda_i`. Rounded up it is :func:`effective_rank`, so that the order of
    two targets with different effective ranks stays, and equal ones are told apart.

    Args:
        values: Eigenvalues, ``[..., M]``, descending, non-negative.
        energy: Threshold α in (0, 1].

    Returns:
        ``[...]``, float64, in ``(effective_rank - 1, effective_rank]``, 0 for a zero spectrum.
        Unit: directions.

    Source:
        Ours; GARD, section 3.2, rounds up.

    Examples:
        >>> float(fractional_rank(torch.tensor([6.0, 4.0]), energy=0.8))
        1.5
    """
    whole = effective_rank(values, energy)
    spectrum = values.double()
    last = (whole - 1).clamp_min(0).unsqueeze(-1)
    top = spectrum.gather(-1, last)[..., 0]
    before = spectrum.cumsum(-1).gather(-1, last)[..., 0] - top
    part = (spectrum.sum(-1) * energy - before) / top.clamp_min(torch.finfo(torch.float64).tiny)
    # Rounding may carry the part a little over either end.
    tiny = torch.finfo(torch.float64).eps
    found = whole - 1 + part.clamp(tiny * spectrum.shape[-1], 1.0)
    return torch.where(whole > 0, found, torch.zeros_like(found))


def entropy_rank(values: Tensor) -> Tensor:
    r"""Return the entropy-based effective rank of spectra.

    With :math:`p_i = \sigma_i / \sum_j \sigma_j`, :math:`\sigma_i = \sqrt{\lambda_i}`, it is
    :math:`\exp(-\sum_i p_i \log p_i)`; 0 for a spectrum that is zero everywhere.

    Args:
        values: Eigenvalues, ``[..., M]``, non-negative.

    Returns:
        ``[...]``, float64, in ``{0} ∪ [1, M]``. Unit: directions.

    Source:
        Roy and Vetterli, EUSIPCO 2007, Definition 1.

    Examples:
        >>> round(float(entropy_rank(torch.ones(4))), 6)
        4.0
    """
    sigma = values.double().clamp_min(0).sqrt()
    total = sigma.sum(-1, keepdim=True)
    share = sigma / total.clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), torch.zeros_like(entropy))


def stable_rank(values: Tensor) -> Tensor:
    r"""Return the stable rank, :math:`\sum_i \lambda_i / \lambda_1`; 0 for a zero spectrum.

    Args:
        values: Eigenvalues (squared singular values), ``[..., M]``, non-negative.

    Returns:
        ``[...]``, float64, in ``{0} ∪ [1, M]``. Unit: directions.

    Source:
        Rudelson and Vershynin, J. ACM 2007, section 1 (numerical rank).

    Examples:
        >>> float(stable_rank(torch.tensor([4.0, 2.0, 2.0])))
        2.0
    """
    spectrum = values.double()
    top = spectrum.amax(-1)
    safe = top.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(top > 0, spectrum.sum(-1) / safe, torch.zeros_like(top))
