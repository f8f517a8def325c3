"""Fixed shapes give the same function, the same next step and the same weights as true resizing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradrank as gr
from adapters.surgery_cases import (
    LR,
    OPTIMIZERS,
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
from cases import CASES, Case
from gradrank.adapters.reserve import refit, reserve_ranks, settle
from gradrank.core.errors import SurgeryError

LLAMA = CASES["llama"]
ELEMENTWISE = ["adamw", "adam", "momentum"]
EDITS: dict[str, Any] = {
    "shrink": lambda i, _s: gr.Shrink(1 + i % 4),
    "norm": lambda i, _s: gr.Shrink(1 + i % 3, "norm"),
    "grow": lambda i, _s: gr.Grow(4 + i % 5),
    "sketch": lambda i, site: gr.Grow(5 + i % 4, sketch(site, i)),
    "mixed": lambda i, _s: (gr.Shrink(2), gr.Grow(7), gr.Shrink(3, "norm"), gr.Grow(8))[i % 4],
}


def sketch(site: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, site.raw("A").shape[1], generator=generator)


def used(site: Any) -> dict[str, Tensor]:
    """The components in use of both factors."""
    return {
        "A": site.raw("A").detach()[: site.rank],
        "B": site.raw("B").detach()[:, : site.rank],
    }


def gradients(model: Any, seed: int) -> None:
    """Equal gradients for the components in use, whatever the shapes; zero for the others."""
    for index, site in enumerate(sites(model).values()):
        for factor, value in used(site).items():
            generator = torch.Generator().manual_seed(97 * seed + 2 * index + (factor == "A"))
            raw = site.raw(factor)
            raw.grad = torch.zeros_like(raw)
            rows, columns = value.shape
            raw.grad[:rows, :columns] = torch.randn(value.shape, generator=generator)


def pair(name: str) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """One adapter twice, of true ranks and of fixed shapes, some equal steps into training."""
    both = []
    for fixed in (False, True):
        model, _ = trained(steps=2)
        if fixed:
            reserve_ranks(model, dict.fromkeys(sites(model), 9))
        optimizer = OPTIMIZERS[name](trainable(model))
        for seed in range(3):
            gradients(model, seed)
            optimizer.step()
        optimizer.zero_grad()
        both.append((model, optimizer))
    return both[0], both[1]


def check_equal(true: Any, fixed: Any) -> None:
    mine, other = sites(true), sites(fixed)
    assert mine.keys() == other.keys()
    for name, site in mine.items():
        assert other[name].rank == site.rank
        assert same(used(other[name]), used(site)), name


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_fixed_shapes_follow_true_resizing_bitwise(name: str, kind: str) -> None:
    (true, optimizer), (fixed, other) = pair(name)
    check_equal(true, fixed)
    objects = [id(p) for p in fixed.parameters()]
    for model, made in ((true, optimizer), (fixed, other)):
        edits = {n: EDITS[kind](i, site) for i, (n, site) in enumerate(sites(model).items())}
        report = gr.edit(model, edits, made, seed=3)
        assert report.reset == ()
    assert [id(p) for p in fixed.parameters()] == objects
    check_equal(true, fixed)
    assert distance(logits(fixed), logits(true)) < 1e-6
    for seed in (10, 11):
        for model, made in ((true, optimizer), (fixed, other)):
            gradients(model, seed)
            made.step()
            made.zero_grad()
        check_equal(true, fixed)
    assert torch.equal(logits(reloaded(fixed, LLAMA)), logits(reloaded(true, LLAMA)))
    settle(fixed)
    check_equal(true, fixed)
    assert torch.equal(logits(fixed), logits(true))
    for key in ("r", "lora_alpha", "scaling"):
        for layer, twin in zip(layers(true).values(), layers(fixed).values(), strict=True):
            assert getattr(layer, key) == getattr(twin, key)
    config, twin = (m.peft_config["default"].to_dict() for m in (true, fixed))
    assert config == twin


def test_real_steps_agree_too() -> None:
    (true, optimizer), (fixed, other) = pair("adamw")
    for model, made in ((true, optimizer), (fixed, other)):
        edits = {n: EDITS["mixed"](i, s) for i, (n, s) in enumerate(sites(model).items())}
        gr.edit(model, edits, made)
        train(model, made, LLAMA, 3)
    for name, site in sites(true).items():
        for factor, value in used(site).items():
            assert distance(value, used(sites(fixed)[name])[factor]) < 1e-4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dormant_components_rest(name: str) -> None:
    model, _ = trained()
    reserve_ranks(model, dict.fromkeys(sites(model), 9))
    optimizer = OPTIMIZERS[name](trainable(model))
    train(model, optimizer, LLAMA, 2)
    gr.edit(model, {n: gr.Shrink(2) for n in sites(model)}, optimizer)
    train(model, optimizer, LLAMA, 2)
    for site in sites(model).values():
        assert not site.raw("A").detach()[2:].any()
        assert not site.raw("B").detach()[:, 2:].any()
        for factor, axis in (("A", 0), ("B", 1)):
            raw = site.raw(factor)
            for value in optimizer.state[raw].values():
                if isinstance(value, Tensor) and value.shape == raw.shape:
                    assert not value.narrow(axis, 2, 7).any()


def test_reserving_leaves_the_logits_bitwise(case: Case) -> None:
    model, _ = trained(case)
    before = logits(model, case)
    patterns = model.peft_config["default"].to_dict()
    state = torch.get_rng_state()
    reserve_ranks(model, {n: 4 + i % 4 for i, n in enumerate(sites(model)) if n != "classifier"})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model, case), before)
    assert model.peft_config["default"].to_dict() == patterns | {
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    assert all(site.rank == 4 and site.masked for site in sites(model).values())
    assert torch.equal(logits(reloaded(model, case), case), before)


def test_a_save_under_a_mask_loads_in_stock_peft(case: Case) -> None:
    model, _ = trained(case, use_rslora=True)
    names = [n for n in sites(model) if n != "classifier"]
    reserve_ranks(model, dict.fromkeys(names, 7))
    optimizer = torch.optim.AdamW(trainable(model), LR)
    train(model, optimizer, case, 2)
    kinds = (gr.Shrink(2), gr.Grow(6), gr.Shrink(1, "norm"), gr.Grow(5))
    gr.edit(model, {n: kinds[i % 4] for i, n in enumerate(names)}, optimizer)
    train(model, optimizer, case, 1)
    found = reloaded(model, case)
    size = float(logits(model, case).abs().max())
    assert distance(logits(found, case), logits(model, case)) < 1e-6 * max(size, 1)
    settle(model)
    assert torch.equal(logits(found, case), logits(model, case))
    assert [layer.r for layer in layers(found).values()] == [
        layer.r for layer in layers(model).values()
    ]


def test_settling_then_training_goes_on() -> None:
    model, _ = trained(lora_alpha=7.3)
    scaling = {n: dict(layer.scaling) for n, layer in layers(model).items()}
    reserve_ranks(model, dict.fromkeys(sites(model), 9))
    optimizer = torch.optim.AdamW(trainable(model), LR)
    train(model, optimizer, LLAMA, 2)
    ranks = {n: 1 + i % 9 for i, n in enumerate(sites(model))}
    edits = {n: gr.Shrink(r) if r < 4 else gr.Grow(r) for n, r in ranks.items()}
    gr.edit(model, edits, optimizer)
    before = logits(model)
    assert dict(settle(model)) == ranks
    assert distance(logits(model), before) < 1e-6
    assert not any(site.masked for site in sites(model).values())
    assert {n: site.raw("A").shape[0] for n, site in sites(model).items()} == ranks
    assert {n: dict(layer.scaling) for n, layer in layers(model).items()} == scaling
    for layer in layers(model).values():
        alpha, rank = layer.lora_alpha["default"], layer.r["default"]
        assert alpha / rank == pytest.approx(layer.scaling["default"], rel=3e-16)
    fresh = torch.optim.AdamW(trainable(model), LR)
    train(model, fresh, LLAMA, 2)
    gr.edit(model, {n: gr.Grow(10) for n in ranks}, fresh)
    train(model, fresh, LLAMA, 2)
    assert torch.equal(logits(reloaded(model, LLAMA)), logits(model))


def test_settling_a_plain_model_changes_nothing() -> None:
    model, optimizer = trained(rank_pattern={"q_proj": 3})
    before = everything(model, optimizer)
    assert set(settle(model).values()) == {3, 4}
    assert same(everything(model, optimizer), before)


def test_settling_a_merged_model_is_refused_whole() -> None:
    model, _ = trained()
    reserve_ranks(model, dict.fromkeys(sites(model), 6))
    last = list(sites(model).values())[-1]
    last.layer.merge()
    before = everything(model)
    with pytest.raises(SurgeryError, match=r"cannot be settled: .* is merged"):
        settle(model)
    assert same(everything(model), before)


def test_reserving_is_refused_whole() -> None:
    model, _ = trained()
    names = list(sites(model))
    before = everything(model)
    with pytest.raises(SurgeryError, match=r"is unknown\. Did you mean"):
        reserve_ranks(model, {names[0]: 8, names[1].replace("proj", "prj"): 8})
    with pytest.raises(SurgeryError, match="above min"):
        reserve_ranks(model, {names[0]: 8, names[1]: 99})
    assert same(everything(model), before)
    dora, _ = trained(use_dora=True, steps=1)
    before = everything(dora)
    with pytest.raises(SurgeryError, match="DoraLinearVariant"):
        reserve_ranks(dora, dict.fromkeys(names, 8))
    assert same(everything(dora), before)


@pytest.mark.parametrize("fixed", [False, True])
def test_refitting_makes_room_for_other_weights(fixed: bool) -> None:
    model, optimizer = trained(rank=6)
    other, _ = trained(rank=6, steps=5)
    names = list(sites(other))
    gr.edit(other, {n: gr.Shrink(1 + i % 6) for i, n in enumerate(names)})
    ranks = {n: site.rank for n, site in sites(other).items()}
    if fixed:
        reserve_ranks(model, dict.fromkeys(names, 8))
        optimizer = None
    else:
        gr.edit(other, {names[0]: gr.Drop()})
        del ranks[names[0]]
    refit(model, ranks, optimizer)
    assert {n: site.rank for n, site in sites(model).items()} == ranks
    assert nn.Module.load_state_dict(model, other.state_dict()).missing_keys == []
    assert distance(logits(model), logits(other)) < 1e-6


def test_refitting_takes_ranks_above_the_width() -> None:
    model, optimizer = trained(rank=40)
    names = list(sites(model))
    refit(model, dict.fromkeys(names, 3), optimizer)
    refit(model, dict.fromkeys(names, 40), optimizer)
    assert all(site.rank == 40 for site in sites(model).values())
    train(model, optimizer, LLAMA)
