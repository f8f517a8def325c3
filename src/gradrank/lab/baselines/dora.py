"""DoRA: LoRA on directions, and a trained magnitude per output row, which costs parameters too."""

from dataclasses import dataclass
from typing import ClassVar

from gradrank.core.errors import BudgetError
from gradrank.core.plan import Plan
from gradrank.lab.baselines.arm import Built, Setting
from gradrank.lab.baselines.shared_peft import adapted, attach, used_ranks


@dataclass(frozen=True, slots=True)
class Dora:
    """Uniform DoRA: ``m · (W + s B A) / ‖W + s B A‖``, the norm of each output row.

    The magnitudes ``m`` are trained: an adapted target has ``r (d_in + d_out) + d_out``
    parameters, and the ranks are the largest uniform ones that fit with them. A target of rank 0
    has no magnitudes. At the start ``m = ‖W‖``, so that the function is the base model's. The
    norm is a constant for gradients, as the paper has it (section 4.3).

    **Source**: Liu et al., DoRA, arXiv 2402.09353, equations 5 and 11; ``use_dora`` of PEFT.
    """

    name: ClassVar[str] = "dora"
    summary: ClassVar[str] = "uniform DoRA: low-rank directions and a magnitude per output row"
    source: ClassVar[str] = "Liu et al., DoRA, ICML 2024 (arXiv 2402.09353); PEFT's use_dora"
    matched: ClassVar[bool] = True

    def build(self, setting: Setting) -> Built:
        """Return uniform DoRA whose magnitudes are within the budget too.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model.

        Raises:
            BudgetError: If not one target with its magnitudes fits.
        """
        plan = _largest(setting)
        if plan is None:
            smallest = min(target.cost + target.d_out for target in setting.targets)
            raise BudgetError(
                f"{setting.budget:,} parameters are not enough for 'dora': rank 1 on the cheapest "
                f"target takes {smallest:,}, its magnitudes included. Raise the budget."
            )
        vectors = sum(target.d_out for target in adapted(plan))
        note = (
            f"{vectors:,} of its {plan.parameters + vectors:,} parameters are magnitudes, so that "
            "its ranks are lower than those of uniform LoRA."
        )
        model = attach(setting, plan, use_dora=True)
        return Built(model, ranks=used_ranks(plan), notes=(note,))


def _largest(setting: Setting) -> Plan | None:
    """Return the largest uniform plan that fits with its magnitudes, by bisection."""
    best, low, high = None, 0, setting.budget
    while low < high:
        middle = (low + high + 1) // 2
        plan = _uniform(setting, middle)
        if plan is None:
            low = middle
            continue
        if plan.parameters + sum(target.d_out for target in adapted(plan)) <= setting.budget:
            best, low = plan, middle
        else:
            high = middle - 1
    return best


def _uniform(setting: Setting, parameters: int) -> Plan | None:
    """Return a uniform plan, or None where so few parameters buy no rank."""
    try:
        plan = setting.uniform(parameters)
    except BudgetError:
        return None
    return plan if adapted(plan) else None
