"""The SVD form at a fixed shape: what counts, what learns, what a state dict shows."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from adapters.forms_cases import BATCH, RANK, build, distance, logits, lora_layers, trainable
from gradrank.adapters import forms
from gradrank.adapters.site import LoraSite
from gradrank.core.errors import OptionError, TargetError
from oracles.components import update_of_kept, update_with_lam_left_behind


def fixed_layer(d_in: int = 9, d_out: int = 8, **options: Any) -> Any:
    holder = nn.Sequential(nn.Linear(d_in, d_out))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], **options)
    layer: Any = lora_layers(get_peft_model(holder, config))[0]
    for linear in (layer.lora_A["default"], layer.lora_B["default"]):
        nn.init.normal_(linear.weight)
    forms.attach_svd(layer, "default", fixed=True)
    return layer


def update(layer: Any) -> torch.Tensor:
    return layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()


@given(active=st.integers(0, RANK), seed=st.integers(0, 99))
def test_the_first_components_count(active: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = fixed_layer()
    forms.set_active(layer, "default", active)
    assert forms.form_of(layer, "default") == "svd"
    assert forms.active_components(layer, "default") == active
    raw = {name: t.detach() for name, t in forms.raw_tensors(layer, "default").items()}
    factors = (raw["P"], raw["lam"], raw["Q"])
    assert distance(update(layer), update_of_kept(*factors, range(active))) < 1e-5
    assert raw["active"] == active
    if active < RANK - 1:  # the comparison sees one component too many
        wrong = update_of_kept(*factors, range(active + 2))
        assert distance(update(layer), wrong) > 1e-3
    if active == 1:
        left = update_with_lam_left_behind(*factors, [RANK - 1])
        assert distance(left, update_of_kept(*factors, [RANK - 1])) > 1e-3


@pytest.mark.parametrize("active", [0, 3])
def test_dormant_components_get_no_gradient_and_never_show(active: int) -> None:
    models = []
    for dormant in (None, torch.inf):
        model = build().train()
        for layer in lora_layers(model):
            forms.attach_svd(layer, "default", fixed=True)
            forms.set_active(layer, "default", active)
            raw = forms.raw_tensors(layer, "default")
            if dormant is not None:
                with torch.no_grad():
                    raw["Q"][active:], raw["P"][:, active:] = dormant, 7.0
                    raw["lam"][active:] = dormant
        models.append(model)
    optimizers = [torch.optim.AdamW(trainable(m).values(), lr=1e-2) for m in models]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = model(**BATCH).loss
            loss.backward()
            for layer in lora_layers(model):
                grads = {n: t.grad for n, t in forms.raw_tensors(layer, "default").items()}
                assert not grads["Q"][active:].any()
                assert not grads["P"][:, active:].any()
                assert not grads["lam"][active:].any()
                if active:
                    assert grads["P"][:, :active].any()
                    assert grads["lam"][:active].any()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_a_form_of_fixed_shape_is_the_plain_form_bitwise() -> None:
    free, fixed = build(), build()
    for layer, twin in zip(lora_layers(free), lora_layers(fixed), strict=True):
        forms.attach_svd(layer, "default")
        forms.attach_svd(twin, "default", fixed=True)
    assert torch.equal(logits(free), logits(fixed))
    assert sum(p.numel() for p in trainable(free).values()) == sum(
        p.numel() for p in trainable(fixed).values()
    )
    for active in (4, 0):
        before = {n: id(p) for n, p in fixed.named_parameters()}
        for layer in lora_layers(fixed):
            forms.set_active(layer, "default", active)
        assert before == {n: id(p) for n, p in fixed.named_parameters()}
        shown = fixed.state_dict()
        ranks = {t.shape[0] for n, t in shown.items() if "lora_A" in n}
        assert ranks == {max(active, 1)}
        assert {t.shape[1] for n, t in shown.items() if "lora_B" in n} == ranks
        assert active or not any(t.any() for n, t in shown.items() if "lora_B" in n)


@pytest.mark.parametrize("active", [0, 2, RANK])
def test_raw_tensors_restore_and_detaching_keeps_the_function(active: int) -> None:
    layer, other = fixed_layer(), fixed_layer()
    forms.set_active(layer, "default", active)
    saved = {n: t.detach().clone() for n, t in forms.raw_tensors(layer, "default").items()}
    assert saved.keys() == {"Q", "P", "lam", "active"}
    forms.load_raw_tensors(other, "default", saved)
    assert torch.equal(update(other), update(layer))
    twin = copy.deepcopy(layer)
    before, scaling = update(twin), twin.scaling["default"]
    mine = forms.raw_tensors(twin, "default")
    forms.detach(twin, "default")
    assert forms.form_of(twin, "default") == "plain"
    assert twin.r["default"] == max(active, 1) == twin.lora_A["default"].weight.shape[0]
    assert distance(update(twin), before) < 1e-6
    assert twin.scaling["default"] == scaling
    assert twin.lora_A["default"].out_features == max(active, 1)
    assert (twin.lora_B["default"].weight is mine["P"]) == (active == RANK)
    assert forms.form_of(layer, "default") == "svd", "the copy is its own"
    assert torch.equal(update(layer), before)


def test_stored_weights_load_compact_and_full() -> None:
    layer = fixed_layer()
    forms.set_active(layer, "default", 2)
    raw = forms.raw_tensors(layer, "default")
    dormant = raw["P"].detach()[:, 2:].clone()
    b = layer.lora_B["default"]
    b.load_state_dict({"weight": torch.full((8, 2), 3.0)})
    assert torch.equal(b.weight[:, :2], torch.full((8, 2), 3.0))
    assert raw["lam"].tolist() == [1, 1, 0, 0, 0, 0]
    assert torch.equal(raw["P"][:, 2:], dormant)
    b.load_state_dict({"weight": torch.full((8, RANK), 5.0)})
    assert (raw["P"] == 5).all()
    with pytest.raises(RuntimeError, match="2 of 6 components active"):
        b.load_state_dict({"weight": torch.ones(8, 3)})
    forms.set_active(layer, "default", 0)
    b.load_state_dict({"weight": torch.zeros(8, 1)})
    assert not update(layer).any()


@pytest.mark.parametrize("active", [-1, RANK + 1, 2.0, True])
def test_a_wrong_number_of_active_components_is_refused(active: Any) -> None:
    layer = fixed_layer()
    with pytest.raises(OptionError, match=r"not an integer in 0\.\.6"):
        forms.set_active(layer, "default", active)
    assert forms.active_components(layer, "default") == RANK


def test_without_a_fixed_shape_nothing_can_be_set() -> None:
    layer = fixed_layer()
    forms.detach(layer, "default")
    forms.attach_svd(layer, "default")
    with pytest.raises(TargetError, match="only a component mask"):
        forms.set_active(layer, "default", 2)
    assert "active" not in forms.raw_tensors(layer, "default")


def test_widened_factors_get_random_directions_beside_trained_ones() -> None:
    layer = fixed_layer()
    forms.detach(layer, "default")
    with torch.no_grad():
        layer.lora_B["default"].weight[:, 3:] = 0
    before = update(layer)
    forms.attach_svd(layer, "default", seed=4)
    raw = {n: t.detach() for n, t in forms.raw_tensors(layer, "default").items()}
    assert distance(update(layer), before) < 1e-6
    assert raw["lam"][:3].all()
    assert not raw["lam"][3:].any()
    assert distance(raw["P"].T @ raw["P"], torch.eye(RANK)) < 1e-6
    assert float(raw["P"][:, 3:].abs().max()) < 0.99, "no coordinate axis"


@pytest.mark.parametrize("form", ["plain", "mask", "svd", "fixed"])
def test_a_site_shows_and_takes_its_parameters(form: str) -> None:
    layer = fixed_layer()
    if form != "fixed":
        forms.detach(layer, "default")
    if form == "mask":
        forms.attach_mask(layer, "default", 4)
    elif form == "svd":
        forms.attach_svd(layer, "default")
    site = LoraSite("0", layer, "default")
    assert site.form == ("svd" if form == "fixed" else form)
    assert site.masked == (form in {"mask", "fixed"})
    assert site.factors == (("A", "B", "lam") if site.form == "svd" else ("A", "B"))
    learned = site.learned()
    assert {id(p) for p in learned.values()} == {
        id(p) for n, p in layer.named_parameters() if ".lora" in f".{n}"
    }
    assert all(learned[factor] is site.raw(factor) for factor in site.factors)
    names = [name for name, _ in layer.named_parameters()]
    for factor, old in learned.items():
        new = nn.Parameter(torch.full_like(old, 0.5))
        site.assign(factor, new)
        assert site.raw(factor) is new
    assert names == [name for name, _ in layer.named_parameters()]
    count = site.rank
    wanted = 0.5 * 0.5 * count * (0.5 if site.form == "svd" else 1)
    assert distance(update(layer), torch.full((8, 9), wanted)) < 1e-6
