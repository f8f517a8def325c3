"""LoRA-Dash: the launch, the directions, the parameters."""

from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

import gradrank as gr
from cases import CASES, batches
from gradrank.adapters.apply import count_trainable
from gradrank.lab.baselines.lora_dash import LoraDash, change_rates
from gradrank.lab.baselines.registry import create_baseline
from gradrank.lab.baselines.weights import base_weight, singular_parts
from lab.baselines_ours_cases import SCALING, STEPS, State, logits, setting, tell, train
from oracles.baselines_ours import (
    change_rates as slow_rates,
)
from oracles.baselines_ours import dashed_and_scaled, dashed_weight, plain_changes

OPTIONS: dict[str, Any] = {"directions": 2, "prelaunch": 3}


def made(case: str = "llama", **options: Any) -> Any:
    return LoraDash(**OPTIONS | options).build(setting(case))


@pytest.mark.parametrize("case", list(CASES))
def test_the_parameters_of_the_directions_are_in_the_budget(case: str) -> None:
    given = setting(case)
    built = LoraDash(**OPTIONS).build(given)
    counts = count_trainable(built.model)
    aside = 2 * len(given.targets)
    assert counts["other"] == 0
    assert counts["adapter"] <= given.budget
    plan = given.uniform(given.budget - aside)
    assert counts["adapter"] == plan.parameters + aside
    assert built.ranks == plan.ranks


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert"])
def test_directions_are_those_whose_change_rate_is_largest(case: str) -> None:
    built = made(case)
    train(built, case, steps=2)
    before = logits(built.model, case)
    built.capacity.launch()
    assert torch.equal(logits(built.model, case), before)  # Δσ is 0
    plainly = 0
    for site, dash in built.capacity.dashes.values():
        weight = base_weight(site.layer, site.name, "lora-dash").detach()
        update = (site.scaling * (site.raw("B") @ site.raw("A"))).detach()
        U, sigma, Vt = singular_parts(weight)
        A, B = site.raw("A").detach(), site.scaling * site.raw("B").detach()
        fast = change_rates(U, sigma, Vt, A, B, 1e-6)
        slow = slow_rates(weight, update, 1e-6)
        assert torch.allclose(fast.double(), torch.tensor(slow).double(), rtol=1e-3, atol=1e-5)
        best = sorted(range(len(slow)), key=slow.__getitem__, reverse=True)[:2]
        # Two rates that agree to rounding may be in either order.
        assert [slow[i] for i in dash.chosen] == pytest.approx([slow[i] for i in best], rel=1e-3)
        plain = plain_changes(weight, update, 1e-6)
        plainly += {int(i) for i in dash.chosen} != {
            i for i in range(len(plain)) if plain[i] in sorted(plain)[-2:]
        }
    assert plainly, "the division by the singular values never mattered"


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_the_forward_pass_is_that_of_the_three_sums(case: str) -> None:
    built = made(case)
    train(built, case)
    for site, dash in built.capacity.dashes.values():
        assert dash.delta_sigma.detach().abs().min() > 0
        weight = base_weight(site.layer, site.name, "lora-dash").detach()
        given = (weight, site.raw("A"), site.raw("B"), SCALING, dash.chosen.tolist())
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
        bias = site.layer.get_base_layer().bias
        with torch.no_grad():
            found = site.layer(x) - (0 if bias is None else bias)
            want = x.double() @ dashed_weight(*given, dash.delta_sigma).T
            wrong = x.double() @ dashed_and_scaled(*given, dash.delta_sigma).T
        assert torch.allclose(found.double(), want, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found.double(), wrong, atol=1e-5, rtol=1e-4)


def test_before_the_launch_it_is_plain_lora() -> None:
    built, plain = made(), setting()
    aside = 2 * len(plain.targets)
    torch.manual_seed(3)
    twin = gr.apply(plain.uniform(plain.budget - aside), plain.model, scaling=SCALING)
    copied = {n: p for n, p in built.model.state_dict().items() if ".lora_dash" not in n}
    twin.load_state_dict(copied, strict=True)
    alike = type(built)(twin)
    assert train(built, steps=3) == train(alike, steps=3)
    for _, dash in built.capacity.dashes.values():
        assert not dash.delta_sigma.any()
        assert dash.launched
    assert train(built, steps=4)[1:] != train(alike, steps=4)[1:]


def test_disabled_adapters_have_no_directions_either() -> None:
    built = made()
    base = logits(CASES["llama"].model())
    train(built)
    with built.model.disable_adapter():
        assert torch.allclose(logits(built.model), base, atol=1e-6)
    assert not torch.allclose(logits(built.model), base, atol=1e-3)


def test_a_saved_adapter_brings_its_directions_back() -> None:
    built = made()
    train(built)
    saved = {k: v.clone() for k, v in get_peft_model_state_dict(built.model).items()}
    again = made()
    set_peft_model_state_dict(again.model, saved)
    state = State()
    state.global_step = STEPS
    tell(again.capacity, "on_train_begin", state)
    assert torch.equal(logits(again.model), logits(built.model))


def test_gradients_reach_the_directions_after_the_launch_only() -> None:
    built = made()
    data = batches(CASES["llama"], 1)[0]
    built.model(**data).loss.backward()
    dashes = [dash for _, dash in built.capacity.dashes.values()]
    assert all(dash.delta_sigma.grad is None for dash in dashes)
    built.capacity.launch()
    built.model(**data).loss.backward()
    assert all(dash.delta_sigma.grad.any() for dash in dashes)
    assert all(not dash.left.requires_grad for dash in dashes)


def test_budgets_without_room_name_the_floor() -> None:
    given = setting()
    floor = sum(target.cost + 8 for target in given.targets)
    with pytest.raises(gr.BudgetError, match=f"floor of {floor:,} .*lower directions"):
        LoraDash().build(setting(budget=floor - 1))
    built = LoraDash().build(setting(budget=floor))
    assert set(built.ranks.values()) == {1}


def test_a_run_that_ends_before_the_launch_is_refused() -> None:
    with pytest.raises(gr.OptionError, match=r"'prelaunch'.*is 12, and the run has 12 steps"):
        LoraDash(prelaunch=STEPS).build(setting())


def test_the_launch_is_the_papers_where_the_run_is_long_enough() -> None:
    def launch(steps: int) -> tuple[int, tuple[str, ...]]:
        built = LoraDash().build(setting(steps=steps))
        return built.capacity.step, built.notes

    assert launch(5000) == (100, ())
    assert launch(200) == (20, ("directions are chosen after step 20",))
    assert launch(5)[0] == 1


def test_options_are_checked() -> None:
    for wrong in ({"directions": 0}, {"prelaunch": 0}, {"epsilon": 0}, {"epsilon": float("nan")}):
        with pytest.raises(gr.OptionError, match=f"'{next(iter(wrong))}'.*'lora-dash'"):
            create_baseline("lora-dash", wrong)
