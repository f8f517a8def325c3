"""What becomes of weights and optimizer moments when the components of a factor change.

A LoRA factor has one *rank axis*; its components are the slices along it. An edit keeps some of
them, or mixes them by a small matrix, and may append new ones. Gradients change with the basis,
and so must the moments that an optimizer holds of them.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

Role = Literal["weight", "first", "second", "magnitude"]


@dataclass(frozen=True, slots=True, eq=False)
class Carry:
    """How the components before an edit become those after it.

    These come in the order carried, fresh, blank. Exactly one of ``indices`` and ``matrix`` is
    given.

    Attributes:
        indices: Components that are kept, in their new order.
        matrix: ``[k, r]``: how *gradients* along the rank axis change with the basis. For factors
            ``A' = R_A A`` and ``B' = B R_B`` that is ``R_B^T`` for ``A`` and ``R_A`` for ``B``,
            since ``grad A' = R_B^T grad A`` and ``grad B' = grad B R_A^T``.
        fresh: Number of new components, to be trained.
        blank: Number of dormant components, masked away by whoever holds the factor.

    Raises:
        ValueError: If the fields contradict one another.
    """

    indices: tuple[int, ...] | None = None
    matrix: Tensor | None = None
    fresh: int = 0
    blank: int = 0

    def __post_init__(self) -> None:
        if (self.indices is None) == (self.matrix is None):
            raise ValueError("a carry needs either indices or a matrix, and not both.")
        if self.fresh < 0 or self.blank < 0:
            raise ValueError(f"fresh={self.fresh} and blank={self.blank} must not be negative.")
        if self.indices is not None and (
            len(set(self.indices)) < len(self.indices) or min(self.indices, default=0) < 0
        ):
            raise ValueError(f"indices {self.indices} must be distinct and not negative.")
        if self.matrix is not None:
            if self.matrix.dim() != 2 or not self.matrix.is_floating_point():
                raise ValueError(
                    f"the matrix is {tuple(self.matrix.shape)} of {self.matrix.dtype}; it must be "
                    "a floating-point matrix [new, old]."
                )
            if not bool(torch.isfinite(self.matrix).all()):
                raise ValueError("the matrix holds NaN or infinite values.")
        if self.size == 0:
            raise ValueError("nothing would be left: no component is carried, fresh or blank.")

    @classmethod
    def keep(cls, rank: int) -> Self:
        """Keep every component, which changes nothing.

        Args:
            rank: Number of components.

        Returns:
            The carry.
        """
        return cls(indices=tuple(range(rank)))

    @classmethod
    def select(cls, indices: Iterable[int], fresh: int = 0, blank: int = 0) -> Self:
        """Keep the named components, in the order given.

        Args:
            indices: Components to keep.
            fresh: Number of new components behind them.
            blank: Number of dormant components at the end.

        Returns:
            The carry.
        """
        return cls(tuple(operator.index(i) for i in indices), None, fresh, blank)

    @classmethod
    def rotate(cls, matrix: Tensor, fresh: int = 0, blank: int = 0) -> Self:
        """Mix the components by a matrix.

        Args:
            matrix: ``[k, r]``, see the class.
            fresh: Number of new components behind them.
            blank: Number of dormant components at the end.

        Returns:
            The carry.
        """
        return cls(None, matrix.detach(), fresh, blank)

    @property
    def carried(self) -> int:
        """Number of components that come from the old ones."""
        return len(self.indices or ()) if self.matrix is None else self.matrix.shape[0]

    @property
    def size(self) -> int:
        """Number of components after the edit."""
        return self.carried + self.fresh + self.blank

    def keeps_all(self, rank: int) -> bool:
        """Tell whether the edit changes nothing.

        Args:
            rank: Number of components before.

        Returns:
            Whether every component is kept in its place and none is appended.
        """
        return self.indices == tuple(range(rank)) and self.size == rank

    def check(self, rank: int) -> None:
        """Check that the carry fits a number of components.

        Args:
            rank: Number of components before.

        Raises:
            ValueError: If an index lies beyond them, or the matrix is for another number.
        """
        if self.indices is not None and max(self.indices, default=-1) >= rank:
            raise ValueError(f"indices {self.indices} reach beyond the {rank} components.")
        if self.matrix is not None and self.matrix.shape[1] != rank:
            raise ValueError(
                f"the matrix is {tuple(self.matrix.shape)} and there are {rank} components; its "
                "second axis must have their number."
            )


@torch.no_grad()
def carry_tensor(tensor: Tensor, carry: Carry, axis: int, role: Role) -> Tensor:
    """Carry one tensor over an edit.

    With ``T`` the matrix of the carry, what is linear in the gradient (``first``, and ``weight``,
    for which the caller passes the weight's own matrix) becomes ``T x``, exactly. A mean square
    (``second``) becomes ``(T * T) x``: exact where the gradients of different components are
    uncorrelated, and never negative. A ``magnitude`` (Adamax) goes by its squares.

    Appended components are zero, but fresh ones of ``second`` and ``magnitude`` get the mean over
    the carried components: zeros there beside a large step count would make Adam's first step of
    a new component ``(1 - beta1) / sqrt(1 - beta2)`` learning rates long, 3.2 for its defaults.

    Args:
        tensor: Any shape; floating point.
        carry: The edit.
        axis: The rank axis.
        role: What the tensor holds.

    Returns:
        A new contiguous tensor, ``carry.size`` long on the rank axis; dtype and device as before.
        Selected values are bitwise those given; mixed ones are computed in double precision
        (single where the device has none) and rounded once.

    Raises:
        ValueError: If the carry does not fit, or the role is unknown.

    Examples:
        >>> moment = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> carry_tensor(moment, Carry.select([2, 0], fresh=1), axis=0, role="second")
        tensor([[5., 6.],
                [1., 2.],
                [3., 4.]])
    """
    if role not in {"weight", "first", "second", "magnitude"}:
        raise ValueError(f"role '{role}' is none of weight, first, second, magnitude.")
    carry.check(tensor.shape[axis])
    return _append(_carried(tensor.detach(), carry, axis, role), carry, axis, role)


@torch.no_grad()
def carry_centred(square: Tensor, mean: Tensor, carry: Carry, axis: int) -> Tensor:
    """Carry a mean square whose optimizer subtracts a squared mean from it (centred RMSprop).

    Variance and mean are carried apart, so that the new mean square is never below the square of
    the new mean: ``(T * T)(square - mean^2) + (T mean)^2``.

    Args:
        square: Running mean of squared gradients.
        mean: Running mean of gradients, same shape.
        carry: The edit.
        axis: The rank axis.

    Returns:
        The new mean square; otherwise as :func:`carry_tensor` returns it.
    """
    if carry.matrix is None:
        return carry_tensor(square, carry, axis, "second")
    wide = wide_dtype(square)
    variance = (square.to(wide) - mean.to(wide).square()).clamp_min(0)
    carry.check(square.shape[axis])
    # The mean as it will be stored: rounding must not lift its square above the mean square.
    stored = _carried(mean, carry, axis, "first").to(wide)
    core = _carried(variance, carry, axis, "second") + stored.square()
    return _append(core.to(square.dtype), carry, axis, "second")


@torch.no_grad()
def carry_factored(along: Tensor, across: Tensor, carry: Carry, axis: int) -> tuple[Tensor, Tensor]:
    """Carry second moments that are stored as row means and column means (Adafactor).

    The moments that the two vectors stand for are ``V_ij = R_i C_j / mean(R)``, and the mean of
    each vector is the mean of ``V``. Only the statistics along the rank axis have components; the
    others are means *over* the components, and become means over the new ones by the ratio of the
    new mean to the old. So the estimate ``V`` of a kept component is unchanged. What stays
    approximate is the rank-1 form itself: means over the dropped components alone cannot be told
    from the rest.

    Args:
        along: Statistics with one value per component.
        across: Statistics with one value per coordinate of the other axis.
        carry: The edit.
        axis: Where ``along`` has its components.

    Returns:
        Both, carried.

    Source:
        Shazeer and Stern, "Adafactor", arXiv 1804.04235, Algorithm 2.
    """
    moved = carry_tensor(along, carry, axis, "second")
    wide = wide_dtype(along)
    before, after = along.mean(dtype=wide), moved.mean(dtype=wide)
    ratio = torch.where((before > 0) & (after > 0), after / before, torch.ones_like(before))
    return moved, (across.detach().to(wide) * ratio).to(across.dtype)


def _carried(tensor: Tensor, carry: Carry, axis: int, role: Role) -> Tensor:
    """The carried components alone."""
    if carry.matrix is None:
        return tensor.index_select(axis, torch.tensor(carry.indices, device=tensor.device).long())
    wide = wide_dtype(tensor)
    matrix, values = carry.matrix.to(tensor.device, wide), tensor.to(wide)
    if role in {"second", "magnitude"}:
        matrix = matrix.square()
    if role == "magnitude":
        values = values.square()
    mixed = (values.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    if role == "magnitude":
        mixed = mixed.sqrt()
    return mixed.to(tensor.dtype).contiguous()


def _append(core: Tensor, carry: Carry, axis: int, role: Role) -> Tensor:
    """The fresh and the blank components behind the carried ones."""
    if not carry.fresh and not carry.blank:
        return core
    shape = list(core.shape)
    shape[axis] = carry.fresh
    if role in {"second", "magnitude"} and carry.carried:
        fresh = core.mean(axis, keepdim=True, dtype=wide_dtype(core)).to(core.dtype).expand(shape)
    else:
        fresh = core.new_zeros(shape)
    shape[axis] = carry.blank
    return torch.cat([core, fresh, core.new_zeros(shape)], axis)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in before rounding once: float64, or float32 where there is none.

    Args:
        tensor: A tensor on the device in question.

    Returns:
        The dtype.
    """
    # Double precision is left alone by autocast and by the reduced-precision float32 of GPUs.
    return torch.float32 if tensor.device.type == "mps" else torch.float64
