"""Integrated gradients of whole directions, which add up to the change of the loss."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradrank.core.targets import Target
from gradrank.methods.importance import check_seen, select
from gradrank.methods.method import option, require
from gradrank.methods.pruning import PruningCourse, PruningOptions
from gradrank.signals.sensitivity import ENDPOINTS, Observation, PathGradient

RULES = ("grid", "unbiased")


@dataclass(frozen=True, slots=True, kw_only=True)
class IguDirection(PruningOptions):
    r"""Prune the directions that lower the loss least per parameter.

    The attribution of direction i is
    :math:`\lambda_i \int_0^1 p_i^\top G(\alpha \Delta W)\, q_i\, d\alpha`, with all targets at the
    same α. It is complete: over all directions of all targets it adds up to
    :math:`L(\Delta W) - L(0)`, and how far the estimate misses that is the *completeness gap*. What
    a direction is worth is minus its attribution, divided by its parameters.

    Source:
        gradrank; after Sundararajan, Taly and Yan, arXiv 1703.01365 (completeness), and IGU-LoRA.
    """

    name: ClassVar[str] = "igu-direction"
    summary: ClassVar[str] = "Integrated gradients per direction; they add up to the loss change"
    source: ClassVar[str] = "gradrank, after IGU-LoRA"

    estimator: str = option("grid", "'grid', or 'unbiased' (fewer passes, a noisy gap)")
    segments: int = option(4, "segments N of the path")
    score_every: int = option(20, "steps between looks")
    micro_batches: int = option(1, "micro-batches of a step that are looked at, the last ones")
    rows: float = option(1.0, "share of a micro-batch's rows that passes look at, in (0, 1]")
    endpoints: str = option("drawn", "of 'unbiased': 0 and 1 are 'drawn' too, or 'always' taken")
    beta: float = option(0.85, "smoothing of attributions, in [0, 1)")
    tolerance: float = option(0.1, "completeness gap, relative, above which a warning is given")

    def __post_init__(self) -> None:
        self.check_pruning()
        rules = {
            "estimator": (self.estimator in RULES, " or ".join(map(repr, RULES))),
            "segments": (
                self.segments >= (2 if self.estimator == "unbiased" else 1),
                "1 or more, and 2 or more where an interior point is drawn",
            ),
            "score_every": (self.score_every >= 1, "1 or more"),
            "micro_batches": (self.micro_batches >= 1, "1 or more"),
            "rows": (0 < self.rows <= 1, "in (0, 1]"),
            "endpoints": (self.endpoints in ENDPOINTS, " or ".join(map(repr, ENDPOINTS))),
            "beta": (0 <= self.beta < 1, "in [0, 1)"),
            "tolerance": (self.tolerance > 0, "above 0"),
        }
        for name, (ok, rule) in rules.items():
            require(ok, self.name, name, getattr(self, name), rule)

    def course(self, targets: Sequence[Target], budget: int, total_steps: int) -> PruningCourse:
        """Return the course of one run.

        Args:
            targets: The targets.
            budget: Parameters in the end.
            total_steps: Optimizer steps of the run.

        Returns:
            The course, before its first decision.
        """
        signal = PathGradient(
            self.estimator,
            self.segments,
            self.endpoints,
            self.micro_batches,
            factors=("lam",),
            losses=True,
            rows=self.rows,
        )
        importance = Attributions(self.beta, self.tolerance)
        return PruningCourse(
            self, importance, signal, targets, budget, total_steps, self.score_every
        )


class Attributions:
    """Smoothed attribution of every direction, and how completely they explain the loss."""

    def __init__(self, beta: float, tolerance: float) -> None:
        self._beta, self._tolerance = beta, tolerance
        self._smoothed: dict[str, Tensor] = {}
        self._passes = 0
        # Since the last decision: looks, the sum of all attributions, the change of the loss.
        self._since = [0.0, 0.0, 0.0]

    def take(self, observation: Observation) -> None:
        """Take in one look at the gradients."""
        total = []
        beta = self._beta if self._smoothed else 0.0
        for name, factors in observation.gradients.items():
            found = factors["lam"] * observation.weights[name]["lam"]
            total.append(found.sum())
            before = self._smoothed.get(name)
            self._smoothed[name] = found if before is None else beta * before + (1 - beta) * found
        self._passes += observation.passes
        self._since[0] += 1
        self._since[1] += float(torch.stack(total).sum()) if total else 0.0
        self._since[2] += observation.loss_change or 0.0

    def scores(self, targets: Sequence[Target], lam: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what each direction is worth per parameter; refused if nothing was looked at."""
        check_seen(bool(self._smoothed))
        return {
            t.name: -self._smoothed[t.name] / t.cost if t.name in lam else torch.zeros(0)
            for t in targets
        }

    def follow(self, keep: Mapping[str, tuple[int, ...]]) -> None:
        """Forget the directions that were taken away."""
        for name, kept in keep.items():
            if not kept:
                self._smoothed.pop(name, None)
            elif name in self._smoothed:
                self._smoothed[name] = select(self._smoothed[name], "lam", kept)

    def facts(self) -> dict[str, float]:
        """Return attributed and actual change of the loss since the last decision, and the gap."""
        looks, attributed, change = self._since
        self._since = [0.0, 0.0, 0.0]
        known = {"passes": float(self._passes)}
        if not looks:
            return known
        gap = abs(attributed - change) / max(abs(change), 1e-12)
        gap = 0.0 if attributed == change else min(gap, 1e6)
        if gap > self._tolerance:
            warnings.warn(
                f"igu-direction: attributions add up to {attributed / looks:.4g}, and the loss "
                f"changed by {change / looks:.4g}: the completeness gap is {gap:.0%}, above "
                f"{self._tolerance:.0%}. Raise segments, use estimator='grid', or raise "
                "micro_batches.",
                RuntimeWarning,
                stacklevel=2,
            )
        return known | {"attributed": attributed / looks, "loss_change": change / looks, "gap": gap}

    def state(self) -> dict[str, Tensor]:
        """Return smoothed attributions by ``mean/lam/TARGET``, and the counts."""
        counts = torch.tensor([float(self._passes), *self._since], dtype=torch.float64)
        return {"counts": counts} | {f"mean/lam/{n}": t for n, t in self._smoothed.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned."""
        passes, *since = state["counts"].tolist()
        self._passes, self._since = int(passes), since
        self._smoothed = {
            key.removeprefix("mean/lam/"): tensor.clone()
            for key, tensor in state.items()
            if key != "counts"
        }
