"""Seeded random sketches that keep inner products, and what can be read off them.

The sketch is a *sign fold* (a count sketch): every coordinate gets a random sign and is added to
one of k buckets, coordinate j to bucket j mod k. Its inner products are unbiased over the signs
for any assignment of buckets, and applying it costs one addition per coordinate instead of k
multiplications. k is a prime: attention heads and other blocks have widths with small factors,
and buckets in step with them would add up coordinates that belong together, which costs accuracy.
"""

import functools
import hashlib
import math

import torch
from torch import Tensor


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed from words and numbers, the same in every process.

    Args:
        *parts: What the seed shall depend on.

    Returns:
        The seed, in ``[0, 2**63)``.

    Examples:
        >>> seed_of(0, "layer.1") == seed_of(0, "layer.1")
        True
    """
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def random_signs(length: int, seed: int) -> Tensor:
    """Return independent random signs.

    Args:
        length: How many.
        seed: Seed; the global random state is neither read nor changed.

    Returns:
        ``[length]``, float32 on the CPU, each -1 or +1.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (length,), generator=generator, dtype=torch.float32) * 2 - 1


def prime_at_least(number: int) -> int:
    """Return the smallest prime that is not below a number.

    Args:
        number: Lower bound.

    Returns:
        The prime; 2 at least.

    Examples:
        >>> prime_at_least(128)
        131
    """
    candidate = max(number, 2)
    while any(candidate % d == 0 for d in range(2, math.isqrt(candidate) + 1)):
        candidate += 1
    return candidate


def scatter_fold(rows: Tensor, size: int, seed: int) -> Tensor:
    """Sketch the last axis with random signs and random buckets.

    Slower than :func:`fold` and free of any structure: for short axes that are folded once.

    Args:
        rows: ``[n, d]``.
        size: Number of buckets.
        seed: Seed; the global random state is neither read nor changed.

    Returns:
        ``[n, min(d, size)]``, dtype of ``rows``; ``rows`` itself where ``d <= size``.

    Source:
        Charikar, Chen and Farach-Colton, ICALP 2002.
    """
    width = rows.shape[-1]
    if width <= size:
        return rows
    buckets, signs = _scatter_plan(width, size, seed, rows.device)
    signed = rows * signs.to(rows.dtype)
    return rows.new_zeros((rows.shape[0], size)).index_add_(1, buckets, signed)


@functools.lru_cache(maxsize=64)
def _scatter_plan(width: int, size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randint(0, size, (width,), generator=generator)
    return buckets.to(device), random_signs(width, seed_of(seed, "signs")).to(device)


def fold(x: Tensor, signs: Tensor, size: int) -> Tensor:
    r"""Sketch the last axis: random signs, then coordinate j is added to bucket ``j mod size``.

    For independent signs, :math:`E \langle fold(x), fold(y) \rangle = \langle x, y \rangle`. An
    axis that is no longer than ``size`` is returned as it is (in float32): exact, no sketch.

    Args:
        x: ``[..., d]``, any floating dtype.
        signs: ``[d]``, from :func:`random_signs`.
        size: Number of buckets k.

    Returns:
        ``[..., min(d, k)]``, float32. Unit: that of ``x``.

    Source:
        Charikar, Chen and Farach-Colton, ICALP 2002 (count sketch); unbiasedness needs only the
        signs to be random.

    Examples:
        >>> fold(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), 2).tolist()
        [4.0, 2.0]
    """
    width = x.shape[-1]
    if width <= size:
        return x.float()
    signed = x * signs.to(device=x.device, dtype=x.dtype)
    whole = width - width % size
    folded = signed[..., :whole].unflatten(-1, (-1, size)).sum(-2, dtype=torch.float32)
    if whole < width:
        folded[..., : width - whole] += signed[..., whole:]
    return folded


def singular_values_from_sketches(
    range_sketch: Tensor, corange_sketch: Tensor, out_signs: Tensor
) -> Tensor:
    r"""Return the leading singular values of a matrix that was only seen through two sketches.

    Let ``Y = G V`` and ``W = Uᵀ G``. With ``Q`` an orthonormal basis of the range of ``Y``, the
    matrix is approximated by :math:`\hat G = Q (U^\top Q)^{+} W`, whose singular values are
    those of :math:`(U^\top Q)^{+} W`.

    Args:
        range_sketch: Y, ``[d_out, k]``.
        corange_sketch: W, ``[c, d_in]`` with ``c >= k`` (or ``c = d_out``: then exact in Q).
        out_signs: Signs of U, ``[d_out]``.

    Returns:
        ``[min(k, d_out, d_in)]``, float64, descending. Unit: that of G.

    Source:
        Tropp, Yurtsever, Udell and Cevher, SIAM J. Matrix Anal. Appl. 2017, algorithm 4
        (single-pass low-rank approximation). Differs: U and V are sign folds.

    Notes:
        Exact when the rank of G is at most k and the folds keep it.
    """
    basis, _ = torch.linalg.qr(range_sketch.double())
    rows = corange_sketch.shape[0]
    mixed = fold_rows(basis, out_signs, rows)
    core = torch.linalg.lstsq(mixed, corange_sketch.double(), driver="gelsd").solution
    return torch.linalg.svdvals(core)


def fold_rows(matrix: Tensor, signs: Tensor, size: int) -> Tensor:
    """Return ``Uᵀ matrix`` for the sign fold U along the first axis, in float64.

    Args:
        matrix: ``[d, n]``.
        signs: ``[d]``.
        size: Number of buckets.

    Returns:
        ``[min(d, size), n]``, float64.
    """
    height = matrix.shape[0]
    if height <= size:
        return matrix.double()
    signed = matrix.double() * signs.to(matrix.device).double()[:, None]
    bucket = torch.arange(height, device=matrix.device) % size
    out = signed.new_zeros((size, matrix.shape[1]))
    return out.index_add_(0, bucket, signed)
