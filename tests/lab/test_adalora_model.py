"""PEFT's AdaLoRA as the lab wraps it: the regulariser is in the loss, the scale is no parameter."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from baseline_cases import setting_of
from cases import CASES, batches
from gradrank.adapters.precision import train_in_float32
from gradrank.lab.adalora_model import TunerPeftModel
from gradrank.lab.arms import head_options
from gradrank.lab.baselines.arm import Built
from gradrank.lab.baselines.registry import create_baseline

HEADS = {"vit": "image", "bert": "classification", "llama": "lm", "gpt2": "lm"}


def built(case: str, orthogonality: float, *, typed: bool = True, **dtype: Any) -> Built:
    """The arm; ``typed``: with the options that the lab gives a task, else with none."""
    setting = setting_of(case)
    setting.model.to(**dtype)
    options = head_options(setting.model, HEADS[case]) if typed else {}
    torch.manual_seed(1)
    arm = create_baseline("peft-adalora", {"orthogonality": orthogonality, "interval": 2})
    return arm.build(setting_of(case, model=setting.model, peft_options=options))


def distance(model: Any) -> float:
    """Mean Frobenius norm of AᵀA - I over all factors, entry by entry, in float64."""
    norms = []
    for name, factor in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            rows = factor.detach().double()
            rows = rows if ".lora_A." in name else rows.T
            gram = [[float(one @ other) for other in rows] for one in rows]
            gaps = [
                (gram[i][j] - (i == j)) ** 2 for i in range(len(rows)) for j in range(len(rows))
            ]
            norms.append(sum(gaps) ** 0.5)
    return sum(norms) / len(norms)


@pytest.mark.parametrize("case", sorted(HEADS))
@pytest.mark.parametrize("typed", [True, False])
def test_the_loss_holds_the_regulariser_on_every_task(case, typed):
    without, half = built(case, 0.0, typed=typed).model, built(case, 0.5, typed=typed).model
    batch = batches(CASES[case], 1)[0]
    loss = half.eval()(**batch).loss
    gap = float((loss - without.eval()(**batch).loss).detach())
    assert gap == pytest.approx(0.5 * distance(half), rel=1e-4)
    assert gap > 0.1
    # It has a gradient, and nothing else of the output differs.
    loss.backward()
    moved = [p.grad for n, p in half.named_parameters() if ".lora_A." in n]
    assert any(bool((grad != 0).any()) for grad in moved)  # λ is 0: the task's own gradient is not
    assert torch.equal(without(**batch).logits, half(**batch).logits)


def test_a_forward_through_the_tuner_is_the_plain_one_in_all_else(tmp_path):
    model = built("vit", 0.5).model
    assert type(model) is TunerPeftModel
    assert type(built("bert", 0.5).model).__name__ == "PeftModelForSequenceClassification"
    batch = batches(CASES["vit"], 1)[0]
    pixels = {"pixel_values": batch["pixel_values"]}
    expected = model.eval()(**pixels).logits
    with model.disable_adapter():
        assert torch.allclose(model(**pixels).logits, expected)  # λ is 0
    assert torch.equal(copy.deepcopy(model)(**pixels).logits, expected)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divisor_of_the_scale_is_no_parameter(dtype):
    arm = built("llama", 0.5, dtype=dtype)
    model: Any = arm.model.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"lora_A", "lora_B", "lora_E"}
    first = divisors(model)
    assert set(first.values()) == {float(next(iter(arm.ranks.values())))}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches(CASES["llama"], 3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert divisors(model) == first


def divisors(model: Any) -> dict[str, float]:
    return {name: float(p) for name, p in model.named_parameters() if ".ranknum." in name}


def test_the_note_says_that_training_losses_are_not_those_of_others():
    assert any("regulariser" in note for note in built("bert", 0.5).notes)
    assert not any("regulariser" in note for note in built("bert", 0.0).notes)


def test_a_model_in_float32_is_not_touched():
    model = built("vit", 0.5).model
    before: dict[str, Tensor] = {name: p.clone() for name, p in model.named_parameters()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    train_in_float32(model)
    assert hooks == sum(len(module._forward_hooks) for module in model.modules()) == 0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
