"""What became of a merge: logits of its files, and what rounding did to the weights."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradrank.core.errors import PlanError
from gradrank.serving.check import Reference

# Rounding of float32 sums in another order through a whole model, relative to the largest logit.
_NOISE = 1e-4


@dataclass(frozen=True, slots=True)
class Rounding:
    """How far a merged weight is from the sum of weight and update, in the Frobenius norm.

    Attributes:
        weight: Error relative to the sum.
        update: Error relative to the update alone: the share of what was trained that rounding
            blurs.
    """

    weight: float
    update: float


@dataclass(frozen=True)
class Merged:
    """A merged model as it was read back from its files.

    Attributes:
        logits: Of the files, on the check inputs.
        wanted: What they should be where that is not what the live model computes: a quantised
            base is compared with its own dequantised weights, so that rounding of *activations*
            inside 8-bit kernels does not count as an error of merging. Else None.
        rounding: By module, measured on the weights that were read back.
        dtype: Type of the merged weights; for requantised ones the type that they compute in.
        requantised: Whether the merged weights are stored in codes again.
    """

    logits: Tensor
    wanted: Tensor | None = None
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    requantised: bool = False

    def difference(self, reference: Reference) -> float:
        """Return the largest difference of a logit from what it should be.

        Args:
            reference: Of the live model.
        """
        wanted = reference.logits if self.wanted is None else self.wanted
        return float((self.logits - wanted).abs().max())

    def tolerance(self, reference: Reference) -> float:
        """Return the largest difference of a logit to accept.

        The merged weights themselves have been compared with the exact sums, to the last bit of
        their type, so that this is about everything else. In single precision it is a ten
        thousandth of the largest logit (or of the adapter's largest effect on one). What a shorter
        type does to logits depends on the depth of the model: eight units of rounding are allowed,
        or 64 as long as that is less than half of the effect. Requantised weights have no last bit
        to compare: they may miss half of the effect.

        Args:
            reference: Of the live model.
        """
        if self.requantised:
            return reference.effect / 2
        largest = max(float(reference.logits.abs().max()), reference.effect, 1.0)
        eps = torch.finfo(self.dtype).eps
        return max(largest * max(_NOISE, 8 * eps), min(reference.effect / 2, largest * 64 * eps))

    def lines(self) -> tuple[str, ...]:
        """Return what rounding did, in lines for the user."""
        if not self.rounding:
            return ()
        form = "requantised" if self.requantised else str(self.dtype).removeprefix("torch.")
        worst = max(self.rounding, key=lambda name: self.rounding[name].update)
        updates = [r.update for r in self.rounding.values()]
        weights = [r.weight for r in self.rounding.values()]
        return (
            f"rounding to {form}, relative to the merged weights: median "
            f"{statistics.median(weights):.2g}, largest {max(weights):.2g}",
            f"the same relative to the updates: median {statistics.median(updates):.2g}, largest "
            f"{max(updates):.2g} ('{worst}')",
        )

    def check_kept(self) -> None:
        """Refuse a merge that has rounded the updates away.

        Raises:
            PlanError: If in half of the modules the error is as large as the update or larger.
        """
        updates = [own.update for own in self.rounding.values()]
        if self.requantised and updates and statistics.median(updates) >= 1:
            raise PlanError(
                "requantising rounds the updates away: the error of the merged weights has "
                f"{statistics.median(updates):.2g} times the norm of the updates themselves "
                f"(median of {len(updates)} modules). Merge without requantising, or serve the "
                "adapter beside the quantised base."
            )
