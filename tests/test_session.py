"""Measure, allocate, plan, apply, as users call them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import gradrank as gr
from cases import CASES, batches, tiny_gpt2, tiny_llama
from gradrank.signals.facts import find_targets, model_facts
from gradrank.signals.layers import base_parameters

LLAMA = CASES["llama"]
DATA = batches(LLAMA, 4)


def test_two_lines_in_a_script_that_works_today() -> None:
    model = LLAMA.model()
    plan = gr.plan(model, DATA, method="gard", budget="uniform:8", num_batches=4)
    wrapped = get_peft_model(model, plan.lora_config(lora_alpha=16))
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trainable == plan.parameters <= plan.budget_parameters
    assert plan.reliability is not None
    assert plan.reliability["recommendation"] in {"use uniform", "as planned"}


def test_steps_and_the_short_cut_agree(tmp_path: Path) -> None:
    model = LLAMA.model()
    for method in ("gard", "waterfill", "gradient-norm", "uniform"):
        short = gr.plan(model, DATA, method, "uniform:2", num_batches=4)
        signals = gr.METHODS[method]().signals()
        if not signals:
            assert short.ranks == gr.allocate(find_targets(model), method, "uniform:2").ranks
            continue
        measurement = gr.measure(model, DATA, signals, num_batches=4)
        assert gr.allocate(measurement, method, "uniform:2").ranks == short.ranks
        measurement.save(tmp_path / method)
        loaded = gr.Measurement.load(tmp_path / method)
        again = gr.allocate(loaded, method, "uniform:2")
        assert again.ranks == short.ranks
        assert again.scores == pytest.approx(short.scores)


def test_a_plan_says_where_it_comes_from() -> None:
    model = LLAMA.model()
    plan = gr.plan(
        model, DATA, gr.Gard(energy=0.8), "1%", targets="q_proj,v_proj", num_batches=2,
        accumulate=2, seed=7,
    )  # fmt: skip
    assert plan.method == "gard"
    assert plan.options["energy"] == 0.8
    assert set(plan.options) == {
        "energy", "r_min", "r_max", "estimator", "sketch_dim", "centring", "fractional",
        "spend_leftover",
    }  # fmt: skip
    known = {
        "gradrank": gr.__version__,
        "model": "LlamaForCausalLM",
        "seed": 7,
        "batches": 2,
        "accumulate": 2,
        "processes": 1,
        "examples": 12,
        "tokens": 84,
        "base_parameters": base_parameters(model),
        "unreached": [],
        "estimator": "sketch",
    }
    assert {key: plan.provenance[key] for key in known} == known
    assert plan.provenance["seconds"] > 0
    assert plan.budget_parameters == base_parameters(model) // 100
    assert {p.target.module_type for p in plan.targets} == {"q_proj", "v_proj"}


def test_methods_that_look_at_no_data_need_none() -> None:
    def never() -> Any:
        raise AssertionError("the data was read")
        yield

    plan = gr.plan(LLAMA.model(), never(), "uniform", "uniform:2")
    assert plan.reliability is None
    assert plan.provenance["batches"] == 0


def test_progress_is_told_after_every_mini_batch() -> None:
    told: list[tuple[int, int]] = []
    gr.measure(LLAMA.model(), DATA, num_batches=4, progress=lambda *x: told.append(x))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    gr.measure(
        LLAMA.model(), DATA, gr.Spectrum("dense", max_bytes=1), "q_proj", num_batches=2,
        progress=lambda *x: told.append(x),
    )  # fmt: skip
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_options_come_by_name_or_with_the_object() -> None:
    targets = find_targets(LLAMA.model())
    by_name = gr.allocate(targets, "random", "uniform:2", options={"seed": "3"})
    by_object = gr.allocate(targets, gr.RandomScores(seed=3), "uniform:2")
    assert by_name.ranks == by_object.ranks
    with pytest.raises(gr.OptionError, match="belong to the method object"):
        gr.allocate(targets, gr.RandomScores(), options={"seed": 3})
    with pytest.raises(gr.OptionError, match=r"'unifrom' is unknown. Did you mean 'uniform'"):
        gr.allocate(targets, "unifrom")


def test_budgets_in_all_three_units() -> None:
    model = LLAMA.model()
    targets = find_targets(model)
    one = sum(target.cost for target in targets)
    for budget, wanted in ((2 * one, 2 * one), ("uniform:2", 2 * one), (f"{2 * one}", 2 * one)):
        assert gr.allocate(targets, "uniform", budget).budget_parameters == wanted
    plan = gr.plan(model, [], "uniform", "5%")
    assert plan.budget_parameters == int(0.05 * base_parameters(model))
    with pytest.raises(gr.BudgetError, match="not known"):
        gr.allocate(targets, "uniform", "5%")


def test_a_bad_budget_is_refused_before_anything_is_measured() -> None:
    def never() -> Any:
        raise AssertionError("the data was read")
        yield

    with pytest.raises(gr.BudgetError):
        gr.plan(LLAMA.model(), never(), "gard", "a lot")
    with pytest.raises(gr.OptionError):
        gr.plan(LLAMA.model(), never(), "gard", options={"energie": 1})


def test_parameters_of_the_base_count_ties_once_and_adapters_never() -> None:
    model = tiny_gpt2()
    unique = sum(p.numel() for p in set(model.parameters()))
    assert base_parameters(model) == unique
    wrapped = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert base_parameters(wrapped) == base_parameters(tiny_llama())
    head = get_peft_model(
        CASES["bert"].model(),
        LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"]),
    )
    assert base_parameters(head) == base_parameters(CASES["bert"].model())


def test_facts_about_a_model_that_was_not_measured() -> None:
    facts = model_facts(LLAMA.model())
    assert facts["model"] == "LlamaForCausalLM"
    assert facts["model_name"] is None
    assert facts["ambiguous_suffixes"] is False


def test_a_custom_model_with_its_own_loss_goes_all_the_way() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    torch.manual_seed(0)
    data = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(6)]
    model = Net()
    plan = gr.plan(model, data, "waterfill", "uniform:2", num_batches=6, loss_function=loss)
    wrapped = gr.apply(plan, model)
    loss(wrapped, data[0]).backward()
    grads = [p.grad for n, p in wrapped.named_parameters() if ".lora_B." in n]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_a_peft_model_is_planned_by_its_base_names() -> None:
    wrapped = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    plan = gr.plan(wrapped, DATA, "gard", "uniform:2", num_batches=4)
    assert list(plan.ranks) == [t.name for t in find_targets(tiny_llama())]
    with pytest.raises(gr.PlanError, match="carries an adapter"):
        gr.apply(plan, wrapped)
    gr.apply(plan, tiny_llama())
