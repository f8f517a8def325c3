"""4-bit and 8-bit bases of bitsandbytes, where it is installed."""

from typing import Any

import pytest
import torch
from torch import nn

import gradrank as gr
from cases import CASES, batches, tiny_llama

bnb = pytest.importorskip("bitsandbytes")


def quantise(model: nn.Module, bits: int) -> nn.Module:
    """Replace every linear layer of the blocks, as loading in 4 or 8 bits does."""
    for parent in list(model.model.layers.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear:
                continue
            options: dict[str, Any] = {"bias": False}
            if bits == 4:
                packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, **options)
                packed.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False)
            else:
                packed = bnb.nn.Linear8bitLt(
                    layer.in_features, layer.out_features, has_fp16_weights=False, **options
                )
                packed.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False)
            setattr(parent, name, packed.to("cpu"))
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_measured_planned_and_trained(bits: int) -> None:
    case = CASES["llama"]
    data = batches(case, 3)
    model = quantise(tiny_llama(), bits)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    found = gr.measure(model, data, ["spectrum", "mean-gradient"], num_batches=3)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {t.kind for t in found.targets} == {"quantized-linear"}
    full = gr.measure(tiny_llama(), data, num_batches=3)
    assert found.info["base_parameters"] == full.info["base_parameters"]
    assert not found.info["unreached"]
    name = "model.layers.1.mlp.down_proj"
    assert 0.5 < float(found.gram(name).trace() / full.gram(name).trace()) < 2
    plan = gr.allocate(found, "gard", "uniform:2")
    wrapped = gr.apply(plan, model)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = wrapped(**data[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
