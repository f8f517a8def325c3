"""State dicts, PEFT's saves and loads, and copies see plain weights."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adapters.forms_cases import (
    ACTIVE,
    BATCH,
    KINDS,
    RANK,
    attach,
    build,
    distance,
    formed,
    in_step,
    logits,
    lora_layers,
    trainable,
)
from cases import randomise_adapter, tiny_llama
from gradrank.adapters import forms
from gradrank.serving.export import export

KIND = pytest.mark.parametrize("kind", KINDS)


def plain_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for layer in lora_layers(twin):
        forms.detach(layer, "default")
    return twin


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.05)
    return model


def identities(model: nn.Module) -> list[int]:
    return [id(parameter) for parameter in model.parameters()]


@KIND
def test_state_dicts_show_the_plain_twin(kind: str) -> None:
    model = formed(kind)
    found, wanted = model.state_dict(), plain_twin(model).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(tensor.is_contiguous() for tensor in found.values())
    ours = get_peft_model_state_dict(model)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in ours)
    rank = ACTIVE if kind == "mask" else RANK
    assert {t.shape[0] for name, t in ours.items() if "lora_A" in name} == {rank}
    assert {t.shape[1] for name, t in ours.items() if "lora_B" in name} == {rank}


@KIND
def test_a_saved_adapter_loads_in_stock_peft_bitwise(kind: str, tmp_path: Path) -> None:
    model = in_step(formed(kind), kind)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert not any(parametrize.is_parametrized(module) for module in stock.modules())
    assert torch.equal(logits(stock), logits(model))


@KIND
@pytest.mark.parametrize("target", ["peft", "merged"])
def test_export_passes_its_own_check(kind: str, target: str, tmp_path: Path) -> None:
    model = in_step(formed(kind), kind)
    before = logits(model)
    report = export(model, tmp_path / "out", target)
    assert report.difference <= report.tolerance
    assert torch.equal(logits(model), before)
    assert {forms.form_of(layer, "default") for layer in lora_layers(model)} == {
        "svd" if kind == "keep" else kind
    }


@KIND
def test_plain_weights_load_onto_live_forms(kind: str, tmp_path: Path) -> None:
    saved = in_step(formed(kind), kind)
    saved.save_pretrained(tmp_path)
    wanted = logits(saved)
    by_peft, by_torch, by_folder = (shaken(formed(kind)) for _ in range(3))
    before = identities(by_folder)
    result = set_peft_model_state_dict(by_peft, get_peft_model_state_dict(saved))
    assert not [name for name in result.missing_keys if "lora_" in name]
    assert not result.unexpected_keys
    by_torch.load_state_dict(saved.state_dict())
    by_folder.load_adapter(str(tmp_path), "default", is_trainable=True)
    for model in (by_peft, by_torch, by_folder):
        assert torch.equal(logits(model), wanted)
    assert before == identities(by_folder)
    assert {forms.form_of(layer, "default") for layer in lora_layers(by_peft)} != {"plain"}


@KIND
def test_assigned_state_dicts_load_too(kind: str) -> None:
    saved, model = formed(kind), shaken(formed(kind))
    state = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert torch.equal(logits(model), logits(saved))
    keep = identities(model)
    partial = {name: t for name, t in state.items() if ".lora_" not in name}
    result = model.load_state_dict(partial, strict=False, assign=True)
    assert result.missing_keys
    after = identities(model)
    assert [
        i for i, (n, _) in zip(after, model.named_parameters(), strict=True) if "lora" in n
    ] == [i for i, (n, _) in zip(keep, model.named_parameters(), strict=True) if "lora" in n]


def test_a_mask_loads_compact_and_full_weights() -> None:
    layer: Any = lora_layers(formed("mask"))[0]
    raw = forms.raw_tensors(layer, "default")
    dormant = raw["A"].detach()[ACTIVE:].clone()
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    a.load_state_dict({"weight": torch.ones(ACTIVE, a.in_features)})
    b.load_state_dict({"weight": torch.ones(b.out_features, ACTIVE)})
    assert torch.equal(raw["A"][ACTIVE:], dormant)
    assert (raw["A"][:ACTIVE] == 1).all()
    assert (raw["B"][:, :ACTIVE] == 1).all()
    assert not raw["B"][:, ACTIVE:].any()
    a.load_state_dict({"weight": torch.full((RANK, a.in_features), 2.0)})
    b.load_state_dict({"weight": torch.full((b.out_features, RANK), 3.0)})
    assert (raw["A"] == 2).all()
    assert (raw["B"] == 3).all()
    assert b.weight[:, ACTIVE:].count_nonzero() == 0


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    model = formed("mask")
    state = get_peft_model_state_dict(model)
    for layer in lora_layers(model):
        forms.set_active(layer, "default", 2)
    before = logits(model)
    with pytest.raises(RuntimeError, match=r"q_proj\.lora_A.*is \[4, 32\].*2 of 6.*set_active"):
        set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model), before)
    layer: Any = lora_layers(formed("partition"))[0]
    b = layer.lora_B["default"]
    with pytest.raises(RuntimeError, match="nonzero entries outside the blocks"):
        b.load_state_dict({"weight": torch.ones(b.out_features, RANK)})
    with pytest.raises(RuntimeError, match=r"given tensor is \[2, 2\]"):
        b.load_state_dict({"weight": torch.ones(2, 2)})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"\.'):
        b.load_state_dict({})


def test_a_loaded_svd_form_keeps_the_function_with_unit_lambda() -> None:
    saved = build()
    model = formed("svd")
    set_peft_model_state_dict(model, get_peft_model_state_dict(saved))
    assert torch.equal(logits(model), logits(saved))
    for layer in lora_layers(model):
        assert (forms.raw_tensors(layer, "default")["lam"] == 1).all()


@KIND
def test_a_copy_is_independent_and_whole(kind: str) -> None:
    model = formed(kind)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    shaken(twin)
    if kind == "mask":
        for layer in lora_layers(twin):
            forms.set_active(layer, "default", 2)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    moved = logits(twin)
    state = twin.state_dict()
    assert torch.equal(logits(model), before)
    for layer in lora_layers(model):
        forms.detach(layer, "default")  # must not take the copy's property away
    assert torch.equal(logits(twin), moved)
    twin.load_state_dict(state)
    assert distance(logits(twin), moved) < 1e-6
    (twin if kind == "mask" else model)(**BATCH).loss.backward()


@KIND
def test_a_copy_does_not_hold_the_original(kind: str) -> None:
    model = formed(kind)
    twin = copy.deepcopy(model)
    watched = weakref.ref(lora_layers(model)[0].lora_B["default"])
    with parametrize.cached():
        before = logits(model)
        assert not torch.equal(logits(shaken(twin)), before)
    del model
    gc.collect()
    assert watched() is None
    twin.state_dict()


@KIND
def test_peft_switches_and_deletes_adapters(kind: str) -> None:
    model = build()
    model.add_adapter("other", LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    randomise_adapter(model, 0.1)
    for layer in lora_layers(model):
        attach(layer, kind, "other")
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    assert all(".other." in name for name in trainable(model))
    mixed = logits(model, adapter_names=["default", "other", "__base__"])
    assert distance(mixed[0], first[0]) < 1e-6
    assert distance(mixed[1], second[1]) < 1e-6
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama().eval()))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    assert not [name for name in model.state_dict() if ".other." in name]


@KIND
def test_dtypes_are_cast_as_in_stock_layers(kind: str) -> None:
    model = formed(kind).to(torch.bfloat16)
    layer = lora_layers(model)[0]
    pair = (layer.lora_A["default"], layer.lora_B["default"])
    assert {linear.weight.dtype for linear in pair} == {torch.bfloat16}
    model.base_model._cast_adapter_dtype("default")
    assert {linear.weight.dtype for linear in pair} == {torch.float32}
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert {t.dtype for t in get_peft_model_state_dict(model).values()} == {torch.float32}


@KIND
def test_weights_can_be_assigned_but_not_replaced(kind: str) -> None:
    b = lora_layers(formed(kind))[0].lora_B["default"]
    wanted: Tensor = 2 * b.weight.detach()
    b.weight = wanted.clone()
    assert torch.equal(b.weight, wanted)
    with pytest.raises(KeyError, match="already exists"):
        b.weight = nn.Parameter(wanted)
