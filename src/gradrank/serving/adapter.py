"""A LoRA adapter as plain tensors: what every engine is given a form of."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradrank.core.targets import Target


@dataclass(frozen=True, slots=True)
class Update:
    """The low-rank update of one module, ``scaling * b @ a``.

    Attributes:
        name: Full name of the module in the base model.
        a: ``[r, d_in]``.
        b: ``[d_out, r]``.
        scaling: What the product is multiplied by.
    """

    name: str
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Number of components."""
        return int(self.a.shape[0])

    @property
    def target(self) -> Target:
        """The module, with its shape."""
        return Target(self.name, int(self.a.shape[1]), int(self.b.shape[0]))

    @property
    def parameters(self) -> int:
        """Parameters of both factors."""
        return self.a.numel() + self.b.numel()

    def delta(self) -> Tensor:
        """Return the update of the weight ``[d_out, d_in]``, float64."""
        return self.scaling * (self.b.double() @ self.a.double())

    def folded(self, scaling: float = 1.0) -> "Update":
        """Return the same update under another scale, the quotient folded into ``b``.

        Args:
            scaling: The scale to be multiplied by from now on; not zero.
        """
        if self.scaling == scaling:
            return self
        # One rounding, of the product itself: the quotient is taken in double precision.
        b = (self.b.double() * (self.scaling / scaling)).to(self.b.dtype)
        return replace(self, b=b, scaling=scaling)

    def padded(self, rank: int) -> "Update":
        """Return the same update with rows of zeros in ``a`` and columns of zeros in ``b``.

        Args:
            rank: The rank to have; at least the present one.
        """
        more = rank - self.rank
        if not more:
            return self
        a = torch.cat([self.a, self.a.new_zeros(more, self.a.shape[1])])
        b = torch.cat([self.b, self.b.new_zeros(self.b.shape[0], more)], 1)
        return replace(self, a=a, b=b)

    def to(self, dtype: torch.dtype) -> "Update":
        """Return the update with factors of another type.

        Args:
            dtype: Of both factors.
        """
        return replace(self, a=self.a.to(dtype), b=self.b.to(dtype))


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: updates of linear modules, and whatever else it brings.

    Attributes:
        updates: Update by module name, in the order in which people count layers.
        config: Fields of PEFT's configuration that say more than ranks and scales, checked.
        other: Further tensors by their key in the file without PEFT's prefix: modules that are
            saved whole, magnitudes of DoRA, factors of embeddings, biases.
        features: What a plain LoRA engine cannot express, in words; empty for plain LoRA.
    """

    updates: Mapping[str, Update]
    config: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Tensor] = field(default_factory=dict)
    features: tuple[str, ...] = ()

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module name."""
        return {name: update.rank for name, update in self.updates.items()}

    @property
    def parameters(self) -> int:
        """Parameters of all factors of linear modules."""
        return sum(update.parameters for update in self.updates.values())

    @property
    def max_rank(self) -> int:
        """Largest rank."""
        return max((update.rank for update in self.updates.values()), default=0)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        factors = [t for update in self.updates.values() for t in (update.a, update.b)]
        return sum(t.numel() * t.element_size() for t in (*factors, *self.other.values()))

    def to(self, dtype: torch.dtype) -> "Adapter":
        """Return the adapter with factors of another type; other tensors keep theirs.

        Args:
            dtype: Of all factors.
        """
        return self.with_updates(update.to(dtype) for update in self.updates.values())

    def with_updates(self, updates: Any) -> "Adapter":
        """Return the adapter with other updates.

        Args:
            updates: Iterable of :class:`Update`.
        """
        return replace(self, updates={update.name: update for update in updates})
