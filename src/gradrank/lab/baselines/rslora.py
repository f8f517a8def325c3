"""Rank-stabilised LoRA: uniform ranks, and a scale that falls with the root of the rank."""

from dataclasses import dataclass
from typing import ClassVar

from gradrank.lab.baselines.arm import Built, Setting
from gradrank.lab.baselines.shared_peft import attach, used_ranks


@dataclass(frozen=True, slots=True)
class RsLora:
    """Uniform LoRA whose update is scaled by ``alpha / sqrt(r)``.

    The scale is the whole of this method, so it cannot be the one that all arms share. *Matched*
    means here that alpha is: plain LoRA of scale ``s`` at the reference rank ``R`` of the budget
    has ``alpha = s R``, and rsLoRA takes that alpha. Its scale is then ``s R / sqrt(r)``, and
    ``s sqrt(R)`` where ``r = R``; the two arms are one at rank 1.

    **Source**: Kalajdzievski, arXiv 2312.03732, theorem 3.2; ``use_rslora`` of PEFT.
    """

    name: ClassVar[str] = "rslora"
    summary: ClassVar[str] = "uniform LoRA with the scale alpha / sqrt(r) (rank-stabilised)"
    source: ClassVar[str] = "Kalajdzievski, rsLoRA, arXiv 2312.03732; PEFT's use_rslora"
    matched: ClassVar[bool] = True

    def build(self, setting: Setting) -> Built:
        """Return uniform LoRA with the scale of rsLoRA.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model.
        """
        plan = setting.uniform(setting.budget)
        reference = plan.reference_rank
        alpha = setting.scaling * reference
        model = attach(setting, plan, policy="rslora", lora_alpha=alpha)
        note = (
            f"Its scale is alpha / sqrt(r) with alpha = {alpha:g}, which plain LoRA has at rank "
            f"{reference}: {alpha / reference**0.5:g} there instead of {setting.scaling:g}."
        )
        return Built(model, ranks=used_ranks(plan), notes=(note,))
