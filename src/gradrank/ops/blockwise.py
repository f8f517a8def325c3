"""Tensors in 8 bits: codes into a table of 256 values, with one scale per block of elements."""

import torch
from torch import Tensor, nn


def dequantise_blocks(values: Tensor, scales: Tensor, codes: Tensor, block: int) -> Tensor:
    """Return what 8-bit codes stand for: a code's value times the scale of its block.

    Args:
        values: uint8, any shape; flattened, ``block`` elements after one another share a scale.
        scales: One per block.
        codes: The 256 values, in ``[-1, 1]``.
        block: Elements per block.

    Returns:
        float32, of the shape of ``values``.
    """
    scale = scales.flatten().repeat_interleave(block)[: values.numel()]
    return codes[values.flatten().int()].mul(scale).reshape(values.shape)


@torch.no_grad()
def quantise_blocks(tensor: Tensor, codes: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the nearest 8-bit code of every element, with one scale per block.

    The scale is the largest magnitude in the block. Exact, unlike tables of a fast kernel, which
    may give zero the code of its neighbour.

    Args:
        tensor: Any shape; flattened, ``block`` elements after one another share a scale.
        codes: The 256 values, in ``[-1, 1]``.
        block: Elements per block.

    Returns:
        The codes, uint8, of the shape of ``tensor``, and the scales, float32, one per block.

    Source:
        Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, Eq. 4.
    """
    flat = tensor.detach().flatten().float()
    blocks = -(-flat.numel() // block)
    padded = nn.functional.pad(flat, (0, blocks * block - flat.numel())).view(blocks, block)
    scales = padded.abs().amax(1)
    unit = padded / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    ordered, order = codes.float().sort()
    found = torch.bucketize(unit, (ordered[1:] + ordered[:-1]) / 2, out_int32=True)
    return order.to(torch.uint8)[found].flatten()[: flat.numel()].view(tensor.shape), scales
