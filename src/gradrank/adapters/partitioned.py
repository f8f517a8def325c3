"""Forms of B whose rows fall into two groups: as compact blocks, or as a mask of a fixed shape."""

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from gradrank.adapters.parametrizations import Form, Masked, same_shape
from gradrank.core.errors import OptionError
from gradrank.core.partition import NeuronPartition

_WIDTH = 16


class Partitioned(Form):
    """``B = expand(B_d, B_s)``: two blocks of rows, each with columns of its own.

    Dominant rows hold the first r columns, the others the last r'; the rest of B is zero and
    stored nowhere.

    Attributes:
        partition: Which rows are dominant, and both ranks. ``lora_rank`` of a partition with a
            group without rows is less than ``rank + supplementary_rank``, the columns of B.

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
        self.partition = NeuronPartition.of(dominant.tolist(), rank, supplementary_rank)
        self.register_buffer("dominant", dominant.clone(), persistent=False)
        self.register_buffer("upper", dominant.nonzero().flatten(), persistent=False)
        self.register_buffer("lower", (~dominant).nonzero().flatten(), persistent=False)

    def forward(self, dominant: Tensor, supplementary: Tensor, spare: int = 0) -> Tensor:
        """Return the expanded B from its two blocks, and ``spare`` columns of zeros."""
        rows = self.dominant.numel()
        # Copies by row, because their gradient is a gather; that of a gather adds row by row. A
        # function of our own with fewer temporaries was slower, with Python in both passes.
        left = dominant.new_zeros(rows, self.rank).index_copy(0, self.upper, dominant)
        right = supplementary.new_zeros(rows, self.supplementary_rank)
        parts = [left, right.index_copy(0, self.lower, supplementary)]
        if spare:
            parts.append(left.new_zeros(rows, spare))
        return torch.cat(parts, dim=1)

    def product(
        self, x: Tensor, bias: Tensor | None, dominant: Tensor, supplementary: Tensor
    ) -> Tensor:
        """Return ``x Bᵀ``, by a wider product where that is faster.

        Products of an inner width of 9 take twice the time of those of 16 on a CPU, in the
        backward pass most of all. So both sides get columns of zeros there, which change nothing.

        Args:
            x: ``[..., r + r']``.
            bias: ``[d_out]``, or None.
            dominant: Block of the dominant rows.
            supplementary: Block of the others.
        """
        width = self.rank + self.supplementary_rank
        spare = -width % _WIDTH
        if not spare or width > _WIDTH or x.device.type != "cpu" or not torch.is_grad_enabled():
            return linear(x, self.forward(dominant, supplementary), bias)
        return linear(pad(x, (0, spare)), self.forward(dominant, supplementary, spare), bias)

    def compose(self, **learned: Tensor) -> Tensor:
        """Return the weight as the layer uses it."""
        return self.forward(learned["original0"], learned["original1"])

    def set_rows(self, dominant: Tensor) -> None:
        """Change which rows are dominant, in place; their number stays."""
        self.dominant.copy_(dominant)
        self.upper.copy_(dominant.nonzero().flatten())
        self.lower.copy_((~dominant).nonzero().flatten())
        self.partition = NeuronPartition.of(dominant.tolist(), self.rank, self.supplementary_rank)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blocks ``[|M|, r]`` and ``[d_out - |M|, r']`` of a whole B.

        Raises:
            OptionError: If an entry outside the blocks is not zero.
        """
        dominant = self.dominant.to(weight.device)
        check_blocks(weight, dominant, self.rank)
        upper, lower = weight[dominant], weight[~dominant]
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


class PartitionMask(Masked):
    """A partition of a fixed shape: B keeps all its columns, and each row sees those of its group.

    Dominant rows see the first ``rank`` columns, the others the columns from there up to
    ``active``. Until rows are split all of them are dominant and ``rank`` is ``active``, which is
    LoRA of that rank. As in :class:`gradrank.adapters.parametrizations.ComponentMask` the choice
    is made by ``where``, so that nothing of what is not in use reaches the function or a gradient.

    Attributes:
        partition: How rows are split; None while they are not.

    Args:
        rows: Output rows ``d_out``.
        width: Columns of B, in use or not.
        active: Columns that all rows see at first.
        device: Where the weight is.
    """

    kind = "partition-mask"
    mask: Tensor  # pyright: ignore[reportIncompatibleVariableOverride] - always there
    dominant: Tensor

    def __init__(self, rows: int, width: int, active: int, device: torch.device) -> None:
        super().__init__()
        self.active = active
        self.partition: NeuronPartition | None = None
        whole = torch.ones(rows, dtype=torch.bool, device=device)
        self.register_buffer("dominant", whole, persistent=False)
        self.register_buffer("mask", visible(whole, active, active, width), persistent=False)

    @property
    def ranks(self) -> tuple[int, int]:
        """Columns of dominant rows, and of the others."""
        if self.partition is None:
            return self.active, 0
        return self.partition.rank, self.partition.supplementary_rank

    def forward(self, original: Tensor) -> Tensor:
        """Return the weight from its original."""
        return torch.where(self.mask, original, 0.0)

    def compose(self, **learned: Tensor) -> Tensor:
        """Return the weight as the layer uses it."""
        return self.forward(learned["original"])

    def stored(self, rank: int) -> int:
        """Return how many columns a stock adapter stores: none is impossible."""
        return max(self.active, 1)

    def set_active(self, active: int) -> None:
        """Let all rows see the first columns, and no others, in place."""
        self._set(torch.ones_like(self.dominant), active, active, None)

    def set_partition(self, partition: NeuronPartition) -> None:
        """Split the rows, in place and without a new graph.

        Args:
            partition: Both groups must have rows, and the columns must suffice.
        """
        dominant = torch.tensor(partition.mask, device=self.dominant.device)
        self._set(dominant, partition.rank, partition.lora_rank, partition)

    def _set(
        self, dominant: Tensor, rank: int, active: int, partition: NeuronPartition | None
    ) -> None:
        self.active, self.partition = active, partition
        self.dominant.copy_(dominant)
        self.mask.copy_(visible(dominant, rank, active, self.mask.shape[1]))

    def compact(self, weight: Tensor) -> Tensor:
        """Return the stored columns only, contiguous."""
        return self.narrowed(weight, 1)

    def parts(self, value: Tensor, **learned: Tensor) -> dict[str, Tensor]:
        """Return learned tensors that compose to a stored weight.

        Raises:
            OptionError: If the weight does not fit, or has entries in columns that its row does
                not see.
        """
        original = learned["original"]
        width, size = original.shape[1], self.check_stored(value, original, 1)
        if self.partition is not None:
            check_blocks(value[:, : self.active], self.dominant.to(value.device), self.ranks[0])
        rest = value.new_zeros(value.shape[0], width - size)
        return {"original": torch.cat([value, rest], 1)}

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the original for a weight that is assigned."""
        return value


def check_blocks(weight: Tensor, dominant: Tensor, rank: int) -> None:
    """Refuse a whole B with entries that a partition would not use.

    Args:
        weight: ``[d_out, r + r']``.
        dominant: Boolean, ``[d_out]``.
        rank: Columns r of dominant rows.

    Raises:
        OptionError: If an entry outside the blocks is not zero.
    """
    lost = [weight[dominant][:, rank:], weight[~dominant][:, :rank]]
    count = sum(int(torch.count_nonzero(block)) for block in lost)
    if count:
        raise OptionError(
            f"B has {count} nonzero entries outside the blocks of the partition, which would "
            "be lost and change the function. Start from B = 0, or zero them first."
        )


def visible(dominant: Tensor, rank: int, active: int, width: int) -> Tensor:
    """Return which entries of a B of fixed shape are in use.

    Args:
        dominant: Boolean, ``[d_out]``.
        rank: Columns of dominant rows.
        active: Columns of both groups together.
        width: Columns of B.

    Returns:
        Boolean, ``[d_out, width]``.
    """
    column = torch.arange(width, device=dominant.device)
    own = column < rank
    return torch.where(dominant[:, None], own, (column < active) & ~own)
