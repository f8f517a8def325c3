"""PiSSA: LoRA that starts from the principal singular directions of the base weight."""

from dataclasses import dataclass
from typing import ClassVar

from gradrank.lab.baselines.arm import Built, Setting
from gradrank.lab.baselines.shared_peft import attach, refuse, used_ranks
from gradrank.methods.method import option, require


@dataclass(frozen=True, slots=True)
class Pissa:
    """Uniform LoRA with ``s B A`` equal to the best rank-r approximation of the weight.

    ``A = sqrt(S_r / s) V_r^T`` and ``B = U_r sqrt(S_r / s)``; the base weight keeps the rest. The
    function at the start is the base model's, whatever the scale ``s`` is (the paper has 1).

    **Source**: Meng et al., PiSSA, arXiv 2404.02948, equations 2 to 4; ``init_lora_weights`` of
    PEFT.
    """

    niter: int = option(0, "subspace iterations of a fast approximate SVD; 0: the exact SVD")

    name: ClassVar[str] = "pissa"
    summary: ClassVar[str] = "uniform LoRA that starts from the weight's principal directions"
    source: ClassVar[str] = "Meng et al., PiSSA, NeurIPS 2024 (arXiv 2404.02948); PEFT's init"
    matched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.niter <= 100, self.name, "niter", self.niter, "in 0..100")

    def build(self, setting: Setting) -> Built:
        """Return uniform LoRA with the start of PiSSA.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model.
        """
        plan = setting.uniform(setting.budget)
        refuse(self.name, plan, {"quantized-linear": "its start is an SVD of full weights"})
        start = f"pissa_niter_{self.niter}" if self.niter else "pissa"
        model = attach(setting, plan, init_lora_weights=start)
        return Built(model, ranks=used_ranks(plan))
