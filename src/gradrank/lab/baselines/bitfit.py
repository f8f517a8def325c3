"""BitFit: only the biases are trained, and the task head."""

from dataclasses import dataclass
from typing import ClassVar

from gradrank.adapters.precision import to_float32
from gradrank.core.errors import OptionError
from gradrank.lab.baselines.arm import Built, Setting, frozen, widened


@dataclass(frozen=True, slots=True)
class BitFit:
    """All bias terms of the model: of its linear layers and of its norms, targets or not.

    How many there are is the model's affair, so the budget is not looked at.

    **Source**: Ben Zaken et al., BitFit, ACL 2022 (arXiv 2106.10199), section 3.
    """

    name: ClassVar[str] = "bitfit"
    summary: ClassVar[str] = "all biases and nothing else (not matched to the budget)"
    source: ClassVar[str] = "Ben Zaken et al., BitFit, ACL 2022 (arXiv 2106.10199)"
    matched: ClassVar[bool] = False

    def build(self, setting: Setting) -> Built:
        """Return the model with its biases and its head trainable.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model, without an adapter.

        Raises:
            OptionError: If the model has no bias besides its head's.
        """
        biases = [
            parameter
            for name, parameter in setting.model.named_parameters()
            if name.rpartition(".")[2] == "bias" and name.split(".")[0] not in setting.head
        ]
        if not biases:
            raise OptionError(
                f"'bitfit' trains biases, and a {type(setting.model).__name__} has none besides "
                "its head's. Leave 'bitfit' out for this model."
            )
        frozen(setting.model, setting.head)
        for parameter in biases:
            parameter.requires_grad_(True)
        count = sum(parameter.numel() for parameter in biases)
        note = (
            f"It trains {count:,} biases in {len(biases)} tensors, where the budget is "
            f"{setting.budget:,}: not matched."
        )
        # The whole model, since a layer cannot add a bias of another dtype than its weight's.
        return Built(setting.model, notes=(note, *widened(to_float32(setting.model))))
