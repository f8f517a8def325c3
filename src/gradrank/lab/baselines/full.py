"""Full fine-tuning: every weight is trained. A reference, not a competitor."""

from dataclasses import dataclass
from typing import ClassVar

from gradrank.adapters.precision import to_float32
from gradrank.core.errors import OptionError
from gradrank.lab.baselines.arm import Built, Setting, widened


@dataclass(frozen=True, slots=True)
class Full:
    """All parameters of the model, embeddings, norms and the task head included; in float32."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "full fine-tuning (not matched to the budget)"
    source: ClassVar[str] = "standard practice"
    matched: ClassVar[bool] = False

    def build(self, setting: Setting) -> Built:
        """Return the model with everything trainable.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model, without an adapter.

        Raises:
            OptionError: If some weights are quantized.
        """
        parameters = dict(setting.model.named_parameters())
        packed = [n for n, parameter in parameters.items() if not parameter.is_floating_point()]
        if packed:
            raise OptionError(
                f"'full' cannot train quantized weights ('{packed[0]}' and {len(packed) - 1} "
                "more). Load the model unquantized, or leave 'full' out."
            )
        setting.model.requires_grad_(True)
        count = sum(parameter.numel() for parameter in parameters.values())
        note = (
            f"It trains {count:,} parameters, where the budget is {setting.budget:,}: not matched."
        )
        return Built(setting.model, notes=(note, *widened(to_float32(setting.model))))
