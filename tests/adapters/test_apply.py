"""Building the PeftModel of a plan: exactly it, or nothing at all."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import gradrank as gr
from cases import CASES, Case, batches, hand_plan, tiny_gpt2, tiny_llama
from gradrank.adapters import apply as applying
from gradrank.adapters.apply import adapter_ranks, count_trainable


def shape_of(model: nn.Module) -> list[tuple[str, str, bool]]:
    """Modules and flags: what a refusal must leave as it was."""
    modules = [(name, type(module).__name__, True) for name, module in model.named_modules()]
    flags = [(name, str(tuple(p.shape)), p.requires_grad) for name, p in model.named_parameters()]
    return modules + flags


def test_a_plan_is_built_with_its_exact_parameters(case: Case) -> None:
    model = case.model()
    plan = hand_plan(model)
    wrapped = gr.apply(plan, model)
    assert adapter_ranks(wrapped) == {name: r for name, r in plan.ranks.items() if r}
    assert count_trainable(wrapped) == {"adapter": plan.parameters, "other": 0}
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trainable == plan.parameters


def test_a_fresh_adapter_changes_nothing_and_one_step_lowers_the_loss(case: Case) -> None:
    (batch,) = batches(case, 1)
    model = case.model().eval()
    with torch.no_grad():
        wanted = model(**batch).logits
    wrapped = gr.apply(hand_plan(model), model).eval()
    with torch.no_grad():
        assert torch.equal(wrapped(**batch).logits, wanted)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = wrapped(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_task_head_is_counted_apart() -> None:
    model = CASES["bert"].model()
    plan = hand_plan(model)
    wrapped = gr.apply(plan, model, task_type="SEQ_CLS", modules_to_save=["classifier"])
    assert count_trainable(wrapped) == {"adapter": plan.parameters, "other": 3 * 32 + 3}


def test_plans_are_replayed_from_their_file(tmp_path: Any) -> None:
    plan = hand_plan(tiny_llama())
    plan.save(tmp_path / "plan.json")
    again = gr.Plan.load(tmp_path / "plan.json")
    assert adapter_ranks(gr.apply(again, tiny_llama())) == adapter_ranks(
        gr.apply(plan, tiny_llama())
    )


def wider() -> nn.Module:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 64, bias=False)
    return model


def already_wrapped() -> nn.Module:
    return get_peft_model(tiny_llama(), LoraConfig(r=1, target_modules=["q_proj"]))


def with_injected_adapter() -> nn.Module:
    return already_wrapped().base_model.model


def without_linear() -> nn.Module:
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (tiny_gpt2, "no module 'model.layers.0.self_attn.q_proj'"),
        (lambda: tiny_llama(1), r"no module 'model.layers.1.self_attn.q_proj' \(\d+ of \d+"),
        (wider, "is 48 x 32 in the plan and 64 x 32 in the model"),
        (already_wrapped, "carries an adapter already"),
        (with_injected_adapter, "carries an adapter already"),
        (without_linear, "model.layers.0.mlp.up_proj"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_left_alone(make: Any, says: str) -> None:
    plan = hand_plan(tiny_llama(), lambda _: 2)
    model = make()
    before = shape_of(model)
    with pytest.raises(gr.PlanError, match=says):
        gr.apply(plan, model)
    assert shape_of(model) == before


@pytest.mark.parametrize(
    "options",
    [{"r": 3}, {"lora_droput": 0.5}, {"policy": "x"}, {"init_lora_weights": "nonsense"}],
)
def test_options_that_break_the_plan_leave_the_model_alone(options: dict[str, Any]) -> None:
    model = tiny_llama()
    plan = hand_plan(model, lambda _: 2)
    before = shape_of(model)
    with pytest.raises(ValueError):  # noqa: PT011 - ours are ValueErrors, and so are PEFT's
        gr.apply(plan, model, **options)
    assert shape_of(model) == before
    assert not hasattr(model, "peft_config")
    assert adapter_ranks(gr.apply(plan, model)) == plan.ranks


def test_other_ranks_than_planned_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    plan = hand_plan(model, lambda _: 2)
    other = LoraConfig(r=1, target_modules=["q_proj"])
    monkeypatch.setattr(applying, "stock_config", lambda *_, **__: other)
    before = shape_of(model)
    with pytest.raises(gr.PlanError, match="other ranks than the plan"):
        gr.apply(plan, model)
    assert shape_of(model) == before


def test_a_plan_without_any_rank_is_refused() -> None:
    model = tiny_llama()
    before = shape_of(model)
    with pytest.raises(gr.PlanError, match="rank 0 to every target"):
        gr.apply(hand_plan(model, lambda _: 0), model)
    assert shape_of(model) == before


def test_options_reach_the_configuration() -> None:
    wrapped = gr.apply(hand_plan(tiny_llama()), tiny_llama(), 8, policy="rslora", lora_dropout=0.25)
    config = wrapped.peft_config["default"]
    assert (config.lora_alpha, config.use_rslora, config.lora_dropout) == (8, True, 0.25)
