"""Adapters with forms on the tiny models, shared by the tests of forms."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from cases import CASES, batches, randomise_adapter, tiny_llama
from gradrank.adapters import forms

RANK, ACTIVE = 6, 4
KINDS = ("mask", "svd", "keep", "partition")
BATCH = batches(CASES["llama"], 1)[0]


def build(model: nn.Module | None = None, scale: float = 0.1, **options: Any) -> nn.Module:
    """A PEFT model with random factors, B included."""
    options = {"target_modules": "all-linear"} | options
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, **options)
    wrapped = get_peft_model(model or tiny_llama(), config)
    return randomise_adapter(wrapped, scale).eval()


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def dominant_rows(layer: Any) -> Tensor:
    return torch.arange(layer.out_features) % 3 == 0


def attach(layer: Any, kind: str, adapter: str = "default") -> None:
    if kind == "mask":
        forms.attach_mask(layer, adapter, ACTIVE)
    elif kind == "svd":
        forms.attach_svd(layer, adapter)
    elif kind == "keep":
        forms.attach_svd(layer, adapter, "keep")
    else:
        rows = dominant_rows(layer)
        with torch.no_grad():
            layer.lora_B[adapter].weight[rows, ACTIVE:] = 0
            layer.lora_B[adapter].weight[~rows, :ACTIVE] = 0
        forms.attach_partition(layer, adapter, rows, ACTIVE, RANK - ACTIVE)


def formed(kind: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    built = build(model, **options)
    for layer in lora_layers(built):
        attach(layer, kind)
    return built


def in_step(model: nn.Module, kind: str) -> nn.Module:
    """Put PEFT's config in step with the baked rank at the same scale, as surgery does."""
    if kind == "mask":
        model.peft_config["default"].r = ACTIVE
        model.peft_config["default"].lora_alpha = 2 * ACTIVE
    return model


def logits(model: nn.Module, batch: dict[str, Tensor] = BATCH, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **options).logits


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).detach().abs().max()) if left.numel() else 0.0
