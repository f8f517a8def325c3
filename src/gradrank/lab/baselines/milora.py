"""MiLoRA: LoRA that starts from the minor singular components of the weight it adapts."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradrank.adapters.site import LoraSite
from gradrank.adapters.view import lora_sites
from gradrank.lab.baselines.arm import Built, Setting
from gradrank.lab.baselines.shared_peft import attach
from gradrank.lab.baselines.weights import base_weight, singular_parts

_NOTE = "the frozen weights lack the components that the adapter starts from"


@dataclass(frozen=True, slots=True)
class Milora:
    """Uniform LoRA whose factors start as the r smallest singular components of the weight.

    They are taken out of the frozen weight, so that the function at the start is the base
    model's up to rounding. The scale that all arms share is divided out of the factors.
    """

    name: ClassVar[str] = "milora"
    summary: ClassVar[str] = "uniform LoRA started from the minor singular components"
    source: ClassVar[str] = "Wang et al., MiLoRA, NAACL 2025, section 3; code: gradrank"
    matched: ClassVar[bool] = True

    def build(self, setting: Setting) -> Built:
        """Return the model to train.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model; targets without a rank keep their whole weight.
        """
        plan = setting.uniform(setting.budget)
        model = attach(setting, plan)
        for site in lora_sites(model, "default").values():
            start_from_minor(site)
        return Built(model, ranks=plan.ranks, notes=(_NOTE,))


@torch.no_grad()
def start_from_minor(site: LoraSite) -> None:
    r"""Move the r smallest singular components of a weight into its adapter.

    With ``W = U diag(σ) Vᵀ`` and the last r components m: ``B = U_m diag(σ_m / s)^{1/2}``,
    ``A = diag(σ_m / s)^{1/2} V_mᵀ``, ``W ← W - s B A``.

    Args:
        site: A plain LoRA layer with the scale s.

    Source:
        MiLoRA, arXiv 2406.09044, section 3 (with s = 1).
    """
    weight = base_weight(site.layer, site.name, Milora.name)
    U, sigma, Vt = singular_parts(weight)
    minor = slice(sigma.numel() - site.rank, None)
    root = (sigma[minor] / site.scaling).sqrt()
    A, B = site.raw("A"), site.raw("B")
    A.copy_(root[:, None] * Vt[minor])
    B.copy_(U[:, minor] * root)
    # Of the factors as they are stored, so that their rounding does not change the function.
    update = site.scaling * (B.float() @ A.float())
    weight.copy_(weight.float() - update)
