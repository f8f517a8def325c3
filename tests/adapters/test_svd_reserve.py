"""From plain factors to the SVD form and back: start, restart, settle, refit, sidecar."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradrank as gr
from adapters.surgery_cases import (
    LR,
    OPTIMIZERS,
    config,
    distance,
    layers,
    logits,
    reloaded,
    same,
    sites,
    train,
    trainable,
    trained,
)
from adapters.svd_cases import LLAMA, WIDE, selections, started, svd_trained, used
from cases import CASES, Case, tiny_llama
from gradrank.adapters import sidecar
from gradrank.adapters.edits import Select
from gradrank.adapters.reserve import refit, restart, settle, start_svd
from gradrank.core.errors import SurgeryError
from gradrank.serving.export import export

FIXED = pytest.mark.parametrize("fixed", [False, True])


def orthonormal(rows: Tensor) -> bool:
    rows = rows.detach()
    return torch.allclose(rows @ rows.T, torch.eye(rows.shape[0]), rtol=0, atol=1e-5)


@FIXED
@pytest.mark.parametrize("steps", [0, 3])
def test_starting_leaves_the_function(case: Case, fixed: bool, steps: int) -> None:
    model, _ = trained(case, steps=steps)
    before = logits(model, case)
    scaling = {n: dict(layer.scaling) for n, layer in layers(model).items()}
    state = torch.get_rng_state()
    ranks = start_svd(model, {n: 4 + i % 4 for i, n in enumerate(sites(model))}, fixed=fixed)
    assert torch.equal(torch.get_rng_state(), state)
    size = max(float(before.abs().max()), 1.0)
    assert distance(logits(model, case), before) < 2e-6 * size
    assert {n: dict(layer.scaling) for n, layer in layers(model).items()} == scaling
    for i, (name, site) in enumerate(sites(model).items()):
        widths = site.raw("A").shape[1], site.raw("B").shape[0]
        assert site.rank == ranks[name] == max(min(4 + i % 4, *widths), 4)
        assert site.form == "svd"
        assert site.masked == fixed
        if site.rank <= min(widths):
            assert orthonormal(site.raw("A"))
            assert orthonormal(site.raw("B").T)
            assert site.raw("lam")[4 if steps else 0 :].count_nonzero() == 0
    found = reloaded(model, case)
    assert distance(logits(found, case), logits(model, case)) == 0
    optimizer = torch.optim.AdamW(trainable(model), LR)
    train(model, optimizer, case, 2)
    assert distance(logits(model, case), before) > 1e-4


def test_every_target_has_its_own_seeded_directions() -> None:
    found = []
    for seed in (1, 1, 2):
        model, _ = trained(steps=0)
        start_svd(model, dict.fromkeys(sites(model), WIDE), seed=seed)
        found.append({n: s.raw("B").detach() for n, s in sites(model).items()})
    assert same(found[0], found[1])
    shapes: dict[Any, list[Tensor]] = {}
    for name, value in found[0].items():
        assert not torch.equal(value, found[2][name])
        assert not any(torch.equal(value, other) for other in shapes.get(value.shape, []))
        shapes.setdefault(value.shape, []).append(value)


def test_ranks_are_cut_off_at_the_widths_but_present_ones_stay() -> None:
    model, _ = trained(rank=20, steps=2)
    before = logits(model)
    ranks = start_svd(model, dict.fromkeys(sites(model), 99))
    widths = {n: min(s.raw("A").shape[1], s.raw("B").shape[0]) for n, s in sites(model).items()}
    assert 16 in widths.values()
    assert ranks == {n: max(20, width) for n, width in widths.items()}
    assert distance(logits(model), before) < 1e-6
    for name, site in sites(model).items():
        assert (widths[name] == 16) == bool((site.raw("lam") == 1).all())
    some, _ = trained()
    first = next(iter(sites(some)))
    assert set(start_svd(some, {first: 9}).items()) >= {(first, 9)}
    assert all(site.form == "svd" for site in sites(some).values())
    assert [site.rank for site in sites(some).values()] == [9] + [4] * (len(sites(some)) - 1)


@FIXED
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restarting_begins_afresh_with_the_components_in_use(name: str, fixed: bool) -> None:
    model, optimizer = svd_trained(fixed, name)
    chosen = selections(model, least=0 if fixed else 1)
    gr.edit(model, {n: Select(kept) for n, kept in chosen.items()}, optimizer)
    train(model, optimizer, LLAMA, 1)
    twin = copy.deepcopy(model)
    objects = [id(p) for p in model.parameters()]
    rng = torch.get_rng_state()
    restart(model, optimizer, seed=5)
    assert torch.equal(torch.get_rng_state(), rng)
    assert objects == [id(p) for p in model.parameters()]
    restart(twin, None, seed=5)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(logits(model), base)
    for target, site in sites(model).items():
        found = used(site)
        assert same(found, used(sites(twin)[target]))
        assert site.rank == len(chosen[target])
        assert orthonormal(found["A"])
        assert orthonormal(found["B"].T)
        assert not found["lam"].any()
        for raw in site.learned().values():
            assert raw not in optimizer.state
            if fixed and raw.dim() == 2:
                axis = 0 if raw is site.raw("A") else 1
                assert not raw.narrow(axis, site.rank, WIDE - site.rank).any()
    # From here on it is a run that a new optimizer began.
    fresh = OPTIMIZERS[name](trainable(twin))
    train(model, optimizer, LLAMA, 2)
    train(twin, fresh, LLAMA, 2)
    for target, site in sites(model).items():
        assert same(used(site), used(sites(twin)[target]))


@FIXED
def test_settling_gives_plain_factors_of_the_ranks_in_use(case: Case, fixed: bool) -> None:
    model, optimizer = svd_trained(fixed, case=case, use_rslora=True, lora_alpha=7.3)
    chosen = selections(model, least=0 if fixed else 1)
    gr.edit(model, {n: Select(kept) for n, kept in chosen.items()}, optimizer)
    train(model, optimizer, case, 1)
    before = logits(model, case)
    scaling = {n: s.scaling for n, s in sites(model).items()}
    products = {n: used(s)["B"] * used(s)["lam"] for n, s in sites(model).items()}
    stored = reloaded(model, case)
    ranks = settle(model)
    assert dict(ranks) == {n: len(kept) for n, kept in chosen.items()}
    kept = [n for n in ranks if ranks[n]]
    assert list(sites(model)) == kept
    assert any(not rank for rank in ranks.values()) == fixed
    for name, site in sites(model).items():
        assert site.form == "plain"
        assert site.scaling == scaling[name]
        assert torch.equal(site.raw("B"), products[name])
        assert site.layer.r["default"] == ranks[name]
    size = max(float(before.abs().max()), 1.0)
    assert distance(logits(model, case), before) < 1e-6 * size
    assert distance(logits(stored, case), logits(model, case)) < 1e-6 * size
    after = reloaded(model, case)
    assert torch.equal(logits(after, case), logits(model, case))
    assert {n: s.rank for n, s in sites(after).items()} == {n: ranks[n] for n in kept}
    fresh = torch.optim.AdamW(trainable(model), LR)
    train(model, fresh, case, 1)
    gr.edit(model, {kept[0]: gr.Grow(5)} if ranks[kept[0]] < 5 else {}, fresh)
    start_svd(model, {})  # a second phase


def test_settling_leaves_plain_layers_alone() -> None:
    model, _ = trained(rank_pattern={"q_proj": 3})
    objects = [id(p) for p in model.parameters()]
    assert set(settle(model).values()) == {3, 4}
    assert objects == [id(p) for p in model.parameters()]


@FIXED
@pytest.mark.parametrize("back", [False, True])
def test_refitting_makes_room_in_both_directions(fixed: bool, back: bool) -> None:
    model, optimizer = svd_trained(fixed, "adam")
    other, second = svd_trained(fixed, "adam", steps=5)
    chosen = selections(other, least=0 if fixed else 1)
    gr.edit(other, {n: Select(kept) for n, kept in chosen.items()}, second)
    if back:
        model, optimizer, other = other, second, model
    ranks = {n: site.rank for n, site in sites(other).items()}
    missing = {n: rank for n, rank in ranks.items() if rank}
    refit(model, missing if fixed else ranks, optimizer)
    assert {n: site.rank for n, site in sites(model).items()} == ranks
    tensors = sidecar.formed_tensors(other, "default")
    sidecar.load_formed(model, "default", tensors)
    assert torch.equal(logits(model), logits(other))
    train(model, optimizer, LLAMA, 2)


def test_refitting_drops_at_real_shapes_and_nothing_comes_back() -> None:
    model, optimizer = svd_trained()
    names = list(sites(model))
    refit(model, dict.fromkeys(names[2:], 3) | {names[1]: 0}, optimizer)
    assert list(sites(model)) == names[2:]
    with pytest.raises(SurgeryError, match=rf"2 target\(s\) .*'{names[0]}'.*cannot come back"):
        refit(model, dict.fromkeys(names, 3), optimizer)


@FIXED
def test_the_sidecar_carries_on_where_the_checkpoint_was(fixed: bool, tmp_path: Path) -> None:
    model, optimizer = svd_trained(fixed, "adam")
    chosen = selections(model, least=0 if fixed else 1)
    gr.edit(model, {n: Select(kept) for n, kept in chosen.items()}, optimizer)
    train(model, optimizer, LLAMA, 2)
    tensors = sidecar.formed_tensors(model, "default")
    names = {"Q", "P", "lam"} | ({"active"} if fixed else set())
    assert {key.rpartition("/")[2] for key in tensors} == names
    sidecar.write(tmp_path / sidecar.FILE, {}, tensors)
    model.save_pretrained(tmp_path)
    stored = sidecar.stored_ranks(tmp_path)
    assert stored == {n: max(len(kept), 1) for n, kept in chosen.items()}
    state = copy.deepcopy(optimizer.state_dict())

    resumed = started(fixed)
    again = torch.optim.Adam(trainable(resumed), LR)
    refit(resumed, stored, again)
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)
    sidecar.load_formed(resumed, "default", sidecar.read(tmp_path / sidecar.FILE)[1])
    again.load_state_dict(state)
    assert torch.equal(logits(resumed), logits(model))
    for each, made in ((model, optimizer), (resumed, again)):
        train(each, made, LLAMA, 3, seed=8)
    assert torch.equal(logits(resumed), logits(model))
    for name, site in sites(model).items():
        assert same(used(site), used(sites(resumed)[name]))


def test_a_sidecar_of_plain_layers_is_empty() -> None:
    model, _ = trained(steps=1)
    assert sidecar.formed_tensors(model, "default") == {}
    sidecar.load_formed(model, "default", {})


@FIXED
def test_pruned_adapters_save_merge_copy_and_export(fixed: bool, tmp_path: Path) -> None:
    model, optimizer = svd_trained(fixed)
    chosen = selections(model, least=0 if fixed else 1)
    gr.edit(model, {n: Select(kept) for n, kept in chosen.items()}, optimizer)
    train(model, optimizer, LLAMA, 1)
    before = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    names = list(sites(model))
    with torch.no_grad():
        sites(twin)[names[0]].raw("lam").zero_()
    gr.edit(twin, {names[0]: gr.Grow(5)})
    assert torch.equal(logits(model), before), "the copy is its own"
    found = reloaded(model, LLAMA)
    assert distance(logits(found), before) < (1e-6 if fixed else 1e-30)
    assert {n: s.rank for n, s in sites(found).items()} == {
        n: max(len(kept), 1) for n, kept in chosen.items()
    }
    settings = found.peft_config["default"]
    assert settings.rank_pattern
    assert all(pattern.startswith("^") for pattern in settings.rank_pattern)
    assert {n: s.scaling for n, s in sites(found).items()} == {
        n: s.scaling for n, s in sites(model).items()
    }
    model.merge_adapter()
    assert distance(logits(model), before) < 2e-6
    model.unmerge_adapter()
    assert distance(logits(model), before) < 2e-6
    assert export(model, tmp_path / "merged", "merged").difference < 1e-5
    if not fixed:
        assert export(model, tmp_path / "peft").difference == 0


def test_a_second_adapter_is_left_alone() -> None:
    model, _ = trained(steps=1)
    model.add_adapter("second", config(LLAMA, 3))
    start_svd(model, dict.fromkeys(sites(model), WIDE), adapter="default")
    optimizer = torch.optim.AdamW(trainable(model), LR)
    train(model, optimizer, LLAMA)
    gr.edit(model, {n: Select((1, 0)) for n in sites(model)}, optimizer, adapter="default")
    assert {s.rank for s in sites(model, "second").values()} == {3}
    assert {s.form for s in sites(model, "second").values()} == {"plain"}
    assert {s.rank for s in sites(model).values()} == {2}


@FIXED
def test_bfloat16_adapters_prune_too(fixed: bool) -> None:
    torch.manual_seed(5)
    model: Any = gr.apply(
        gr.plan(tiny_llama(), [], method="uniform", budget="uniform:4"), tiny_llama()
    )
    model = model.to(torch.bfloat16)
    start_svd(model, dict.fromkeys(sites(model), WIDE), fixed=fixed)
    optimizer = torch.optim.AdamW(trainable(model), LR)
    train(model, optimizer, CASES["llama"], 2)
    gr.edit(model, {n: Select((4, 0)) for n in sites(model)}, optimizer)
    gr.edit(model, {n: gr.Grow(5) for n in sites(model)}, optimizer)
    assert all(
        p.dtype == torch.bfloat16 for s in sites(model).values() for p in s.learned().values()
    )
    train(model, optimizer, CASES["llama"], 2)
    assert isinstance(model, nn.Module)
    assert all(torch.isfinite(p).all() for p in trainable(model))
