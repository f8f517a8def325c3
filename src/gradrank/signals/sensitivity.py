"""What a method may ask of the adapter's own gradients, and what a look at them gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gradrank.ops import quadrature
from gradrank.ops.sketch import seed_of
from gradrank.signals.path import FACTORS, RANK_AXIS, Branch

RULES = ("grid", "stochastic", "unbiased")
ENDPOINTS = ("drawn", "always")
Gradients = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class TrainingGradient:
    """The gradient that the optimizer is about to use (AdaLoRA's signal)."""


@dataclass(frozen=True, slots=True)
class RandomScale:
    """Training at a random point of the path, as IGU-LoRA's published code does.

    Every micro-batch is trained with the adapter scaled by ``α³``, α uniform on
    ``1/N, ..., N/N``, and that same gradient is the signal, taken after the step.

    Attributes:
        segments: N.
    """

    segments: int


@dataclass(frozen=True, slots=True)
class PathGradient:
    """Path integral of the gradient, by passes of its own that training does not feel.

    Attributes:
        rule: ``grid``, ``stochastic`` or ``unbiased``; see :mod:`gradrank.ops.quadrature`.
        segments: N.
        endpoints: Of ``unbiased``: ``drawn`` (one point of the whole grid per micro-batch) or
            ``always`` (0, one interior point, and 1).
        micro_batches: The last micro-batches of a step that are looked at.
        factors: Which factors' gradients.
        losses: Whether the loss at both ends of the path is wanted too.
        rows: Share of a micro-batch's rows that passes look at, the first ones, in (0, 1].
    """

    rule: str
    segments: int
    endpoints: str = "drawn"
    micro_batches: int = 1
    factors: tuple[str, ...] = FACTORS
    losses: bool = False
    rows: float = 1.0

    def draw(self, seed: int, index: int) -> quadrature.Rule:
        """Return the points of a micro-batch.

        Args:
            seed: Seed of the run.
            index: How many micro-batches were drawn for before, in all processes together.

        Returns:
            Points and weights.
        """
        n = self.segments
        if self.rule == "grid":
            return quadrature.trapezoid(n)
        if self.rule == "unbiased" and self.endpoints == "drawn":
            coin = seed_of("coin", seed, index) & 1
            return quadrature.one_of_grid(n, 2 * quadrature.stratum(n, seed, index) + coin)
        interior = 1 + quadrature.stratum(n - 1, seed, index)
        printed = self.rule == "stochastic"
        rule = quadrature.as_printed if printed else quadrature.with_interior_weighted
        return rule(n, interior)


Sensitivity = TrainingGradient | RandomScale | PathGradient


@dataclass(frozen=True)
class Observation:
    """What one look at the gradients gave, of all processes together.

    Attributes:
        gradients: Gradients, or path integrals of them, per target and factor, float32; for
            components in use.
        weights: The factors' values they belong to, in the same layout.
        passes: Forward and backward passes of its own that it took.
        loss_change: ``L(ΔW) - L(0)`` on the same micro-batches, where asked for.
    """

    gradients: Mapping[str, Mapping[str, Tensor]]
    weights: Mapping[str, Mapping[str, Tensor]]
    passes: int = 0
    loss_change: float | None = None


def in_use(branch: Branch, factor: str, tensor: Tensor) -> Tensor:
    """Return the components of a factor, or of its gradient, that are in use.

    Args:
        branch: The adapter.
        factor: The factor.
        tensor: Laid out like the factor.

    Returns:
        A float32 tensor with ``branch.rank`` components.
    """
    return tensor.detach().narrow(RANK_AXIS[factor], 0, branch.rank).float()


def weights_in_use(branches: Sequence[Branch], factors: Sequence[str]) -> Gradients:
    """Return the values of the factors' components in use.

    Args:
        branches: The adapters.
        factors: Which factors.

    Returns:
        Float32 tensors per target and factor; they may share memory with the live ones.
    """
    return {b.name: {f: in_use(b, f, b.learned[f]) for f in factors} for b in branches}
