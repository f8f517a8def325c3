"""IGU-LoRA: prune directions by integrated gradients and their signal-to-noise ratio."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradrank.core.targets import Target
from gradrank.methods.importance import ElementImportance
from gradrank.methods.method import option, require
from gradrank.methods.pruning import PruningCourse, PruningOptions
from gradrank.ops.uncertainty import COMBINATIONS
from gradrank.signals.sensitivity import ENDPOINTS, RULES, PathGradient, RandomScale, Sensitivity

_AS_CODE = "as-code"
_SEGMENTS = 20
# A score's deviation is to measure the data and not the path: a score then averages as many looks
# as there are segments, each of which is visited once (docs/studies/igu-quadrature.md).
_TOGETHER = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Igu(PruningOptions):
    r"""IGU-LoRA: prune the directions whose integrated gradients are least certain to matter.

    The importance of an element is :math:`|w \int_0^1 g(\alpha) d\alpha|` along the path from the
    pre-trained model to the trained one, smoothed over time and divided by its own deviation. Four
    estimators: ``grid`` (the trapezoid rule, N + 1 gradients), ``stochastic`` (the paper's: both
    ends and one interior point, with the weights as printed), ``unbiased`` (ours: the trapezoid
    rule in expectation) and ``as-code`` (what the published code does instead).

    Source:
        IGU-LoRA, equations 3 to 11; ``as-code``: its published code. Differs: the magnitude of
        the path integral is taken (``signed`` gives the formula as printed); the budget counts
        parameters; directions are taken out for good.
    """

    name: ClassVar[str] = "igu"
    summary: ClassVar[str] = "IGU-LoRA: prune directions by integrated gradients over their noise"
    source: ClassVar[str] = "IGU-LoRA, equations 3 to 11"

    estimator: str = option("unbiased", "'grid', 'stochastic', 'unbiased' or 'as-code'")
    segments: int | None = option(
        None, "segments N of the path; none: 20, and 8 where a single point is drawn"
    )
    score_every: int | None = option(None, "steps between looks; none: 10, as-code: 1")
    aggregate: int | None = option(
        None, "looks M that one score averages; none: 1, and 8 where a single point is drawn"
    )
    micro_batches: int = option(1, "micro-batches of a step that are looked at, the last ones")
    rows: float = option(1.0, "share of a micro-batch's rows that passes look at, in (0, 1]")
    endpoints: str = option("drawn", "of 'unbiased': 0 and 1 are 'drawn' too, or 'always' taken")
    beta1: float = option(0.85, "smoothing of scores, in [0, 1)")
    beta2: float = option(0.85, "smoothing of their deviation, in [0, 1)")
    combine: str = option("ratio", "'ratio' (mean over deviation) or 'product' (AdaLoRA's)")
    signed: bool = option(False, "keep the sign of path integrals, as the formula is printed")
    eps: float = option(1e-12, "what keeps the ratio finite; as-code: 1e-6, in both terms")

    def __post_init__(self) -> None:
        self.check_pruning()
        code = self.estimator == _AS_CODE
        known = (*RULES, _AS_CODE)
        rules = {
            "estimator": (self.estimator in known, f"one of {', '.join(known)}"),
            "segments": (
                self.segments is None
                or self.segments >= (2 if self.estimator in {"stochastic", "unbiased"} else 1),
                "1 or more, and 2 or more where an interior point is drawn, or none",
            ),
            "score_every": (
                self.score_every is None
                or (self.score_every >= 1 and not (code and self.score_every > 1)),
                "1 or more (as-code: 1, it looks at every step), or none",
            ),
            "aggregate": (self.aggregate is None or self.aggregate >= 1, "1 or more, or none"),
            "micro_batches": (self.micro_batches >= 1, "1 or more"),
            "rows": (0 < self.rows <= 1, "in (0, 1]"),
            "endpoints": (self.endpoints in ENDPOINTS, " or ".join(map(repr, ENDPOINTS))),
            "beta1": (0 <= self.beta1 < 1, "in [0, 1)"),
            "beta2": (0 <= self.beta2 < 1, "in [0, 1)"),
            "combine": (self.combine in COMBINATIONS, " or ".join(map(repr, COMBINATIONS))),
            "eps": (0 < self.eps < 1, "in (0, 1)"),
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
        code = self.estimator == _AS_CODE
        every = self.score_every or (1 if code else 10)
        importance = ElementImportance(
            self.beta1,
            self.beta2,
            self.combine,
            1e-6 if code else self.eps,
            in_both=code,
            # Beside products of sensitivities, |lambda| would decide alone.
            lam_by_size=not code and self.combine == "ratio",
            aggregate=self.aggregate or (_TOGETHER if self._draws_one else 1),
            signed=self.signed,
        )
        signal = self._signal()
        course = PruningCourse(self, importance, signal, targets, budget, total_steps, every)
        course.whole_penalty = course.whole_penalty and not code
        return course

    @property
    def _draws_one(self) -> bool:
        """Whether a look takes the gradient at a single point of the whole grid."""
        return self.estimator == "unbiased" and self.endpoints == "drawn"

    def _signal(self) -> Sensitivity:
        segments = self.segments or (_TOGETHER if self._draws_one else _SEGMENTS)
        if self.estimator == _AS_CODE:
            return RandomScale(segments)
        return PathGradient(
            self.estimator, segments, self.endpoints, self.micro_batches, rows=self.rows
        )
