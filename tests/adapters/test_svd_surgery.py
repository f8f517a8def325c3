"""Components of the SVD form are removed and added for real: factors, moments, configuration."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import gradrank as gr
from adapters.surgery_cases import (
    LR,
    OPTIMIZERS,
    built_that_way,
    distance,
    everything,
    logits,
    reloaded,
    same,
    sites,
    step_of,
    train,
    trainable,
    trained,
)
from adapters.svd_cases import LLAMA, WIDE, gradients, selections, started, svd_trained, used
from adapters.test_optimizers import ALL, BLOCKWISE, ELEMENTWISE
from gradrank.adapters.blockwise import _dequantised
from gradrank.adapters.edits import Select
from gradrank.adapters.reserve import reserve_ranks, start_svd
from gradrank.adapters.surgery import parameters_in_use
from gradrank.adapters.swap import AXIS
from oracles.components import masked_run, update_of_kept, update_with_lam_left_behind


def update(site: Any) -> Tensor:
    return site.linear("B").weight.detach() @ site.linear("A").weight.detach()


STATISTICS = ("row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col", "absmax1", "absmax2")


def moments(optimizer: Any, raw: Tensor) -> dict[str, Tensor]:
    """What has the shape of the parameter, and not by chance; 8-bit states dequantised."""
    state = optimizer.state[raw]
    found = {}
    for key, value in state.items():
        shaped = isinstance(value, Tensor) and value.shape[-raw.dim() :] == raw.shape
        if shaped and key not in STATISTICS:
            eight = value.dtype == torch.uint8
            found[key] = _dequantised(state, int(key[-1]), raw.dim()) if eight else value.clone()
    return found


def taken(tensor: Tensor, kept: Sequence[int], axis: int) -> Tensor:
    return tensor.index_select(axis, torch.tensor(kept, dtype=torch.long))


@pytest.mark.parametrize("fixed", [False, True])
def test_selecting_is_slicing(fixed: bool) -> None:
    model, optimizer = svd_trained(fixed)
    chosen = selections(model, least=0 if fixed else 1)
    before = {n: {f: t.clone() for f, t in used(s).items()} for n, s in sites(model).items()}
    size = parameters_in_use(sites(model))
    report = gr.edit(model, {n: Select(kept) for n, kept in chosen.items()}, optimizer)
    assert report.reset == ()
    assert report.moved == 0
    assert dict(report.ranks) == {n: (WIDE, len(kept)) for n, kept in chosen.items()}
    assert report.parameters == (size, parameters_in_use(sites(model)))
    differs = 0.0
    for name, site in sites(model).items():
        kept, old = chosen[name], before[name]
        assert site.rank == len(kept)
        for factor, value in used(site).items():
            assert torch.equal(value, taken(old[factor], kept, AXIS[factor]))
        factors = (old["B"], old["lam"], old["A"])
        assert distance(update(site), update_of_kept(*factors, kept)) < 1e-6
        wrong = update_with_lam_left_behind(*factors, kept)
        differs = max(differs, distance(update(site), wrong))
    assert differs > 1e-3, "the comparison sees a lam that was left behind"
    if not fixed:
        assert {n: site.raw("lam").shape for n, site in sites(model).items()} == {
            n: (len(kept),) for n, kept in chosen.items()
        }
    train(model, optimizer, LLAMA, 2)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("form", ["plain", "mask"])
def test_selecting_works_on_the_other_forms(form: str, fixed: bool) -> None:
    model, optimizer = trained(rank=WIDE)
    if form == "mask":
        reserve_ranks(model, dict.fromkeys(sites(model), 8))
        optimizer = torch.optim.AdamW(trainable(model), LR)
        train(model, optimizer, LLAMA, 2)
    before = {n: {f: t.clone() for f, t in used(s).items()} for n, s in sites(model).items()}
    state = {n: moments(optimizer, s.raw("B")) for n, s in sites(model).items()}
    chosen = selections(model)
    assert gr.edit(model, {n: Select(k) for n, k in chosen.items()}, optimizer).reset == ()
    for name, site in sites(model).items():
        for factor, value in used(site).items():
            assert torch.equal(value, taken(before[name][factor], chosen[name], AXIS[factor]))
        for key, value in moments(optimizer, site.raw("B")).items():
            kept = taken(state[name][key], chosen[name], 1)
            assert torch.equal(value[:, : site.rank], kept)
    assert distance(logits(reloaded(model, LLAMA)), logits(model)) < 1e-6


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_moments_follow_in_every_factor(name: str, fixed: bool) -> None:
    model, optimizer = svd_trained(fixed, lambda params: ALL[name]([{"params": params}]))
    assert {id(p) for s in sites(model).values() for p in s.learned().values()} == {
        id(p) for g in optimizer.param_groups for p in g["params"]
    }
    chosen = selections(model)
    old = {
        (n, f): moments(optimizer, raw)
        for n, s in sites(model).items()
        for f, raw in s.learned().items()
    }
    assert gr.edit(model, {n: Select(k) for n, k in chosen.items()}, optimizer).reset == ()
    for target, site in sites(model).items():
        for factor, raw in site.learned().items():
            found, axis = moments(optimizer, raw), AXIS[factor]
            assert found.keys() == old[target, factor].keys()
            for key, value in found.items():
                before = old[target, factor][key]
                lead = before.dim() - raw.dim()
                wanted = taken(before, chosen[target], axis + lead)
                part = value.narrow(axis + lead, 0, site.rank)
                if name in ELEMENTWISE or (factor == "lam" and name not in BLOCKWISE):
                    assert torch.equal(part, wanted), key
                else:  # quantised again, in other blocks
                    assert distance(part, wanted) <= 0.05 * float(before.abs().max()), key
    train(model, optimizer, LLAMA, 2)
    assert all(torch.isfinite(p).all() for p in trainable(model))


@pytest.mark.parametrize("kind", ["select", "norm", "grow", "mixed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_after_an_edit_is_that_of_parameters_made_that_way(name: str, kind: str) -> None:
    model, optimizer = svd_trained(optimizer=name)
    gr.edit(model, edits_of(model, kind), optimizer)
    twin = {f"{n}/{f}": nn.Parameter(raw.detach().clone()) for n, f, raw in learned(model)}
    made = OPTIMIZERS[name](list(twin.values()))
    for n, f, raw in learned(model):
        if raw in optimizer.state:
            made.state[twin[f"{n}/{f}"]] = {
                k: v.clone() if isinstance(v, Tensor) else v
                for k, v in optimizer.state[raw].items()
            }
    gradients(model, 3)
    for n, f, raw in learned(model):
        assert raw.grad is not None
        twin[f"{n}/{f}"].grad = raw.grad.clone()
    optimizer.step()
    made.step()
    assert all(torch.equal(raw, twin[f"{n}/{f}"]) for n, f, raw in learned(model))
    assert len(twin) == sum(len(g["params"]) for g in optimizer.param_groups)
    assert len(optimizer.state) <= len(twin)


def learned(model: Any) -> list[tuple[str, str, nn.Parameter]]:
    return [(n, f, raw) for n, s in sites(model).items() for f, raw in s.learned().items()]


def edits_of(model: Any, kind: str) -> dict[str, Any]:
    chosen = selections(model)
    made: dict[str, list[Any]] = {
        "norm": [gr.Shrink(2, "norm"), gr.Shrink(5, "norm")],
        "grow": [gr.Grow(8), gr.Grow(7)],
        "mixed": [gr.Grow(9), gr.Shrink(1, "norm"), gr.Drop(), gr.Grow(7)],
    }
    if kind == "select":
        return {n: Select(kept) for n, kept in chosen.items()}
    return {n: made[kind][i % len(made[kind])] for i, n in enumerate(sites(model))}


@pytest.mark.parametrize("name", ["adamw", "adam", "momentum"])
def test_fixed_shapes_follow_true_resizing_bitwise(name: str) -> None:
    pair = []
    for fixed in (False, True):
        model = started(fixed, rank=8)
        optimizer = OPTIMIZERS[name](trainable(model))
        for seed in range(3):
            gradients(model, seed)
            optimizer.step()
        pair.append((model, optimizer))
    (true, first), (held, second) = pair
    objects = [id(p) for p in held.parameters()]
    rounds: list[dict[str, Any]] = [
        {n: Select((5, 0, 3)[: 1 + i % 3]) for i, n in enumerate(sites(true))},
        {n: gr.Grow(5 + i % 3) for i, n in enumerate(sites(true))},
        {n: gr.Shrink(2 + i % 3, "norm") for i, n in enumerate(sites(true))},
    ]
    for number, edits in enumerate(rounds):
        for model, optimizer in pair:
            assert gr.edit(model, edits, optimizer, seed=number).reset == ()
            for seed in (10 + number, 20 + number):
                gradients(model, seed)
                optimizer.step()
        for target, site in sites(true).items():
            assert same(used(sites(held)[target]), used(site)), (number, target)
            for factor in site.factors:
                mine = moments(first, site.raw(factor))
                for key, value in moments(second, sites(held)[target].raw(factor)).items():
                    axis = AXIS[factor]
                    assert torch.equal(value.narrow(axis, 0, site.rank), mine[key])
                    rest = value.narrow(axis, site.rank, 8 - site.rank)
                    assert not rest.any(), "dormant moments rest"
    assert [id(p) for p in held.parameters()] == objects
    assert distance(logits(held), logits(true)) < 1e-6
    assert true.peft_config["default"].to_dict() == held.peft_config["default"].to_dict()
    assert torch.equal(logits(reloaded(held, LLAMA)), logits(reloaded(true, LLAMA)))


def test_real_steps_at_fixed_shapes_agree_too() -> None:
    found = []
    for fixed in (False, True):
        model, optimizer = svd_trained(fixed, "adam", steps=2)
        gr.edit(model, {n: Select(k) for n, k in selections(model).items()}, optimizer)
        train(model, optimizer, LLAMA, 3)
        found.append(model)
    for name, site in sites(found[0]).items():
        for factor, value in used(site).items():
            assert distance(value, used(sites(found[1])[name])[factor]) < 1e-4


@pytest.mark.parametrize("fixed", [False, True])
@given(seed=st.integers(0, 30), after=st.integers(1, 4))
def test_pruning_for_real_is_a_run_under_a_mask(fixed: bool, seed: int, after: int) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=5, lora_alpha=10, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(nn.Linear(9, 8, bias=False)), config).double()
    site = sites(model)["0"]
    nn.init.normal_(site.raw("B"), std=0.3)
    start_svd(model, {"0": 5}, fixed=fixed)
    start = tuple(site.raw(f).detach().clone() for f in ("B", "lam", "A"))
    generator = torch.Generator().manual_seed(seed)
    data = [
        tuple(torch.randn(6, d, generator=generator, dtype=torch.float64) for d in (9, 8))
        for _ in range(7)
    ]
    kept = torch.randperm(5, generator=generator)[: 1 + seed % 4].tolist()
    optimizer = torch.optim.Adam(trainable(model), LR)
    for step, (x, y) in enumerate(data):
        if step == after:
            gr.edit(model, {"0": Select(tuple(kept))}, optimizer)
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
    W = site.layer.base_layer.weight.detach()
    wanted = masked_run(data, W, site.scaling, start, kept, after, LR)  # type: ignore[arg-type]
    broken = masked_run(data, W, site.scaling, start, kept, after, LR, forget=True)  # type: ignore[arg-type]
    found = used(site)
    for factor, full, axis in zip(("B", "lam", "A"), wanted, (1, 0, 0), strict=True):
        assert distance(found[factor], taken(full, kept, axis)) < 1e-12
    assert distance(found["lam"], taken(broken[1], kept, 0)) > 1e-9


@pytest.mark.parametrize("fixed", [False, True])
def test_growing_leaves_the_function_and_gives_orthogonal_directions(fixed: bool) -> None:
    model, optimizer = svd_trained(fixed, rank=10)
    names = list(sites(model))
    gr.edit(model, {n: Select((0, 3)) for n in names}, optimizer)
    before = logits(model)
    report = gr.edit(model, {n: gr.Grow(7) for n in names}, optimizer, seed=3)
    assert distance(logits(model), before) < (1e-6 if fixed else 2e-6)
    assert report.moved == 5 * sum(
        s.raw("A").shape[1] + s.raw("B").shape[0] for s in sites(model).values()
    )
    for site in sites(model).values():
        found = used(site)
        assert not found["lam"][2:].any()
        for rows in (found["A"].double(), found["B"].T.double()):
            gram = rows[2:] @ rows.T
            size = rows[:2].norm() / 2**0.5
            assert distance(gram[:, :2], torch.zeros(5, 2)) < 1e-5
            assert distance(gram[:, 2:], size**2 * torch.eye(5)) < 1e-5
        assert (moments(optimizer, site.raw("lam"))["exp_avg_sq"][: site.rank] > 0).all()
    train(model, optimizer, LLAMA, 2)
    assert all(used(site)["lam"][2:].any() for site in sites(model).values())


def test_a_target_that_was_switched_off_can_grow_again() -> None:
    model, optimizer = svd_trained(fixed=True)
    names = list(sites(model))
    gr.edit(model, {n: Select(()) for n in names[::2]}, optimizer)
    assert [site.rank for site in sites(model).values()][:4] == [0, WIDE, 0, WIDE]
    for name in names[::2]:
        for raw in sites(model)[name].learned().values():
            assert not raw.any()
            assert raw not in optimizer.state
    train(model, optimizer, LLAMA, 2)
    for name in names[::2]:
        assert not any(raw.any() for raw in sites(model)[name].learned().values())
    before = logits(model)
    gr.edit(model, {n: gr.Grow(3) for n in names[::2]}, optimizer)
    assert torch.equal(logits(model), before)
    for name in names[::2]:
        found = used(sites(model)[name])
        for rows in (found["A"], found["B"].T):
            assert distance(rows @ rows.T, torch.eye(3)) < 1e-6
    train(model, optimizer, LLAMA, 2)
    assert all(used(sites(model)[name])["lam"].all() for name in names[::2])


def test_shrinking_by_norm_weighs_all_three_factors() -> None:
    model = started()
    site = next(iter(sites(model).values()))
    with torch.no_grad():
        for factor, axis in (("A", 1), ("B", 0)):
            raw = site.raw(factor)
            raw.div_(raw.norm(dim=axis, keepdim=True))
        site.raw("A")[1] *= 5
        site.raw("B")[:, 2] *= 7
        site.raw("lam").copy_(torch.tensor([4.0, -1.0, 1.0, -6.0, 0.1, 2.0]))
    rows = site.raw("A").detach().clone()
    gr.edit(model, {site.name: gr.Shrink(3, "norm")})  # weights 4, 5, 7, 6, 0.1, 2
    assert torch.equal(site.raw("A"), rows[[1, 2, 3]])
    assert site.raw("lam").tolist() == [-1, 1, -6]


def test_dropping_takes_all_three_parameters_out() -> None:
    model, optimizer = svd_trained()
    names = list(sites(model))
    gone = [id(p) for p in sites(model)[names[1]].learned().values()]
    count = sum(len(g["params"]) for g in optimizer.param_groups)
    gr.edit(model, {names[1]: gr.Drop()}, optimizer)
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert len(held) == count - 3
    assert not set(gone) & set(held)
    assert not {id(p) for p in optimizer.state} & set(gone)
    assert names[1] not in sites(model)
    assert distance(logits(reloaded(model, LLAMA)), logits(model)) < 1e-6
    train(model, optimizer, LLAMA)


def test_selecting_everything_touches_nothing() -> None:
    model, optimizer = svd_trained()
    before = everything(model, optimizer)
    gr.edit(model, {n: Select(tuple(range(WIDE))) for n in sites(model)}, optimizer)
    gr.edit(model, {n: gr.Shrink(WIDE) for n in sites(model)}, optimizer)
    assert same(everything(model, optimizer), before)


def test_an_order_alone_is_an_edit_and_leaves_the_function() -> None:
    model, optimizer = svd_trained()
    before = logits(model)
    gr.edit(model, {n: Select((5, 0, 4, 1, 3, 2)) for n in sites(model)}, optimizer)
    assert distance(logits(model), before) < 1e-6
    wrong, other = svd_trained()
    gr.edit(wrong, {n: Select((5, 0, 4, 1, 3)) for n in sites(wrong)}, other)
    assert distance(logits(wrong), before) > 1e-6


def test_an_optimizer_keeps_its_groups_and_places() -> None:
    model = started()
    pairs = [
        [p for n, p in model.named_parameters() if p.requires_grad and ("lam" in n) is lam]
        for lam in (True, False)
    ]
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": LR * (1 + i)} for i, group in enumerate(pairs)]
    )
    train(model, optimizer, LLAMA, 2)
    gr.edit(model, {n: Select((1, 2)) for n in sites(model)}, optimizer)
    lams, rest = (group["params"] for group in optimizer.param_groups)
    assert [id(p) for p in lams] == [id(s.raw("lam")) for s in sites(model).values()]
    assert all(p.dim() == 1 and p.shape == (2,) for p in lams)
    assert len(rest) == 2 * len(lams)
    size = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert size == parameters_in_use(sites(model)) + 2 * len(lams)
    assert size == sum(p.numel() for p in trainable(model))


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_frozen_factors_stay_frozen(name: str) -> None:
    model = started()
    for site in sites(model).values():
        site.raw("lam").requires_grad_(False)
    optimizer = OPTIMIZERS[name](trainable(model))
    train(model, optimizer, LLAMA)
    gr.edit(model, {n: Select((1, 2)) for n in sites(model)}, optimizer)
    assert not any(site.raw("lam").requires_grad for site in sites(model).values())
    train(model, optimizer, LLAMA)


def test_the_same_as_a_stock_model_of_those_ranks_after_settling() -> None:
    model, optimizer = svd_trained()
    gr.edit(model, {n: Select(k) for n, k in selections(model).items()}, optimizer)
    gr.settle(model)
    fresh = torch.optim.AdamW(trainable(model), LR)
    twin, other = built_that_way(model, fresh, LLAMA, "adamw")
    for seed in (3, 4):
        train(twin, other, LLAMA, 1, seed)
        step_of(model, fresh, LLAMA, seed)
    assert distance(logits(twin), logits(model)) < 1e-3
