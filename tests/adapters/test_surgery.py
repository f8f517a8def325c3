"""Edits change what they say and nothing else, and the optimizer goes on as if built that way."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradrank as gr
from adapters.surgery_cases import (
    LR,
    OPTIMIZERS,
    built_that_way,
    distance,
    everything,
    layers,
    logits,
    reloaded,
    same,
    sites,
    step_of,
    train,
    trained,
)
from cases import CASES, Case, batches
from gradrank.core.errors import SurgeryError
from gradrank.ops.moments import Carry
from oracles import lowrank as oracle

LLAMA = CASES["llama"]
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def product(site: Any) -> Tensor:
    return site.raw("B").detach().double() @ site.raw("A").detach().double()


def test_permuting_components_leaves_the_logits(case: Case) -> None:
    model, _ = trained(case)
    before = logits(model, case)
    for site in sites(model).values():
        order = torch.randperm(site.rank)
        with torch.no_grad():
            site.raw("A").copy_(site.raw("A")[order])
            site.raw("B").copy_(site.raw("B")[:, order])
    # A sum in another order: a few units in the last place of the largest logit.
    rounding = 8 * torch.finfo(before.dtype).eps * float(before.abs().max())
    assert distance(logits(model, case), before) < rounding
    with torch.no_grad():
        for site in sites(model).values():  # a broken twin: one factor alone
            site.raw("A").copy_(site.raw("A").flip(0))
    assert distance(logits(model, case), before) > 10 * rounding


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keeping_everything_is_a_bitwise_no_op(name: str) -> None:
    model, optimizer = trained(LLAMA, name, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = everything(model, optimizer)
    ranks = {n: site.rank for n, site in sites(model).items()}
    kinds = (gr.Shrink, lambda rank: gr.Shrink(rank, "norm"), gr.Grow)
    edits = {n: kinds[i % 3](rank) for i, (n, rank) in enumerate(ranks.items())}
    report = gr.edit(model, edits, optimizer)
    assert same(everything(model, optimizer), before)
    assert report.ranks == {n: (rank, rank) for n, rank in ranks.items()}
    assert report.moved == 0
    assert report.parameters[0] == report.parameters[1]
    assert same(everything(model, optimizer), before)
    assert gr.edit(model, {}, optimizer).ranks == {}
    assert same(everything(model, optimizer), before)


def gradient_of(model: Any, name: str, case: Case) -> Tensor:
    """The dense gradient of a target's weight, from its inputs and output gradients."""
    layer = sites(model)[name].layer
    seen: list[Tensor] = []

    def observe(_module: Any, inputs: Any, output: Tensor) -> None:
        seen.append(inputs[0].detach())
        output.register_hook(seen.append)

    hook = layer.register_forward_hook(observe)
    model(**batches(case, 1)[0]).loss.backward()
    model.zero_grad()
    hook.remove()
    return seen[1].flatten(0, 1).double().T @ seen[0].flatten(0, 1).double()


@pytest.mark.parametrize("directions", ["random", "gradient"])
def test_growth_leaves_the_logits(case: Case, directions: str) -> None:
    model, optimizer = trained(case)
    before = logits(model, case)
    edits = {}
    for index, (name, site) in enumerate(sites(model).items()):
        if name == "classifier":  # three outputs: no room for a fifth direction
            continue
        sketch = torch.randn(9, site.raw("A").shape[1]) if directions == "gradient" else None
        edits[name] = gr.Grow(5 + index % 3, sketch)
    state = torch.get_rng_state()
    gr.edit(model, edits, optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    # The products gain exact zeros; a matrix product of another length may round otherwise.
    assert distance(logits(model, case), before) < 1e-6
    for name, site in sites(model).items():
        if name == "classifier":
            continue
        assert site.rank == edits[name].rank
        assert not site.raw("B").detach()[:, 4:].any()
        norms = site.raw("A").detach().norm(dim=1)
        old = norms[:4].square().mean().sqrt()
        torch.testing.assert_close(norms[4:], old.expand_as(norms[4:]))


@pytest.mark.parametrize("name", [Q, DOWN])
def test_new_rows_lie_along_the_gradient(name: str) -> None:
    model, optimizer = trained()
    G = gradient_of(model, name, LLAMA)
    A = sites(model)[name].raw("A").detach().clone()
    gr.edit(model, {name: gr.Grow(7, G.float())}, optimizer)
    rows = sites(model)[name].raw("A").detach()[4:]
    assert oracle.alignment(rows, oracle.outer_directions(G, A, 3)).min() > 1 - 1e-5
    assert oracle.alignment(rows, oracle.plain_directions(G, 3)).min() < 1 - 1e-3


def test_growing_twice_gives_other_rows() -> None:
    model, optimizer = trained()
    gr.edit(model, {Q: gr.Grow(5)}, optimizer)
    gr.edit(model, {Q: gr.Grow(6)}, optimizer)
    rows = sites(model)[Q].raw("A").detach()
    assert int(torch.linalg.matrix_rank(rows.double())) == 6
    assert oracle.alignment(rows[4:5], rows[5:].double())[0] < 0.1


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shrinking_keeps_the_best_approximation(case: Case, rank: int) -> None:
    model, optimizer = trained(case)
    before = {
        n: (site.raw("A").detach(), site.raw("B").detach()) for n, site in sites(model).items()
    }
    gr.edit(model, dict.fromkeys(before, gr.Shrink(rank)), optimizer)
    worse = 0
    for name, site in sites(model).items():
        A, B = before[name]
        whole = B.double() @ A.double()
        size = float(whole.norm())
        best = oracle.best_approximation(A, B, rank)
        assert float((product(site) - best).norm()) < 1e-6 * size
        assert float((product(site) - whole).norm()) == pytest.approx(
            oracle.tail(A, B, rank), abs=1e-6 * size
        )
        worse += float((oracle.first_components(A, B, rank) - best).norm()) > 0.1 * size
    assert worse > len(before) / 2, "a broken twin has to be caught"


def test_a_rank_above_the_width_can_fall_step_by_step() -> None:
    model, optimizer = trained(rank=40)  # the inputs are 32 wide
    before = logits(model)
    whole = product(sites(model)[Q])
    gr.edit(model, {Q: gr.Shrink(38)}, optimizer)
    assert sites(model)[Q].raw("A").shape == (38, 32)
    assert not sites(model)[Q].raw("B").detach()[:, 32:].any()
    torch.testing.assert_close(product(sites(model)[Q]), whole)
    assert distance(logits(model), before) < 1e-6
    gr.edit(model, {Q: gr.Shrink(31)}, optimizer)
    train(model, optimizer, LLAMA)


@pytest.mark.parametrize("rank", [1, 3])
def test_shrinking_by_norm_keeps_components_bitwise(rank: int) -> None:
    model, optimizer = trained()
    old = {n: {f: site.raw(f) for f in "AB"} for n, site in sites(model).items()}
    states = {n: {f: dict(optimizer.state[p]) for f, p in pair.items()} for n, pair in old.items()}
    gr.edit(model, dict.fromkeys(old, gr.Shrink(rank, "norm")), optimizer)
    for name, site in sites(model).items():
        sizes = old[name]["A"].norm(dim=1) * old[name]["B"].norm(dim=0)
        kept = sizes.topk(rank).indices.sort().values
        for factor, axis in (("A", 0), ("B", 1)):
            raw = site.raw(factor)
            assert torch.equal(raw, old[name][factor].index_select(axis, kept))
            for key in ("exp_avg", "exp_avg_sq"):
                wanted = states[name][factor][key].index_select(axis, kept)
                assert torch.equal(optimizer.state[raw][key], wanted)


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_moments_rotate_with_the_gradients(name: str) -> None:
    model, optimizer = trained(LLAMA, name)
    old = {f: sites(model)[Q].raw(f) for f in "AB"}
    held = {f: dict(optimizer.state[p]) for f, p in old.items()}
    gr.edit(model, {Q: gr.Shrink(2)}, optimizer)
    new = {f: sites(model)[Q].raw(f) for f in "AB"}
    # A' = T A and B' = B R; the gradient of A' is R^T grad A, that of B' is grad B T^T.
    T = (new["A"].double() @ torch.linalg.pinv(old["A"].double())).detach()
    R = (torch.linalg.pinv(old["B"].double()) @ new["B"].double()).detach()
    first = "exp_avg" if name == "adamw" else "momentum_buffer"
    wanted = {"A": R.T @ held["A"][first].double(), "B": held["B"][first].double() @ T.T}
    for factor, value in wanted.items():
        found = optimizer.state[new[factor]][first].double()
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
    if name == "adamw":
        squares = {"A": R.T**2 @ held["A"]["exp_avg_sq"].double()}
        squares["B"] = held["B"]["exp_avg_sq"].double() @ T.T**2
        for factor, value in squares.items():
            found = optimizer.state[new[factor]]["exp_avg_sq"].double()
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-3 * float(value.max()))
            assert same(optimizer.state[new[factor]]["step"], held[factor]["step"])


KINDS = {
    "grow": lambda i, _site: gr.Grow(4 + i % 3),
    "sketch": lambda i, site: gr.Grow(5 + i % 2, torch.randn(6, site.raw("A").shape[1])),
    "norm": lambda i, _site: gr.Shrink(1 + i % 4, "norm"),
    "svd": lambda i, _site: gr.Shrink(1 + i % 4),
    "mixed": lambda i, _site: (gr.Drop(), gr.Grow(6), gr.Shrink(2), gr.Shrink(3, "norm"))[i % 4],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_after_surgery_is_that_of_a_model_built_that_way(name: str, kind: str) -> None:
    model, optimizer = trained(LLAMA, name)
    edits = {n: KINDS[kind](i, site) for i, (n, site) in enumerate(sites(model).items())}
    gr.edit(model, edits, optimizer)
    twin, other = built_that_way(model, optimizer, LLAMA, name)
    lost, empty = built_that_way(model, optimizer, LLAMA, name)
    empty.state.clear()
    for seed in (50, 51):
        found, wanted = (step_of(m, o, LLAMA, seed) for m, o in ((model, optimizer), (twin, other)))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(found[key], value), key
    assert not all(torch.equal(v, wanted[k]) for k, v in step_of(lost, empty, LLAMA).items())


@pytest.mark.parametrize("directions", ["random", "gradient"])
def test_the_first_step_of_new_components_is_tame(directions: str) -> None:
    model, optimizer = trained(LLAMA, "adam", steps=30)
    edits = {}
    for name, site in sites(model).items():
        sketch = gradient_of(model, name, LLAMA).float() if directions == "gradient" else None
        edits[name] = gr.Grow(site.rank + 2, sketch)
    gr.edit(model, edits, optimizer)
    train(model, optimizer, LLAMA, 1)
    largest = max(
        float(site.raw("B").detach()[:, 4:].abs().max()) for site in sites(model).values()
    )
    # Never above the bound of a fresh row beside a large step count, (1-b1)/sqrt(1-b2).
    assert 0 < largest < (1.5 if directions == "random" else 3.2) * LR


def test_the_report_counts_parameters() -> None:
    model, optimizer = trained()
    names = list(sites(model))
    cost = {n: sum(site.raw(f).numel() for f in "AB") // 4 for n, site in sites(model).items()}
    edits = {
        names[0]: gr.Grow(6),
        names[1]: gr.Shrink(1),
        names[2]: gr.Drop(),
        names[3]: gr.Grow(4),
    }
    before = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report = gr.edit(model, edits, optimizer)
    after = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.parameters == (before, after)
    assert report.moved == 2 * cost[names[0]]
    assert report.ranks == {names[0]: (4, 6), names[1]: (4, 1), names[2]: (4, 0), names[3]: (4, 4)}
    assert report.reset == ()


@settings(max_examples=25)
@given(data=st.data())
def test_any_sequence_of_edits_keeps_the_books(data: st.DataObject) -> None:
    model, optimizer = trained(steps=1)
    scaling = {n: layer.scaling["default"] for n, layer in layers(model).items()}
    ranks = {n: site.rank for n, site in sites(model).items()}
    for _ in range(data.draw(st.integers(1, 4))):
        chosen = data.draw(st.lists(st.sampled_from(sorted(ranks)), unique=True, max_size=6))
        edits: dict[str, Any] = {}
        for name in chosen:
            rank = data.draw(st.integers(0, 9))
            if rank == 0 and len(ranks) - sum(isinstance(e, gr.Drop) for e in edits.values()) > 1:
                edits[name] = gr.Drop()
            elif rank >= ranks[name]:
                edits[name] = gr.Grow(rank)
            else:
                edits[name] = gr.Shrink(max(rank, 1), data.draw(st.sampled_from(["svd", "norm"])))
        used = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
        report = gr.edit(model, edits, optimizer, seed=data.draw(st.integers(0, 3)))
        for name, edit in edits.items():
            ranks[name] = 0 if isinstance(edit, gr.Drop) else edit.rank
        ranks = {n: rank for n, rank in ranks.items() if rank}
        assert {n: site.rank for n, site in sites(model).items()} == ranks
        now = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
        assert report.parameters == (used, now)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {
            id(p) for group in optimizer.param_groups for p in group["params"]
        }
        assert all(layer.scaling["default"] == scaling[n] for n, layer in layers(model).items())
        train(model, optimizer, LLAMA, 1)
    assert torch.equal(logits(reloaded(model, LLAMA)), logits(model))


def test_an_unknown_state_is_reset_with_a_warning() -> None:
    model, _ = trained()
    optimizer = torch.optim.ASGD([p for p in model.parameters() if p.requires_grad], LR)
    train(model, optimizer, LLAMA)
    with pytest.warns(RuntimeWarning, match="starts afresh") as seen:
        report = gr.edit(model, {Q: gr.Grow(6), DOWN: gr.Shrink(2, "norm")}, optimizer)
    assert set(report.reset) == {Q, DOWN}
    assert "ASGD" in str(seen[0].message)
    assert all(not optimizer.state.get(sites(model)[n].raw("A")) for n in (Q, DOWN))
    train(model, optimizer, LLAMA)


def test_scaling_is_kept_bitwise_for_odd_ranks() -> None:
    model, optimizer = trained(lora_alpha=0.7)
    wanted = 0.7 / 4
    for rank in (5, 7, 3, 1):
        kind = gr.Grow if rank > sites(model)[Q].rank else gr.Shrink
        gr.edit(model, {Q: kind(rank)}, optimizer)
        layer = sites(model)[Q].layer
        assert layer.scaling["default"] == wanted
        assert math.isclose(layer.lora_alpha["default"] / rank, wanted, rel_tol=1e-15)


def test_carries_of_the_wrong_kind_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with a model built that way catches moments that did not follow."""
    model, optimizer = trained()
    wrong = Carry.select
    monkeypatch.setattr(Carry, "select", lambda kept, **k: wrong(list(kept)[::-1], **k))
    old = {f: sites(model)[Q].raw(f) for f in "AB"}
    held = optimizer.state[old["A"]]["exp_avg"]
    gr.edit(model, {Q: gr.Shrink(3, "norm")}, optimizer)
    found = optimizer.state[sites(model)[Q].raw("A")]["exp_avg"]
    kept = (old["A"].norm(dim=1) * old["B"].norm(dim=0)).topk(3).indices.sort().values
    assert not torch.equal(found, held[kept])


def test_an_edit_without_an_optimizer_needs_none() -> None:
    model, _ = trained()
    report = gr.edit(model, {Q: gr.Grow(6), DOWN: gr.Drop()})
    assert report.ranks == {Q: (4, 6), DOWN: (4, 0)}
    with pytest.raises(SurgeryError, match="not in the optimizer"):
        gr.edit(model, {Q: gr.Grow(7)}, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], LR))
