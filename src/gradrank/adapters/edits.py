"""Edits: what surgery does to one LoRA layer. A closed set."""

import operator
from dataclasses import dataclass

from torch import Tensor

from gradrank.core.errors import OptionError
from gradrank.core.partition import NeuronPartition

SHRINK = ("svd", "norm")
STARTS = ("restart", "warm")


@dataclass(frozen=True, slots=True)
class Shrink:
    """Lower the rank.

    Attributes:
        rank: New rank, at least 1 and at most the present one; at the present one nothing happens.
        by: What is kept: ``svd``, the leading singular directions of the current ``B A``, or
            ``norm``, the components with the largest ``|B_i| |A_i|`` (in the SVD form, which has
            no other way, ``|lam_i| |p_i| |q_i|``), unchanged.
    """

    rank: int
    by: str = "svd"

    def __post_init__(self) -> None:
        if self.by not in SHRINK:
            raise OptionError(f"Shrink keeps by 'svd' or 'norm', not by {self.by!r}.")


@dataclass(frozen=True, slots=True)
class Grow:
    """Raise the rank without changing the function: the new columns of B are zero.

    In the SVD form the new entries of lam are zero, and rows of Q and columns of P are new.

    Attributes:
        rank: New rank, at least the present one.
        sketch: One-sided sketch ``[s, d_in]`` of the target's gradient: the new rows of A are its
            leading directions; None: random rows. Either way they get the norm of the old rows
            (of Q and P: 1 where there are none).
    """

    rank: int
    sketch: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Select:
    """Keep the named components, unchanged, in the order given, and remove the others.

    Attributes:
        components: Their numbers, distinct and below the rank, and at least one; none at all only
            in the SVD form at a fixed shape, where the target can grow again.

    Raises:
        OptionError: If a number is not whole, is negative or comes twice.
    """

    components: tuple[int, ...]

    def __post_init__(self) -> None:
        try:
            given = tuple(self.components)
            numbers = tuple(operator.index(number) for number in given)
        except TypeError as error:
            raise OptionError(
                f"Select needs whole numbers of components, not {self.components!r}."
            ) from error
        if any(isinstance(number, bool) for number in given) or min(numbers, default=0) < 0:
            raise OptionError(f"Select needs numbers of components from 0, not {given!r}.")
        if len(set(numbers)) < len(numbers):
            raise OptionError(f"Select names a component more than once: {given!r}.")
        object.__setattr__(self, "components", numbers)


@dataclass(frozen=True, slots=True)
class Drop:
    """Remove the adapter from a target for good; its update is lost."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Split the output rows into two groups with ranks of their own.

    Attributes:
        split: Which rows are dominant, and both ranks. A group without rows, or with rank 0, gets
            no adapter; if neither has one, the target is dropped.
        start: What both groups begin with: ``restart``, new random rows of A beside B = 0 and no
            memory in the optimizer (the paper), or ``warm``, the present update: rows of B are
            kept where the rank stays, and elsewhere the group's update is cut to its rank by its
            leading singular directions.

    Raises:
        OptionError: If ``start`` is unknown.

    Source:
        PiLoRA, section 3.3 and Algorithm 1, lines 14 to 18 (``restart``); ``warm`` is gradrank's.
    """

    split: NeuronPartition
    start: str = "restart"

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise OptionError(f"Partition starts by 'restart' or 'warm', not by {self.start!r}.")


Edit = Shrink | Grow | Drop | Select | Partition
