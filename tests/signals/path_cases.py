"""Models with trained adapters on a path, shared by the tests of path gradients."""

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from cases import CASES, Case, randomise_adapter
from gradrank.adapters.forms import attach_svd, set_active
from gradrank.adapters.view import lora_sites
from gradrank.signals.path import Branch
from oracles import igu as oracle

FORMS = ("plain", "svd", "fixed")
RANK = 3
D_IN, D_OUT = 5, 4


def with_adapter(
    base: nn.Module, form: str = "svd", conv: bool = False, scale: float = 0.3, **lora: Any
) -> Any:
    """A trained adapter of rank 3 (2 in use at a fixed shape) whose update is not small."""
    options: dict[str, Any] = {"target_modules": "all-linear", "lora_alpha": 2 * RANK} | lora
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, fan_in_fan_out=conv, **options)
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    randomise_adapter(model, scale)
    for site in lora_sites(model, "default").values():
        if form == "plain":
            continue
        attach_svd(site.layer, "default", init="keep", fixed=form == "fixed")
        with torch.no_grad():
            site.raw("lam").copy_(torch.linspace(1.5, -0.5, RANK))
        if form == "fixed":
            set_active(site.layer, "default", RANK - 1)
    return model.train()


def of_case(case: Case | str, form: str = "svd", double: bool = True, **lora: Any) -> Any:
    """A model of one architecture with a trained adapter, and its bare base beside it."""
    made = CASES[case] if isinstance(case, str) else case
    base = made.model().train()
    base = base.double() if double else base
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    bare = copy.deepcopy(base)
    return with_adapter(base, form, made.name == "gpt2", **lora), bare


def in_float64(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def branches(model: Any) -> list[Branch]:
    return [
        Branch(
            site.name,
            site.linear("A"),
            site.linear("B"),
            {factor: site.raw(factor) for factor in site.factors},
            site.rank,
        )
        for site in lora_sites(model, "default").values()
    ]


def scalings(model: Any) -> dict[str, float]:
    return {name: site.scaling for name, site in lora_sites(model, "default").items()}


def used(branch: Branch) -> dict[str, Tensor]:
    """The factors' components in use, in float64."""
    return {
        f: t.detach().narrow(1 if f == "B" else 0, 0, branch.rank).double()
        for f, t in branch.learned.items()
    }


def updates(model: Any) -> dict[str, Tensor]:
    scale = scalings(model)
    return {b.name: oracle.update_of(used(b), scale[b.name]) for b in branches(model)}


class Polynomial(nn.Module):
    """A linear layer whose output on the unit matrix shows the update, and a loss of it.

    Attributes:
        loss_of: The loss of the update.
    """

    def __init__(self, quartic: bool = True, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.map = nn.Linear(D_IN, D_OUT, bias=False).double()
        self.loss_of = oracle.random_loss(D_OUT, D_IN, seed, quartic)

    def forward(self, x: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
        base = self.map.base_layer.weight if hasattr(self.map, "base_layer") else self.map.weight
        update = self.map(x).T - base
        return {"loss": factor * self.loss_of(update), "update": update}


UNIT = torch.eye(D_IN, dtype=torch.float64)


def polynomial(form: str = "svd", quartic: bool = True, seed: int = 0) -> Any:
    return with_adapter(Polynomial(quartic, seed), form, target_modules=["map"], scale=0.6)
