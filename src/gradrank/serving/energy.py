"""What the updates of an adapter are made of: singular values, energy, effective rank."""

import math
from dataclasses import dataclass

import torch

from gradrank.core.errors import PlanError
from gradrank.ops.products import singular_values
from gradrank.ops.spectrum import effective_rank, stable_rank
from gradrank.serving.adapter import Adapter

# Share of the energy that an effective rank has to hold.
ENERGY = 0.9


@dataclass(frozen=True, slots=True)
class TargetEnergy:
    """What the update of one module is made of.

    Attributes:
        singular_values: Of ``scaling * B A``, descending; as many as its numerical rank.
    """

    singular_values: tuple[float, ...]

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the update."""
        return math.fsum(value * value for value in self.singular_values)

    @property
    def effective_rank(self) -> int:
        """Fewest directions that hold 90 % of the energy."""
        return int(effective_rank(self._squares(), ENERGY))

    @property
    def stable_rank(self) -> float:
        """Energy over that of the strongest direction."""
        return float(stable_rank(self._squares()))

    def kept(self, rank: int) -> float:
        """Return the share of the energy in the strongest directions; 1 for a zero update.

        Args:
            rank: How many.
        """
        whole = self.energy
        lost = math.fsum(value * value for value in self.singular_values[rank:])
        return 1.0 - lost / whole if whole else 1.0

    def _squares(self) -> torch.Tensor:
        return torch.tensor([*self.singular_values, 0.0], dtype=torch.float64).square()


def energy(adapter: Adapter) -> dict[str, TargetEnergy]:
    """Return the singular values of every update.

    Args:
        adapter: The adapter.

    Returns:
        Energy by module name, in the adapter's order.

    Raises:
        PlanError: If an update is too large to be decomposed.
    """
    found = {}
    for name, update in adapter.updates.items():
        # No singular value exceeds the product of the norms.
        largest = float(update.a.double().norm() * update.b.double().norm()) * abs(update.scaling)
        if not math.isfinite(largest * largest):
            raise PlanError(
                f"the update of '{name}' is too large to be decomposed; the adapter is not usable."
            )
        values = singular_values(update.a, update.b) * abs(update.scaling)
        # A scale of 0, or one that makes squares vanish, leaves nothing.
        found[name] = TargetEnergy(tuple(values[values.square() > 0].tolist()))
    return found
