"""Neuron partitions: two ranks inside one layer, the larger one for its dominant output rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradrank.core.errors import PlanError

# Far above any layer; a file that claims more is refused before memory is taken for it.
_MOST_ROWS = 1 << 24


@dataclass(frozen=True, slots=True)
class NeuronPartition:
    """A capacity: dominant output rows get rank r, the other rows rank r'.

    A group without rows, or with rank 0, has no adapter at all and costs nothing.

    Attributes:
        d_out: Output rows m of the target.
        rank: Rank r of dominant rows, at least 1.
        supplementary_rank: Rank r' of the others, 0 or more.
        bits: The set M of dominant rows: bit i is set if row i is dominant.

    Raises:
        PlanError: If a number is out of its range.

    Source:
        PiLoRA, section 3.3.
    """

    d_out: int
    rank: int
    supplementary_rank: int
    bits: int

    def __post_init__(self) -> None:
        least = {"d_out": 1, "rank": 1, "supplementary_rank": 0, "bits": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise PlanError(
                    f"a neuron partition has {name} {value!r}; it must be a whole number, {bound} "
                    "or more."
                )
        if self.d_out > _MOST_ROWS or self.bits.bit_length() > self.d_out:
            raise PlanError(
                f"a neuron partition of {self.d_out:,} rows names row "
                f"{max(self.bits.bit_length() - 1, 0):,} as dominant; rows are numbered from 0, "
                f"and {_MOST_ROWS:,} are the most."
            )

    @classmethod
    def of(
        cls, dominant: Sequence[bool] | Iterable[bool], rank: int, supplementary_rank: int
    ) -> "NeuronPartition":
        """Return a partition from a mask.

        Args:
            dominant: One entry per output row.
            rank: Rank r of dominant rows.
            supplementary_rank: Rank r' of the others.

        Returns:
            The partition.
        """
        flags = list(dominant)
        return cls(len(flags), rank, supplementary_rank, bits_of(flags))

    @property
    def mask(self) -> list[bool]:
        """Whether each row is dominant, ``[d_out]``."""
        return [digit == "1" for digit in reversed(f"{self.bits:0{self.d_out}b}")]

    @property
    def dominant_rows(self) -> int:
        """Number of dominant rows ``|M|``."""
        return self.bits.bit_count()

    @property
    def ranks(self) -> tuple[int, int]:
        """Ranks r and r' that are in use; 0 for a group without rows."""
        empty = not self.bits, self.dominant_rows == self.d_out
        return 0 if empty[0] else self.rank, 0 if empty[1] else self.supplementary_rank

    @property
    def lora_rank(self) -> int:
        """Rank of the stock LoRA that holds it, ``r + r'`` of the ranks in use."""
        return sum(self.ranks)

    @property
    def is_split(self) -> bool:
        """Whether both groups have an adapter, so that a single rank does not say it all.

        With r' = 0 and rows that are left out it is split too: the stock LoRA of rank r has zeros
        in those rows.
        """
        return 0 < self.dominant_rows < self.d_out

    def parameters(self, d_in: int) -> int:
        """Return the trainable parameters, ``r (n + |M|) + r' (n + m - |M|)`` of ranks in use.

        Args:
            d_in: Input features n of the target.
        """
        upper, lower = self.ranks
        rows = self.dominant_rows
        return upper * (d_in + rows) + lower * (d_in + self.d_out - rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; ``dominant`` is a hexadecimal number whose bit i stands for row i."""
        return {
            "d_out": self.d_out,
            "rank": self.rank,
            "supplementary_rank": self.supplementary_rank,
            "dominant_rows": self.dominant_rows,
            "dominant": f"{self.bits:x}",
        }

    @classmethod
    def from_dict(cls, data: Any) -> "NeuronPartition":
        """Read plain data; ``dominant_rows`` is counted, not trusted.

        Args:
            data: What :meth:`to_dict` returns, possibly edited by hand.

        Returns:
            The partition.

        Raises:
            PlanError: If a field is missing or wrong.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"a neuron partition is an object, not a {type(data).__name__}.")
        known: Mapping[str, Any] = data
        missing = [k for k in ("d_out", "rank", "supplementary_rank", "dominant") if k not in known]
        if missing:
            raise PlanError(f"a neuron partition lacks '{missing[0]}'.")
        text = known["dominant"]
        if not isinstance(text, str) or len(text) > _MOST_ROWS // 4:
            raise PlanError("a neuron partition's 'dominant' must be a hexadecimal text.")
        try:
            bits = int(text, 16)
        except ValueError as error:
            raise PlanError(
                f"a neuron partition's 'dominant' is no hexadecimal number: {text[:24]!r}."
            ) from error
        return cls(known["d_out"], known["rank"], known["supplementary_rank"], bits)


def bits_of(dominant: Sequence[bool]) -> int:
    """Return a mask of rows as a number: bit i is set if row i is dominant.

    Args:
        dominant: One entry per row.

    Returns:
        The number.

    Examples:
        >>> bits_of([True, False, True])
        5
    """
    text = "".join("1" if flag else "0" for flag in reversed(dominant))
    return int(text, 2) if text else 0


Capacity = int | NeuronPartition
"""What one target gets: a rank, or a neuron partition."""
