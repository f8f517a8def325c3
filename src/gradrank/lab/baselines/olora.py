"""OLoRA: LoRA that starts from a QR decomposition of the base weight."""

from dataclasses import dataclass
from typing import ClassVar

from gradrank.lab.baselines.arm import Built, Setting
from gradrank.lab.baselines.shared_peft import attach, refuse, used_ranks

_REFUSED = {
    # PEFT 0.21 decomposes Conv1D's [d_in, d_out] as it stands: the factors are swapped, which a
    # square weight does not even notice.
    "conv1d": "PEFT's start does not transpose these weights, and would change the function",
    "quantized-linear": "its start is a decomposition of full weights",
}


@dataclass(frozen=True, slots=True)
class Olora:
    """Uniform LoRA with ``B = Q_r`` and ``A = R_r`` of ``W = Q R``; the base keeps ``W - s B A``.

    The columns of B are orthonormal at the start, and the function is the base model's.

    **Source**: Büyükakyüz, OLoRA, arXiv 2406.01775, section 3; ``init_lora_weights`` of PEFT.
    """

    name: ClassVar[str] = "olora"
    summary: ClassVar[str] = "uniform LoRA that starts from a QR decomposition of the weight"
    source: ClassVar[str] = "Büyükakyüz, OLoRA, arXiv 2406.01775; PEFT's init"
    matched: ClassVar[bool] = True

    def build(self, setting: Setting) -> Built:
        """Return uniform LoRA with the start of OLoRA.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model.
        """
        plan = setting.uniform(setting.budget)
        refuse(self.name, plan, _REFUSED)
        model = attach(setting, plan, init_lora_weights="olora")
        return Built(model, ranks=used_ranks(plan))
