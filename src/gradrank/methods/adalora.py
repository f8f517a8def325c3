"""AdaLoRA's rule on gradrank's engine: sensitivity times uncertainty, pruned for real."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradrank.core.targets import Target
from gradrank.methods.importance import ElementImportance
from gradrank.methods.method import option, require
from gradrank.methods.pruning import PruningCourse, PruningOptions
from gradrank.signals.sensitivity import TrainingGradient


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaLora(PruningOptions):
    r"""AdaLoRA: prune the directions whose sensitivity, times its uncertainty, is lowest.

    Sensitivity is :math:`|w \cdot \partial L / \partial w|` with the gradient of training itself,
    as the optimizer is about to use it, so that it costs no pass of its own and needs no call in a
    training loop.

    Source:
        AdaLoRA, arXiv 2303.10512, sections 3.1 to 3.3. Differs: the budget counts parameters and
        not ranks; directions are taken out for good; the task's gradient alone is looked at, not
        that of the orthogonality penalty.
    """

    name: ClassVar[str] = "adalora"
    summary: ClassVar[str] = "AdaLoRA: prune directions by sensitivity x uncertainty"
    source: ClassVar[str] = "AdaLoRA, arXiv 2303.10512, sections 3.1 to 3.3"

    beta1: float = option(0.85, "smoothing of sensitivity, in [0, 1)")
    beta2: float = option(0.85, "smoothing of its uncertainty, in [0, 1)")

    def __post_init__(self) -> None:
        self.check_pruning()
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, self.name, name, value, "in [0, 1)")

    def course(self, targets: Sequence[Target], budget: int, total_steps: int) -> PruningCourse:
        """Return the course of one run.

        Args:
            targets: The targets.
            budget: Parameters in the end.
            total_steps: Optimizer steps of the run.

        Returns:
            The course, before its first decision.
        """
        importance = ElementImportance(self.beta1, self.beta2, "product", 0.0)
        return PruningCourse(
            self, importance, TrainingGradient(), targets, budget, total_steps, score_every=1
        )
