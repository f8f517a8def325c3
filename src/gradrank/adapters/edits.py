"""Edits: what surgery does to one LoRA layer. A closed set."""

from dataclasses import dataclass

from torch import Tensor

from gradrank.core.errors import OptionError

SHRINK = ("svd", "norm")


@dataclass(frozen=True, slots=True)
class Shrink:
    """Lower the rank.

    Attributes:
        rank: New rank, at least 1 and at most the present one; at the present one nothing happens.
        by: What is kept: ``svd``, the leading singular directions of the current ``B A``, or
            ``norm``, the components with the largest ``|B_i| |A_i|``, unchanged.
    """

    rank: int
    by: str = "svd"

    def __post_init__(self) -> None:
        if self.by not in SHRINK:
            raise OptionError(f"Shrink keeps by 'svd' or 'norm', not by {self.by!r}.")


@dataclass(frozen=True, slots=True)
class Grow:
    """Raise the rank without changing the function: the new columns of B are zero.

    Attributes:
        rank: New rank, at least the present one.
        sketch: One-sided sketch ``[s, d_in]`` of the target's gradient: the new rows of A are its
            leading directions; None: random rows. Either way they get the norm of the old rows.
    """

    rank: int
    sketch: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """Remove the adapter from a target for good; its update is lost."""


Edit = Shrink | Grow | Drop
