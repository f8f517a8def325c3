"""How much each output row would move: row sums of the gradient that an adapter implies."""

from collections.abc import Iterator

import torch
from torch import Tensor

# A block of the d_out x d_in matrix is made, made positive and added up while it is in the cache;
# on SmolLM2-135M 2 MiB took a quarter of the time of 64 KiB, and more was no faster. Elsewhere
# starting the kernels is what costs.
_CACHED = 2 << 20
_ELSEWHERE = 64 << 20


@torch.no_grad()
def neuron_importance(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, block_bytes: int | None = None
) -> Tensor:
    r"""Return the row sums of magnitudes of the gradient that a LoRA step implies on the weight.

    .. math:: S_i = \sum_j |\tilde G_{ij}|, \qquad \tilde G = B G^A + G^B A

    :math:`-\eta \tilde G` is the change of ``B A`` in one step of gradient descent, to first order.
    Where B is zero, as at the very first step, :math:`G^A` is too, and :math:`\tilde G = G^B A` is
    the gradient of the weight seen through the random rows of A: :math:`G A^T A`, times the scale.

    Args:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        grad_A: Gradient of A.
        grad_B: Gradient of B.
        block_bytes: Memory for a block of rows of :math:`\tilde G`, which is never held whole;
            none: 2 MiB on a processor, 64 MiB elsewhere. At least one row is made at a time.

    Returns:
        S, ``[d_out]``, in the unit of the gradients; float64 if a factor is, else float32. A NaN
        or infinity in a gradient makes every row that it reaches NaN or infinite.

    Source:
        PiLoRA, equations 7 and 8; Algorithm 1, lines 8 and 9.

    Examples:
        >>> A, B = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0], [3.0]])
        >>> neuron_importance(A, B, torch.ones(1, 2), torch.ones(2, 1)).tolist()
        [3.0, 5.0]
    """
    sums = torch.empty(B.shape[0], dtype=_wide(A, B, grad_A, grad_B), device=B.device)
    for start, block in _magnitudes(A, B, grad_A, grad_B, block_bytes):
        torch.sum(block, 1, out=sums[start : start + len(block)])
    return sums


@torch.no_grad()
def gradient_map(
    A: Tensor,
    B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    rows: int,
    columns: int,
    block_bytes: int | None = None,
) -> Tensor:
    r"""Return :math:`|\tilde G|` of :func:`neuron_importance` averaged to a picture's size.

    Args:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        grad_A: Gradient of A.
        grad_B: Gradient of B.
        rows: Most rows of the picture, 1 or more.
        columns: Most columns, 1 or more.
        block_bytes: As there.

    Returns:
        Mean magnitude per cell, ``[min(rows, d_out), min(columns, d_in)]``; neighbouring rows and
        columns share a cell, as evenly as whole numbers allow.

    Source:
        PiLoRA, equation 7 and Figure 2.
    """
    device, wide = B.device, _wide(A, B, grad_A, grad_B)
    row_cells = _cells(B.shape[0], rows, device)
    column_cells = _cells(A.shape[1], columns, device)
    shape = int(row_cells[-1]) + 1, int(column_cells[-1]) + 1
    total = torch.zeros(shape, dtype=wide, device=device)
    for start, block in _magnitudes(A, B, grad_A, grad_B, block_bytes):
        narrow = torch.zeros(len(block), shape[1], dtype=wide, device=device)
        narrow.index_add_(1, column_cells, block)
        total.index_add_(0, row_cells[start : start + len(block)], narrow)
    return total / torch.outer(row_cells.bincount(), column_cells.bincount())


def _magnitudes(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, block_bytes: int | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the magnitudes of each block, all in one piece of memory."""
    wide = _wide(A, B, grad_A, grad_B)
    # Both products are one: [B, G^B] [G^A; A].
    left = torch.cat([B.detach().to(wide), grad_B.detach().to(wide)], 1)
    right = torch.cat([grad_A.detach().to(wide), A.detach().to(wide)])
    if block_bytes is None:
        block_bytes = _CACHED if left.device.type == "cpu" else _ELSEWHERE
    height = max(1, min(left.shape[0], block_bytes // max(1, right.shape[1] * wide.itemsize)))
    memory = torch.empty(height, right.shape[1], dtype=wide, device=left.device)
    for start in range(0, left.shape[0], height):
        part = left[start : start + height]
        # What writes to an output is left alone by autocast.
        yield start, torch.mm(part, right, out=memory[: len(part)]).abs_()


def _wide(*tensors: Tensor) -> torch.dtype:
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _cells(size: int, most: int, device: torch.device) -> Tensor:
    """Return the cell of each of ``size`` places, ``[size]``, in at most ``most`` cells."""
    return torch.arange(size, device=device) * min(size, most) // size
