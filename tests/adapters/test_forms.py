"""What each form computes, what its pieces are, and what is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from adapters.forms_cases import (
    ACTIVE,
    BATCH,
    KINDS,
    RANK,
    attach,
    build,
    distance,
    dominant_rows,
    formed,
    logits,
    lora_layers,
    trainable,
)
from cases import tiny_gpt2, tiny_llama, tiny_mixtral
from gradrank.adapters import forms
from gradrank.adapters.apply import count_trainable
from gradrank.core.errors import OptionError, TargetError
from oracles import forms as oracle

KIND = pytest.mark.parametrize("kind", KINDS)


def lone_layer(d_in: int = 5, d_out: int = 7, rank: int = RANK, **options: Any) -> Any:
    holder = nn.Sequential(nn.Linear(d_in, d_out))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], **options)
    layer: Any = lora_layers(get_peft_model(holder, config))[0]
    for linear in (layer.lora_A["default"], layer.lora_B["default"]):
        nn.init.normal_(linear.weight)
    return layer


def update(layer: Any) -> torch.Tensor:
    return layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()


@given(active=st.integers(1, RANK), seed=st.integers(0, 99))
def test_a_mask_counts_its_first_components(active: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = lone_layer()
    A, B = (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
    forms.attach_mask(layer, "default", RANK)
    forms.set_active(layer, "default", active)
    wanted = oracle.update_of_components(A, B, active)
    assert distance(update(layer), wanted) < 1e-5
    assert forms.active_components(layer, "default") == active
    if active < RANK:
        assert distance(update(layer), oracle.one_component_too_many(A, B, active)) > 1e-3


@pytest.mark.parametrize("init", ["svd", "keep"])
def test_the_svd_form_is_a_sum_over_directions(init: str) -> None:
    layer = lone_layer(d_in=9, d_out=8)
    before = update(layer)
    forms.attach_svd(layer, "default", init)
    raw = {name: tensor.detach() for name, tensor in forms.raw_tensors(layer, "default").items()}
    with torch.no_grad():
        raw["lam"].mul_(torch.linspace(0.5, 2, RANK))
    wanted = oracle.update_of_singular(raw["P"], raw["lam"], raw["Q"])
    assert distance(update(layer), wanted) < 1e-5
    assert distance(update(layer), oracle.singular_with_squares(**raw)) > 1e-2
    assert distance(update(layer), before) > 1e-2


def test_singular_values_are_those_of_the_update() -> None:
    layer = lone_layer(d_in=9, d_out=8)
    A = layer.lora_A["default"].weight.detach().clone()
    B = layer.lora_B["default"].weight.detach().clone()
    forms.attach_svd(layer, "default")
    raw = forms.raw_tensors(layer, "default")
    dense = torch.linalg.svdvals(B.double() @ A.double())[:RANK]
    torch.testing.assert_close(raw["lam"].detach().double(), dense, rtol=1e-5, atol=1e-6)
    for basis in (raw["P"].detach(), raw["Q"].detach().T):
        torch.testing.assert_close(basis.T @ basis, torch.eye(RANK), rtol=0, atol=1e-6)
    assert distance(update(layer), B @ A) < 1e-5


def test_a_zero_update_gets_seeded_orthonormal_directions() -> None:
    found = []
    for seed in (3, 3, 4):
        layer = lone_layer(d_in=9, d_out=8)
        nn.init.zeros_(layer.lora_B["default"].weight)
        state = torch.get_rng_state()
        forms.attach_svd(layer, "default", seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        raw = forms.raw_tensors(layer, "default")
        assert not raw["lam"].detach().any()
        assert not update(layer).any()
        assert distance(raw["P"].T @ raw["P"], torch.eye(RANK)) < 1e-6
        assert distance(raw["Q"] @ raw["Q"].T, torch.eye(RANK)) < 1e-6
        found.append(raw["P"].detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(("rank", "supplementary"), [(4, 2), (6, 0)])
@pytest.mark.parametrize("share", ["some", "all", "none"])
def test_a_partition_gives_rows_their_own_components(
    rank: int, supplementary: int, share: str
) -> None:
    layer = lone_layer()
    rows = {
        "some": dominant_rows(layer),
        "all": torch.ones(7, dtype=torch.bool),
        "none": torch.zeros(7, dtype=torch.bool),
    }[share]
    nn.init.zeros_(layer.lora_B["default"].weight)
    forms.attach_partition(layer, "default", rows, rank, supplementary)
    raw = {name: tensor.detach() for name, tensor in forms.raw_tensors(layer, "default").items()}
    count = int(rows.sum())
    assert raw["B_d"].shape == (count, rank)
    assert raw["B_s"].shape == (7 - count, supplementary)
    nn.init.normal_(raw["B_d"])
    nn.init.normal_(raw["B_s"])
    blocks = (raw["A"], raw["B_d"], raw["B_s"], rows)
    assert distance(update(layer), oracle.update_of_partition(*blocks)) < 1e-5
    if share == "some" and supplementary:
        assert distance(update(layer), oracle.partition_with_shared_rows(*blocks)) > 1e-2
    layer(torch.randn(2, 5)).sum().backward()
    blocks = [p for name, p in layer.named_parameters() if "original" in name]
    assert [p.numel() > 0 for p in blocks] == [p.grad is not None for p in blocks]
    forms.detach(layer, "default")
    assert layer.lora_B["default"].weight.requires_grad == any(p.requires_grad for p in blocks)


@KIND
def test_attach_and_detach_keep_the_function(kind: str) -> None:
    model = build()
    layers = lora_layers(model)
    if kind in {"mask", "partition"}:  # whose functions differ from that of random factors
        for layer in layers:
            attach(layer, kind)
            forms.detach(layer, "default")
    before = logits(model)
    for layer in layers:
        if kind == "mask":
            forms.attach_mask(layer, "default", ACTIVE)
        else:
            attach(layer, kind)
    changed = distance(logits(model), before)
    assert changed < 1e-6 if kind == "svd" else changed == 0
    formed_logits = logits(model)
    flags = [p.requires_grad for p in model.parameters()][:3]
    for layer in layers:
        forms.detach(layer, "default")
        assert forms.form_of(layer, "default") == "plain"
        for linear in (layer.lora_A["default"], layer.lora_B["default"]):
            assert type(linear) is nn.Linear
            assert not linear._state_dict_hooks
            assert not linear._load_state_dict_pre_hooks
            assert linear.weight.shape == (linear.out_features, linear.in_features)
            assert linear.weight.requires_grad
    assert torch.equal(logits(model), formed_logits)
    assert flags == [p.requires_grad for p in model.parameters()][:3]


@pytest.mark.parametrize("rslora", [False, True])
def test_detaching_a_mask_leaves_a_layer_of_that_rank(rslora: bool) -> None:
    layer = lone_layer(use_rslora=rslora)
    scaling = layer.scaling["default"]
    forms.attach_mask(layer, "default", 2)
    forms.detach(layer, "default")
    assert layer.r["default"] == 2
    assert layer.lora_A["default"].weight.shape == (2, 5)
    assert layer.lora_B["default"].weight.shape == (7, 2)
    assert layer.scaling["default"] == scaling
    layer.unscale_layer(None)
    assert layer.scaling["default"] == pytest.approx(scaling)
    assert forms.active_components(layer, "default") == 2


def test_parameters_whose_shape_stays_stay_the_same_objects() -> None:
    for kind in ("mask", "svd", "keep"):
        layer = lone_layer(d_in=9, d_out=8)
        mine = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        if kind == "mask":
            forms.attach_mask(layer, "default", RANK)
        else:
            attach(layer, kind)
        raw = forms.raw_tensors(layer, "default")
        assert [raw["Q" if "Q" in raw else "A"], raw["P" if "P" in raw else "B"]] == mine or all(
            a is b for a, b in zip(mine, list(raw.values())[:2], strict=True)
        )
        forms.detach(layer, "default")
        assert layer.lora_A["default"].weight is mine[0]
        assert layer.lora_B["default"].weight is mine[1]


@KIND
def test_permuted_components_leave_the_logits(kind: str) -> None:
    model = formed(kind)
    before = logits(model)
    order = {
        "mask": torch.tensor([2, 0, 3, 1, 5, 4]),
        "partition": torch.tensor([2, 0, 3, 1, 5, 4]),
    }.get(kind, torch.tensor([5, 0, 3, 1, 2, 4]))
    with torch.no_grad():
        for layer in lora_layers(model):
            raw = forms.raw_tensors(layer, "default")
            first = raw["Q"] if "Q" in raw else raw["A"]
            first.copy_(first[order].clone())
            for name, columns in (("B", order), ("P", order), ("B_d", order[:4])):
                if name in raw:
                    raw[name].copy_(raw[name][:, columns].clone())
            if "lam" in raw:
                raw["lam"].copy_(raw["lam"][order].clone())
            if "B_s" in raw:
                raw["B_s"].copy_(raw["B_s"][:, order[4:] - 4].clone())
    assert distance(logits(model), before) < 1e-6
    with torch.no_grad():
        last = forms.raw_tensors(lora_layers(model)[-1], "default")
        first = last["Q"] if "Q" in last else last["A"]
        first.copy_(first[torch.tensor([1, 0, 2, 3, 4, 5])].clone())
    assert distance(logits(model), before) > 1e-6


@KIND
def test_raw_tensors_restore_exactly(kind: str) -> None:
    model = formed(kind)
    before = logits(model)
    saved = [
        {n: t.detach().clone() for n, t in forms.raw_tensors(layer, "default").items()}
        for layer in lora_layers(model)
    ]
    for layer in lora_layers(model):
        if kind == "mask":
            forms.set_active(layer, "default", 2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1)
    assert distance(logits(model), before) > 1e-3
    ids = [id(p) for p in model.parameters()]
    for layer, tensors in zip(lora_layers(model), saved, strict=True):
        forms.load_raw_tensors(layer, "default", tensors)
    assert torch.equal(logits(model), before)
    assert ids == [id(p) for p in model.parameters()]
    assert len(trainable(model)) == sum(
        len(tensors.keys() - {"active", "dominant"}) for tensors in saved
    )


def test_raw_tensors_of_another_partition_of_the_same_size() -> None:
    layer, other = lone_layer(), lone_layer()
    for which, rows in ((layer, [0, 1, 4]), (other, [2, 5, 6])):
        mask = torch.zeros(7, dtype=torch.bool)
        mask[rows] = True
        nn.init.zeros_(which.lora_B["default"].weight)
        forms.attach_partition(which, "default", mask, 4, 2)
        nn.init.normal_(forms.raw_tensors(which, "default")["B_d"])
    forms.load_raw_tensors(layer, "default", forms.raw_tensors(other, "default"))
    assert torch.equal(update(layer), update(other))


@KIND
def test_every_learned_tensor_counts_as_the_adapter(kind: str) -> None:
    model = formed(kind)
    counts = count_trainable(model)
    assert counts["other"] == 0
    assert counts["adapter"] == sum(p.numel() for p in trainable(model).values())
    model(**BATCH).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())
    assert all(p.grad is None for name, p in model.named_parameters() if ".lora_" not in name)


def test_dormant_components_get_no_gradient_and_never_show() -> None:
    model, shadow = formed("mask").train(), formed("mask").train()
    for layer in lora_layers(shadow):  # other dormant values, and even infinite ones
        raw = forms.raw_tensors(layer, "default")
        with torch.no_grad():
            raw["A"][ACTIVE:] = torch.inf
            raw["B"][:, ACTIVE:] = 7.0
    optimizers = [
        torch.optim.AdamW(trainable(m).values(), lr=1e-2, weight_decay=0.1) for m in (model, shadow)
    ]
    for _ in range(3):
        for each, optimizer in zip((model, shadow), optimizers, strict=True):
            each(**BATCH).loss.backward()
            for layer in lora_layers(each):
                raw = forms.raw_tensors(layer, "default")
                assert not raw["A"].grad[ACTIVE:].any()
                assert not raw["B"].grad[:, ACTIVE:].any()
                assert raw["B"].grad[:, :ACTIVE].any()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(logits(model), logits(shadow))


def test_growing_with_zero_columns_keeps_the_function() -> None:
    model = formed("mask")
    before = logits(model)
    for layer in lora_layers(model):
        with torch.no_grad():
            forms.raw_tensors(layer, "default")["B"][:, ACTIVE:] = 0
        forms.set_active(layer, "default", RANK)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("active", [0, -1, RANK + 1, 2.0, True, "3"])
def test_a_wrong_number_of_active_components_is_refused(active: Any) -> None:
    layer = lone_layer()
    with pytest.raises(OptionError, match=r"not an integer in 1\.\.6"):
        forms.attach_mask(layer, "default", active)
    forms.attach_mask(layer, "default", 3)
    with pytest.raises(OptionError, match=r"not an integer in 1\.\.6"):
        forms.set_active(layer, "default", active)
    assert forms.active_components(layer, "default") == 3


@KIND
def test_a_form_on_a_form_is_refused(kind: str) -> None:
    layer = lone_layer(d_in=9, d_out=8)
    attach(layer, kind)
    for again in KINDS[:3]:
        with pytest.raises(TargetError, match=r"already has form '(mask|svd|partition)'.*detach"):
            attach(layer, again)
    if kind != "mask":
        with pytest.raises(TargetError, match="only a component mask"):
            forms.set_active(layer, "default", 2)


@pytest.mark.parametrize(
    ("mask", "rank", "supplementary", "words"),
    [
        (torch.ones(6, dtype=torch.bool), 4, 2, r"needs torch.bool \[7\]"),
        (torch.ones(7), 4, 2, r"torch.float32 \[7\]"),
        (torch.ones(7, dtype=torch.bool), 4, 1, "do not make the rank 6"),
        (torch.ones(7, dtype=torch.bool), 0, 6, "do not make the rank 6"),
        (torch.ones(7, dtype=torch.bool), 7, -1, "do not make the rank 6"),
        (torch.ones(7, dtype=torch.bool), 4, 2, "14 nonzero entries outside the blocks"),
    ],
)
def test_a_partition_that_does_not_fit_is_refused(
    mask: torch.Tensor, rank: int, supplementary: int, words: str
) -> None:
    layer = lone_layer()
    with pytest.raises(OptionError, match=words):
        forms.attach_partition(layer, "default", mask, rank, supplementary)
    assert forms.form_of(layer, "default") == "plain"


def test_wrong_options_and_tensors_are_refused() -> None:
    layer = lone_layer(d_in=9, d_out=8)
    with pytest.raises(OptionError, match="Did you mean 'keep'"):
        forms.attach_svd(layer, "default", "keeep")
    with pytest.raises(TargetError, match="no 6 directions are orthonormal"):
        forms.attach_svd(lone_layer(d_in=4), "default")
    raw = forms.raw_tensors(layer, "default")
    with pytest.raises(OptionError, match=r"tensors \['A', 'B'\], and \['A'\] were given"):
        forms.load_raw_tensors(layer, "default", {"A": raw["A"]})
    with pytest.raises(OptionError, match=r"given tensor is \[2, 9\]"):
        forms.load_raw_tensors(layer, "default", {"A": raw["A"][:2], "B": raw["B"]})
    with pytest.raises(OptionError, match="would round"):
        forms.load_raw_tensors(layer, "default", {"A": raw["A"].double(), "B": raw["B"]})


def test_what_has_no_pair_of_linear_factors_is_refused_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.convolution = nn.Embedding(9, 8), nn.Conv2d(3, 8, 1)
            self.attention = nn.MultiheadAttention(8, 2)

    odd = get_peft_model(
        Odd(), LoraConfig(r=2, target_modules=["embedding", "convolution", "attention"])
    )
    kinds = {type(layer).__name__: layer for layer in lora_layers(odd)}
    for name, words in (
        ("Embedding", "of kind Embedding"),
        ("Conv2d", "are Conv2d modules"),
        ("MultiheadAttention", "of kind MultiheadAttention"),
    ):
        with pytest.raises(TargetError, match=words):
            forms.attach_mask(kinds[name], "default", 1)
    experts = get_peft_model(
        tiny_mixtral(), LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"])
    )
    with pytest.raises(TargetError, match="of kind ParamWrapper"):
        forms.attach_svd(lora_layers(experts)[0], "default", "keep")
    with pytest.raises(TargetError, match="a Linear is not a LoRA layer"):
        forms.form_of(nn.Linear(2, 2), "default")
    with pytest.raises(TargetError, match=r"no adapter 'defualt'\. Did you mean 'default'"):
        forms.attach_mask(lone_layer(), "defualt", 1)


def test_merged_variants_and_foreign_parametrizations_are_refused() -> None:
    layer = lone_layer()
    layer.merge()
    with pytest.raises(TargetError, match="is merged"):
        forms.attach_mask(layer, "default", 3)
    layer.unmerge()
    forms.attach_mask(layer, "default", 3)
    layer.merge()
    for change in (
        lambda: forms.set_active(layer, "default", 2),
        lambda: forms.detach(layer, "default"),
    ):
        with pytest.raises(TargetError, match="is merged"):
            change()
    layer = lone_layer()
    torch.nn.utils.parametrizations.weight_norm(layer.lora_A["default"])
    with pytest.raises(TargetError, match="already has a parametrization"):
        forms.attach_mask(layer, "default", 3)
    layer = lone_layer()
    layer.lora_variant["default"] = object()
    with pytest.raises(TargetError, match="is a object, which uses its factors"):
        forms.attach_mask(layer, "default", 3)
    layer = lone_layer()
    layer.lora_A["default"].weight = nn.Parameter(torch.empty(0))
    with pytest.raises(TargetError, match="not a whole pair of rank 6"):
        forms.attach_mask(layer, "default", 3)


@KIND
@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.5}]
)
def test_other_kinds_of_lora_keep_working(kind: str, options: dict[str, Any]) -> None:
    model = formed(kind, **options)
    before = logits(model)
    for layer in lora_layers(model):
        forms.detach(layer, "default")
    assert torch.equal(logits(model), before)


@KIND
def test_conv1d_targets_merge(kind: str) -> None:
    model = formed(
        kind, tiny_gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    before = logits(model)
    model.merge_adapter()
    assert distance(logits(model), before) < 1e-6


def test_a_plain_layer_is_a_form_too() -> None:
    model = build(tiny_llama())
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    assert forms.form_of(layer, "default") == "plain"
    assert forms.active_components(layer, "default") == RANK
    forms.detach(layer, "default")
    with pytest.raises(TargetError, match="Call attach_mask first"):
        forms.set_active(layer, "default", 2)
