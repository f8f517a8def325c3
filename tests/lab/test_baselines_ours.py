"""MiLoRA: where it starts."""

import copy
from typing import Any

import pytest
import torch

import gradrank as gr
from cases import CASES
from gradrank.adapters.apply import count_trainable
from gradrank.adapters.view import lora_sites
from gradrank.lab.baselines.milora import Milora
from gradrank.lab.baselines.registry import create_baseline
from gradrank.lab.baselines.weights import base_weight
from lab.baselines_ours_cases import RANK, SCALING, logits, setting, train
from oracles.baselines_ours import minor_part, principal_part


def close(found: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.allclose(found.double(), want.double(), atol=2e-6, rtol=1e-4)


def update(site: Any) -> torch.Tensor:
    return (site.scaling * (site.raw("B") @ site.raw("A"))).detach()


@pytest.mark.parametrize("case", list(CASES))
def test_milora_starts_as_the_base_model_from_its_minor_components(case: str) -> None:
    given = setting(case)
    before = logits(given.model, case)
    old = {t.name: copy.deepcopy(given.model.get_submodule(t.name).weight) for t in given.targets}
    built = create_baseline("milora").build(given)
    assert torch.allclose(logits(built.model, case), before, atol=2e-5, rtol=1e-4)
    sites = lora_sites(built.model, "default")
    assert set(sites) == set(old)
    for name, site in sites.items():
        weight = old[name].detach().T if site.layer.fan_in_fan_out else old[name].detach()
        assert site.scaling == pytest.approx(SCALING)
        assert site.rank == RANK
        assert close(update(site), minor_part(weight, RANK))
        assert not close(update(site), principal_part(weight, RANK))
        # Taken out of what is frozen.
        rest = base_weight(site.layer, name, "milora")
        assert close(rest.detach() + update(site), weight)
        assert not rest.requires_grad
        # Both factors carry the same share.
        assert close(site.raw("A").norm(dim=1), site.raw("B").norm(dim=0))


def test_milora_spends_the_budget_and_learns() -> None:
    built = Milora().build(setting())
    assert count_trainable(built.model) == {"adapter": setting().budget, "other": 0}
    losses = train(built, repeat=True)
    assert losses[-1] < losses[0]


def test_milora_leaves_targets_without_rank_alone() -> None:
    given = setting()
    last = [t for t in given.targets if t.depth == 1]
    plan = gr.allocate(given.targets, gr.Subset(choose="last"), sum(t.cost for t in last))
    old = {t.name: given.model.get_submodule(t.name).weight.clone() for t in given.targets}
    built = Milora().build(setting(model=given.model, uniform=lambda _: plan))
    for target in given.targets:
        module = built.model.base_model.model.get_submodule(target.name)
        kept = torch.equal(getattr(module, "base_layer", module).weight, old[target.name])
        assert kept == (target.depth == 0)


def test_milora_at_full_rank_holds_the_whole_weight() -> None:
    given = setting(budget=setting().budget // RANK * 16)
    built = Milora().build(given)
    site = lora_sites(built.model, "default")["model.layers.0.self_attn.k_proj"]
    assert site.rank == 16
    assert base_weight(site.layer, site.name, "milora").abs().max() < 1e-5


def test_quantised_weights_are_refused() -> None:
    given = setting()
    built = Milora().build(given)
    site = next(iter(lora_sites(built.model, "default").values()))
    site.layer.get_base_layer().weight = torch.nn.Parameter(
        torch.zeros(32, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(gr.OptionError, match=r"'milora' needs.*int8.*quantised"):
        base_weight(site.layer, site.name, "milora")
