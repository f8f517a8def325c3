"""LoRA-GA: LoRA that starts from the singular directions of the loss's gradient."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor

from gradrank.core.errors import BudgetError, MeasurementError, nearest
from gradrank.core.plan import Plan
from gradrank.lab.baselines.arm import Built, Setting
from gradrank.lab.baselines.shared_peft import (
    adapted,
    attach,
    lora_layers,
    refuse,
    start_from,
    used_ranks,
)
from gradrank.methods.method import option, require

FACTORS = ("authors", "peft")
_FIELD = "_peft_loraga_grad"


@dataclass(frozen=True, slots=True)
class LoraGa:
    """Uniform LoRA whose first factors are singular vectors of the mean gradient ``G = U S V^T``.

    With ``ArB2r``, ``A = z V_{1..r}^T`` and ``B = z U_{r+1..2r}``, where ``z = d_out^(1/4) /
    gamma^(1/2)``; the base weight gives ``s B A`` up, so that the function at the start is the base
    model's. The scale ``s`` is the setting's: the paper has ``alpha / sqrt(r)``, which here would
    compare scale and not the start.

    PEFT 0.21 measures the gradient, but its own start is another one: its B also has the singular
    values of the gradient in it (1e-2 and less, so that B begins near 0), its A is not scaled, and
    on Conv1D it takes d_in for d_out. ``factors="peft"`` gives that one.

    **Source**: Wang et al., LoRA-GA, arXiv 2407.05000, theorems 3.1 and 3.2 and algorithm 1; the
    authors' code for the form of the factors, PEFT's ``preprocess_loraga`` for the gradient.
    """

    batches: int = option(8, "calibration batches whose mean gradient is taken")
    gamma: int = option(16, "gamma of the stable scale; larger starts smaller")
    factors: str = option("authors", "whose first factors: authors or peft")

    name: ClassVar[str] = "lora-ga"
    summary: ClassVar[str] = "uniform LoRA that starts from the gradient's singular directions"
    source: ClassVar[str] = "Wang et al., LoRA-GA, NeurIPS 2024 (arXiv 2407.05000); PEFT's gradient"
    matched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.batches >= 1, self.name, "batches", self.batches, "1 or more")
        require(self.gamma >= 1, self.name, "gamma", self.gamma, "1 or more")
        known = self.factors in FACTORS
        require(known, self.name, "factors", self.factors, nearest(self.factors, FACTORS))

    def build(self, setting: Setting) -> Built:
        """Return uniform LoRA with the start of LoRA-GA.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model.
        """
        plan = setting.uniform(setting.budget)
        refuse(self.name, plan, {"quantized-linear": "it needs gradients of full weights"})
        _check_ranks(plan)
        start: dict[str, Any] = {
            "init_lora_weights": "lora_ga",
            "lora_ga_config": LoraGAConfig(stable_gamma=self.gamma),
        }
        measured = self._measure(setting, plan, start)
        if self.factors == "peft":
            model = attach(setting, plan, **start)
            note = "Its start is PEFT's: B with the gradient's singular values, A unscaled."
        else:
            for name in measured:
                delattr(setting.model.get_submodule(name), _FIELD)
            model = attach(setting, plan)
            for name, layer in lora_layers(model).items():
                start_from(layer, *first_factors(measured[name], plan.ranks[name], self.gamma))
            note = "Its start is the authors': both factors are orthogonal and scaled alike."
        return Built(model, ranks=used_ranks(plan), notes=(note,))

    def _measure(self, setting: Setting, plan: Plan, start: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return mean gradients, ``[d_out, d_in]`` by target; PEFT leaves its own in the modules.

        Raises:
            MeasurementError: If a target has none, or one that is not finite.
        """
        config: LoraConfig = plan.lora_config(scaling=setting.scaling, **start)

        def train_step() -> None:
            for batch in setting.batches(self.batches):
                setting.model(**batch).loss.backward()

        with setting.warmed(), warnings.catch_warnings():
            # PEFT counts backward passes with hooks on modules whose inputs, behind frozen
            # embeddings, need no gradient; torch remarks on each.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            preprocess_loraga(setting.model, config, train_step)
        measured = {}
        for target in adapted(plan):
            module = setting.model.get_submodule(target.name)
            gradient = getattr(module, _FIELD, None)
            if gradient is None or not bool(gradient.isfinite().all()):
                raise MeasurementError(
                    f"'{target.name}' has {'no' if gradient is None else 'an infinite'} gradient "
                    f"in {self.batches} batches, and 'lora-ga' starts from gradients. Leave out "
                    "targets that take no part in the loss, and check the loss."
                )
            measured[target.name] = gradient.T if target.kind == "conv1d" else gradient
        return measured


def first_factors(gradient: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Return the first factors of LoRA-GA.

    Args:
        gradient: Mean gradient of a weight, shape ``[d_out, d_in]``.
        rank: The rank r; ``2 r`` directions are taken.
        gamma: Gamma of the stable scale.

    Returns:
        A ``[r, d_in]`` and B ``[d_out, r]``.

    Source:
        LoRA-GA, arXiv 2407.05000, theorem 3.1 (directions) and 3.2 (scale).
    """
    size = min(4 * rank, *gradient.shape)
    left, _, right = torch.svd_lowrank(gradient.float(), q=size, niter=4)
    scale = gradient.shape[0] ** 0.25 / gamma**0.5
    return scale * right[:, :rank].T, scale * left[:, rank : 2 * rank]


def _check_ranks(plan: Plan) -> None:
    """Refuse ranks that take more directions than a gradient has; PEFT would build other shapes.

    Raises:
        BudgetError: If there is such a rank.
    """
    for planned in plan.targets:
        if 2 * planned.rank > planned.target.max_rank:
            raise BudgetError(
                f"'lora-ga' takes 2 r directions, {2 * planned.rank} on '{planned.target.name}', "
                f"whose gradient has {planned.target.max_rank}. Lower the budget, or leave "
                "'lora-ga' out."
            )
