"""Models, data and options on which dynamic ranks really move, for tests of running training."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import gradrank as gr
from cases import CASES, batches

RANK = 4
STEPS = 8
# Decisions after steps 2, 4 and 6. Energy and learning rate are such that the effective ranks of
# so few batches lie apart on all tiny architectures.
OPTIONS: dict[str, Any] = {"energy": 0.6, "interval": 2, "window": 4, "beta": 0.5}


def adapted(case: str = "llama", rank: int = RANK, **lora: Any) -> Any:
    """A tiny model with a stock adapter, in training mode."""
    torch.manual_seed(0)
    options = {"target_modules": "all-linear", "lora_alpha": 2 * rank} | lora
    options |= {"fan_in_fan_out": True} if case == "gpt2" else {}
    config = LoraConfig(r=rank, **options)
    return get_peft_model(CASES[case].model(), config).train()


def data(case: str = "llama", count: int = STEPS) -> list[dict[str, Tensor]]:
    return batches(CASES[case], count)


def adamw(model: nn.Module, lr: float = 5e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def method(**options: Any) -> gr.DynamicGard:
    return gr.DynamicGard(**OPTIONS | options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
