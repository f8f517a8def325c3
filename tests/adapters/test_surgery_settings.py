"""Surgery in the settings people train in: dtypes, quantised bases, checkpointing, schedulers."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import gradrank as gr
from adapters.surgery_cases import (
    LR,
    config,
    distance,
    everything,
    layers,
    logits,
    reloaded,
    same,
    sites,
    train,
    trainable,
    trained,
)
from cases import CASES, batches, tiny_llama
from gradrank.adapters.reserve import reserve_ranks
from gradrank.ops.four_bit import keep_quantised_layout

LLAMA = CASES["llama"]
BATCH = batches(LLAMA, 1)[0]
Q = "model.layers.0.self_attn.q_proj"


def mixed(model: Any) -> dict[str, Any]:
    kinds = (gr.Shrink(2), gr.Grow(6), gr.Shrink(3, "norm"), gr.Drop())
    return {n: kinds[i % 4] for i, n in enumerate(sites(model))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [True, False], ids=["float32-adapter", "low-adapter"])
def test_dtypes_are_kept(dtype: torch.dtype, cast: bool) -> None:
    torch.manual_seed(5)
    base = tiny_llama().to(dtype)
    model = get_peft_model(base, config(LLAMA), autocast_adapter_dtype=cast).eval()
    wanted = torch.float32 if cast else dtype
    optimizer = torch.optim.SGD(trainable(model), 0.05, momentum=0.9)
    train(model, optimizer, LLAMA, 2)
    before = logits(model)
    gr.edit(model, dict.fromkeys(sites(model), gr.Grow(6)), optimizer)
    step = 2 * torch.finfo(dtype).eps * float(before.abs().max())
    assert distance(logits(model), before) <= step
    gr.edit(model, mixed(model), optimizer)
    for site in sites(model).values():
        for factor in "AB":
            raw = site.raw(factor)
            assert raw.dtype == wanted
            assert raw.device.type == "cpu"
            assert raw.is_contiguous()
            assert optimizer.state[raw]["momentum_buffer"].dtype == wanted
            assert optimizer.state[raw]["momentum_buffer"].shape == raw.shape
    train(model, optimizer, LLAMA, 1)
    assert all(torch.isfinite(p).all() for p in trainable(model))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fixed", [False, True], ids=["resize", "mask"])
def test_quantised_bases(bits: int, fixed: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(5)
    model = get_peft_model(quantised(bits), config(LLAMA)).eval()
    assert {type(layer).__name__ for layer in layers(model).values()} == {
        "Linear4bit" if bits == 4 else "Linear8bitLt"
    }
    if fixed:
        reserve_ranks(model, dict.fromkeys(sites(model), 6))
    optimizer = torch.optim.AdamW(trainable(model), LR)
    train(model, optimizer, LLAMA, 2)
    before = logits(model)
    gr.edit(model, dict.fromkeys(sites(model), gr.Grow(5)), optimizer)
    assert distance(logits(model), before) < 1e-5
    edits = mixed(model)
    if fixed:
        edits = {n: gr.Shrink(1) if isinstance(e, gr.Drop) else e for n, e in edits.items()}
    gr.edit(model, edits, optimizer)
    train(model, optimizer, LLAMA, 2)
    dropped = [n for n, e in edits.items() if isinstance(e, gr.Drop)]
    for name in dropped:
        module = model.get_submodule("base_model.model." + name)
        assert type(module) is (bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt)


def quantised(bits: int) -> nn.Module:
    from signals.test_bitsandbytes import quantise

    model: Any = quantise(tiny_llama(), bits)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    keep_quantised_layout(model)
    return model


def test_an_8_bit_optimizer_goes_on() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model, _ = trained(steps=1)
    optimizer = bnb.optim.AdamW8bit(trainable(model), lr=LR, min_8bit_size=1)
    train(model, optimizer, LLAMA, 2)
    report = gr.edit(model, mixed(model), optimizer)
    assert report.reset == ()
    raw = sites(model)[Q].raw("A")
    assert optimizer.state[raw]["state1"].dtype == torch.uint8
    assert optimizer.state[raw]["state1"].shape == raw.shape
    train(model, optimizer, LLAMA, 2)
    assert all(torch.isfinite(p).all() for p in trainable(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    runs = []
    for checkpointed in (False, True):
        model, optimizer = trained()
        model.train()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        train(model, optimizer, LLAMA, 1, 7)
        gr.edit(model, mixed(model), optimizer)
        train(model, optimizer, LLAMA, 2, 8)
        runs.append(torch.cat([p.detach().flatten() for p in trainable(model)]))
    assert torch.equal(*runs)


def test_an_edit_inside_autocast_is_the_same_edit() -> None:
    plain, cast = trained(), trained()
    edits = mixed(plain[0]) | {Q: gr.Grow(6, torch.randn(5, 32))}
    gr.edit(plain[0], edits, plain[1])
    with torch.autocast("cpu", torch.bfloat16):
        gr.edit(cast[0], edits, cast[1])
        cast[0](**BATCH).loss.backward()
    for name, parameter in plain[0].named_parameters():
        assert torch.equal(dict(cast[0].named_parameters())[name], parameter)
    cast[1].step()


def test_a_frozen_adapter_stays_frozen() -> None:
    model, _ = trained()
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(trainable(model), LR)
    train(model, optimizer, LLAMA, 1)
    gr.edit(model, mixed(model), optimizer)
    for name, site in sites(model).items():
        for factor in "AB":
            assert site.raw(factor).requires_grad == (".layers.0." not in name)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainable(model)}
    train(model, optimizer, LLAMA, 1)


def test_modules_to_save_are_left_alone() -> None:
    model, optimizer = trained(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    head = {n: p for n, p in model.named_parameters() if "lm_head" in n}
    values = {n: p.detach().clone() for n, p in head.items()}
    gr.edit(model, {n: gr.Grow(6) for n in sites(model)}, optimizer)
    for name, parameter in model.named_parameters():
        if "lm_head" in name:
            assert parameter is head[name]
            assert torch.equal(parameter, values[name])
    train(model, optimizer, LLAMA, 1)
    assert torch.equal(logits(reloaded(model, LLAMA)), logits(model))


def test_groups_keep_their_order_and_schedulers_work_on() -> None:
    model, _ = trained()
    raws = {n: [site.raw("A"), site.raw("B")] for n, site in sites(model).items()}
    first = [p for n, pair in raws.items() for p in pair if ".layers.0." in n]
    last = [p for n, pair in raws.items() for p in pair if ".layers.1." in n]
    extra = nn.Parameter(torch.ones(3))
    groups = [
        {"params": [extra, *first], "lr": 0.1, "weight_decay": 0.3},
        {"params": last[::-1], "lr": 0.02},
    ]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, LLAMA, 1)
    scheduler.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    gr.edit(model, {n: gr.Grow(5) for n in raws}, optimizer)
    new = {n: [site.raw("A"), site.raw("B")] for n, site in sites(model).items()}
    wanted = [
        [extra, *(p for n, pair in new.items() for p in pair if ".layers.0." in n)],
        [p for n, pair in new.items() for p in pair if ".layers.1." in n][::-1],
    ]
    for group, expected in zip(optimizer.param_groups, wanted, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected]
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    before = new[Q][0].detach().clone()
    train(model, optimizer, LLAMA, 1)
    assert not torch.equal(new[Q][0], before)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [r / 2 for r in rates]


def test_an_optimizer_of_named_parameters_stays_consistent() -> None:
    model, _ = trained()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named, LR)
    train(model, optimizer, LLAMA, 1)
    gr.edit(model, {Q: gr.Grow(6)}, optimizer)
    group = optimizer.param_groups[0]
    by_name = dict(model.named_parameters())
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        assert by_name[name] is parameter


def test_gradients_of_edited_factors_are_cleared_and_others_kept() -> None:
    model, optimizer = trained()
    model(**BATCH).loss.backward()
    kept = sites(model)["model.layers.1.mlp.up_proj"].raw("B")
    gradient = kept.grad.clone()
    gr.edit(model, {Q: gr.Grow(6)}, optimizer)
    assert sites(model)[Q].raw("A").grad is None
    assert torch.equal(kept.grad, gradient)
    fixed, _ = trained()
    reserve_ranks(fixed, {Q: 8})
    fixed(**BATCH).loss.backward()
    gr.edit(fixed, {Q: gr.Grow(6)})
    assert sites(fixed)[Q].raw("A").grad is None


def test_memory_falls_with_the_rank() -> None:
    model, optimizer = trained(rank=16)
    stored = sum(p.numel() for p in trainable(model))
    moments = sum(t.numel() for s in optimizer.state.values() for t in s.values())
    gr.edit(model, dict.fromkeys(sites(model), gr.Shrink(2)), optimizer)
    assert sum(p.numel() for p in trainable(model)) == stored // 8
    after = sum(t.numel() for s in optimizer.state.values() for t in s.values())
    assert after < 0.13 * moments
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in trainable(model))


def test_the_same_seed_gives_the_same_edit_and_leaves_the_random_state() -> None:
    runs = [trained() for _ in range(3)]
    state = torch.get_rng_state()
    for (model, optimizer), seed in zip(runs, (1, 1, 2), strict=True):
        gr.edit(model, {Q: gr.Grow(6)}, optimizer, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    rows = [sites(model)[Q].raw("A").detach() for model, _ in runs]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert same(everything(runs[0][0])["config"], everything(runs[1][0])["config"])
