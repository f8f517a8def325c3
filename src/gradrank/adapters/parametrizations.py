"""The parametrizations behind the forms: how a LoRA factor follows from its learned tensors."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from gradrank.core.errors import OptionError
from gradrank.ops.moments import wide_dtype


class Form(nn.Module):
    """How one weight follows from its learned tensors; stateless except for small buffers."""

    kind: ClassVar[str]

    def compose(self, **learned: Tensor) -> Tensor:
        """Return the weight as the layer uses it.

        Args:
            **learned: The learned tensors, by their name in :func:`learned_tensors`.
        """
        raise NotImplementedError

    def compact(self, weight: Tensor) -> Tensor:
        """Return the weight as a stock adapter stores it."""
        return weight.detach()

    def parts(self, value: Tensor, **learned: Tensor) -> dict[str, Tensor]:
        """Return learned tensors that compose to a stored weight.

        Args:
            value: The stored weight.
            **learned: The present learned tensors.
        """
        raise NotImplementedError


class ComponentMask(Form):
    """``weight = mask * original`` along the rank axis; the first ``active`` components count.

    The choice is made by ``where`` on a boolean buffer and not by a product: gradients of dormant
    components are exactly zero even beside infinities, and no cast of the model changes the
    mask's dtype, and with it the weight's.

    Args:
        rank: Components r.
        active: How many of them count.
        axis: Rank axis of the weight: 0 for A ``[r, d_in]``, 1 for B ``[d_out, r]``.
        device: Where the weight is.
    """

    kind = "mask"
    mask: Tensor

    def __init__(self, rank: int, active: int, axis: int, device: torch.device) -> None:
        super().__init__()
        self.axis = axis
        self.active = active
        self.register_buffer("mask", torch.arange(rank, device=device) < active, persistent=False)

    def forward(self, original: Tensor) -> Tensor:
        """Return the weight from its original."""
        return torch.where(self.mask.unsqueeze(1 - self.axis), original, 0.0)

    def compose(self, **learned: Tensor) -> Tensor:
        """Return the weight as the layer uses it."""
        return self.forward(learned["original"])

    def set_active(self, active: int) -> None:
        """Change the number of active components in place, without a new graph."""
        self.active = active
        self.mask.copy_(torch.arange(self.mask.numel(), device=self.mask.device) < active)

    def compact(self, weight: Tensor) -> Tensor:
        """Return the active components only, contiguous."""
        return (
            weight.detach()
            .narrow(self.axis, 0, self.active)
            .clone(memory_format=torch.contiguous_format)
        )

    def parts(self, value: Tensor, **learned: Tensor) -> dict[str, Tensor]:
        """Return learned tensors that compose to a stored weight."""
        original = learned["original"]
        rank, size = original.shape[self.axis], value.shape[self.axis]
        wanted = list(original.shape)
        wanted[self.axis] = size
        if list(value.shape) != wanted or size not in {rank, self.active}:
            raise OptionError(
                f"the stored weight is {list(value.shape)}, but the layer is "
                f"{list(original.shape)} with {self.active} of {rank} components active. Call "
                "set_active with the stored rank first, or resize the layer."
            )
        if size == rank:
            return {"original": value}
        rest = original.narrow(self.axis, size, rank - size).to(value)
        rest = torch.zeros_like(rest) if self.axis == 1 else rest
        return {"original": torch.cat([value, rest], dim=self.axis)}

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the original for a weight that is assigned."""
        return value


class Singular(Form):
    """``B = P diag(λ)``, with ``P`` in the place of the weight and λ a parameter of its own.

    Args:
        lam: λ ``[r]``.
        requires_grad: Whether λ is trained.
    """

    kind = "svd"

    def __init__(self, lam: Tensor, requires_grad: bool) -> None:
        super().__init__()
        self.lam = nn.Parameter(lam, requires_grad=requires_grad)

    def forward(self, original: Tensor) -> Tensor:
        """Return the weight from its original."""
        return original * self.lam

    def compose(self, **learned: Tensor) -> Tensor:
        """Return the weight as the layer uses it."""
        return learned["original"] * learned["0.lam"]

    def parts(self, value: Tensor, **learned: Tensor) -> dict[str, Tensor]:
        """Return learned tensors that compose to a stored weight."""
        # One factor alone has no singular values, but λ = 1 and P = B are the same function.
        same_shape(value, learned["original"])
        lam = torch.ones_like(learned["0.lam"], dtype=value.dtype, device=value.device)
        return {"original": value, "0.lam": lam}

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the original for a weight that is assigned."""
        with torch.no_grad():
            self.lam.fill_(1.0)
        return value


class Partition(Form):
    """``B = expand(B_d, B_s)``: two blocks of rows, each with columns of its own.

    Dominant rows hold the first r columns, the others the last r'; the rest of B is zero and
    stored nowhere.

    Args:
        dominant: Boolean, ``[d_out]``.
        rank: Columns r of dominant rows.
        supplementary_rank: Columns r' of the others.
    """

    kind = "partition"
    dominant: Tensor
    upper: Tensor
    lower: Tensor

    def __init__(self, dominant: Tensor, rank: int, supplementary_rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.supplementary_rank = supplementary_rank
        self.register_buffer("dominant", dominant.clone(), persistent=False)
        self.register_buffer("upper", dominant.nonzero().flatten(), persistent=False)
        self.register_buffer("lower", (~dominant).nonzero().flatten(), persistent=False)

    def forward(self, dominant: Tensor, supplementary: Tensor) -> Tensor:
        """Return the expanded B from its two blocks."""
        rows = self.dominant.numel()
        left = dominant.new_zeros(rows, self.rank)
        right = supplementary.new_zeros(rows, self.supplementary_rank)
        # Copies by row, because their gradient is a gather; that of a gather adds row by row.
        blocks = [
            left.index_copy(0, self.upper, dominant),
            right.index_copy(0, self.lower, supplementary),
        ]
        return torch.cat(blocks, dim=1)

    def compose(self, **learned: Tensor) -> Tensor:
        """Return the weight as the layer uses it."""
        return self.forward(learned["original0"], learned["original1"])

    def set_rows(self, dominant: Tensor) -> None:
        """Change which rows are dominant, in place; their number stays."""
        self.dominant.copy_(dominant)
        self.upper.copy_(dominant.nonzero().flatten())
        self.lower.copy_((~dominant).nonzero().flatten())

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blocks ``[|M|, r]`` and ``[d_out - |M|, r']`` of a whole B.

        Raises:
            OptionError: If an entry outside the blocks is not zero.
        """
        dominant = self.dominant.to(weight.device)
        upper, lower = weight[dominant], weight[~dominant]
        lost = [upper[:, self.rank :], lower[:, : self.rank]]
        count = sum(int(torch.count_nonzero(block)) for block in lost)
        if count:
            raise OptionError(
                f"B has {count} nonzero entries outside the blocks of the partition, which would "
                "be lost and change the function. Start from B = 0, or zero them first."
            )
        return upper[:, : self.rank].contiguous(), lower[:, self.rank :].contiguous()

    def parts(self, value: Tensor, **learned: Tensor) -> dict[str, Tensor]:
        """Return learned tensors that compose to a stored weight."""
        whole = (self.dominant.numel(), self.rank + self.supplementary_rank)
        same_shape(value, value.new_empty(whole, device="meta"))
        upper, lower = self.split(value)
        return {"original0": upper, "original1": lower}

    def right_inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blocks of a weight that is assigned."""
        return self.split(value)


def decompose(A: Tensor, B: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of ``B A`` from QR of both factors, without forming the product.

    Args:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        seed: Seed of the orthonormal P and Q of a zero update, whose λ is 0.

    Returns:
        P ``[d_out, r]``, λ ``[r]`` (not negative, descending) and Q ``[r, d_in]``, in float64
        (float32 on devices without it).
    """
    dtype = wide_dtype(A)
    if not bool(B.any()) or not bool(A.any()):
        generator = torch.Generator().manual_seed(seed)
        left, right = (
            torch.linalg.qr(torch.randn(n, A.shape[0], generator=generator, dtype=torch.float64)).Q
            for n in (B.shape[0], A.shape[1])
        )
        return left, A.new_zeros(A.shape[0]), right.T
    q_b, r_b = torch.linalg.qr(B.to(dtype))
    q_a, r_a = torch.linalg.qr(A.to(dtype).T)
    left, lam, right = torch.linalg.svd(r_b @ r_a.T)
    return q_b @ left, lam, right @ q_a.T


def same_shape(value: Tensor, present: Tensor) -> None:
    """Check a tensor that is about to be loaded.

    Args:
        value: What is given.
        present: What it is to replace.

    Raises:
        OptionError: If the shapes differ.
    """
    if value.shape != present.shape:
        raise OptionError(
            f"the given tensor is {list(value.shape)} and the layer's {list(present.shape)}. "
            "Resize the layer to the ranks it was saved with first."
        )
