"""The penalty that keeps the directions of an adapter orthonormal."""

import torch
from torch import Tensor


@torch.no_grad()
def penalty_gradient(vectors: Tensor, whole: bool = True) -> Tensor:
    r"""Return the gradient of :math:`\|V V^\top - I\|_F^2` with respect to V.

    Args:
        vectors: V ``[..., r, d]``, one direction per row (Q itself; P transposed); leading axes
            are a batch.
        whole: Whether lengths count too; otherwise only what two directions share does.

    Returns:
        ``[..., r, d]``: :math:`4 (V V^\top - I) V`, without the diagonal if not ``whole``.

    Source:
        AdaLoRA, arXiv 2303.10512, equation 4; off the diagonal: IGU-LoRA's published code.
    """
    gram = vectors @ vectors.mT
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    if whole:
        diagonal.sub_(1)
    else:
        diagonal.zero_()
    return 4 * gram @ vectors
