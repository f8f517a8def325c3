"""Forms under merging, autocast, gradient checkpointing, torch.compile and quantised bases."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from adapters.forms_cases import (
    BATCH,
    KINDS,
    attach,
    build,
    distance,
    formed,
    logits,
    lora_layers,
    trainable,
)
from cases import tiny_llama
from gradrank.adapters import forms
from gradrank.ops.four_bit import keep_quantised_layout

KIND = pytest.mark.parametrize("kind", KINDS)


def gradients(model: nn.Module, caller: Any = None) -> list[torch.Tensor]:
    model.zero_grad()
    (model if caller is None else caller)(**BATCH).loss.backward()
    return [p.grad.clone() for p in trainable(model).values()]


def farthest(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(distance(a, b) for a, b in zip(left, right, strict=True))


@KIND
def test_merging_and_unmerging(kind: str) -> None:
    model = formed(kind)
    before = logits(model)
    for layer in lora_layers(model):
        a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        assert torch.equal(layer.get_delta_weight("default"), b @ a * layer.scaling["default"])
    assert distance(logits(copy.deepcopy(model).merge_and_unload()), before) < 1e-6
    model.merge_adapter(safe_merge=True)
    assert distance(logits(model), before) < 1e-6
    model.unmerge_adapter()
    assert distance(logits(model), before) < 1e-6


@KIND
def test_training_lowers_the_loss(kind: str) -> None:
    model = formed(kind).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@KIND
def test_autocast_matches_the_plain_twin(kind: str) -> None:
    model = formed(kind)
    twin = copy.deepcopy(model)
    for layer in lora_layers(twin):
        forms.detach(layer, "default")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model), logits(twin))
        loss = model(**BATCH).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in trainable(model).values())


@KIND
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, reentrant: bool) -> None:
    model = formed(kind).train()
    model.enable_input_require_grads()
    wanted = gradients(model)
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    base.config.use_cache = False
    assert farthest(gradients(model), wanted) < 1e-6


class Chain(nn.Module):
    """One linear layer per form, so that one compilation sees them all."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(16, 16) for _ in KINDS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def needs_inductor() -> None:
    """Skip where torch itself cannot compile: no compiler, or no way to find its own headers."""
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    try:
        # Nothing of ours: what fails here fails in torch's own set-up.
        torch.compile(lambda x: x.sin() + 1, backend="inductor")(torch.ones(3))
    except Exception as error:
        pytest.skip(f"torch cannot compile with inductor here: {str(error)[:200]}")


# Torch's own set-up for inductor warns of what the machine has; ours is the agreement alone.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_models_agree_and_are_not_compiled_again(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "inductor":
        # A cache that other runs have filled takes other paths through torch.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        needs_inductor()
    torch._dynamo.reset()
    model = build(Chain(), target_modules=[f"stages.{i}" for i in range(len(KINDS))])
    for layer, kind in zip(lora_layers(model), KINDS, strict=True):
        attach(layer, kind)
    counter = CompileCounterWithBackend(backend)
    compiled: Any = torch.compile(model, backend=counter)
    x = torch.randn(5, 16)

    def run(caller: Any) -> list[torch.Tensor]:
        model.zero_grad()
        out = caller(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in trainable(model).values())]

    first = run(model)
    torch.testing.assert_close(run(compiled), first, rtol=1e-5, atol=1e-6)
    graphs = counter.frame_count
    assert graphs >= 1
    forms.set_active(lora_layers(model)[0], "default", 2)
    second = run(model)
    assert distance(first[0], second[0]) > 1e-4
    torch.testing.assert_close(run(compiled), second, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == graphs


def test_a_compiled_language_model_agrees() -> None:
    torch._dynamo.reset()
    model = build(tiny_llama(layers=1)).train()
    for index, layer in enumerate(lora_layers(model)):
        attach(layer, KINDS[index % len(KINDS)])
    wanted, before = gradients(model), logits(model)
    compiled: Any = torch.compile(model, backend="aot_eager")
    assert farthest(gradients(model, compiled), wanted) < 1e-6
    assert distance(logits(compiled), before) < 1e-6


@KIND
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_behave_as_with_plain_weights(kind: str, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    from signals.test_bitsandbytes import quantise

    def base() -> nn.Module:
        model = quantise(tiny_llama(), bits)
        setattr(model, f"is_loaded_in_{bits}bit", True)
        keep_quantised_layout(model)
        return model

    model = formed(kind, base(), target_modules=["q_proj", "down_proj"])
    assert {type(layer).__name__ for layer in lora_layers(model)} <= {"Linear4bit", "Linear8bitLt"}
    losses = []
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.5)
    for _ in range(3):
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    plain = copy.deepcopy(model)
    for layer in lora_layers(plain):
        forms.detach(layer, "default")
    assert torch.equal(logits(model), logits(plain))
    for each in (model, plain):
        with pytest.warns(UserWarning, match="rounding"):
            each.merge_adapter()
    assert torch.equal(logits(model), logits(plain))
