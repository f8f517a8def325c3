"""Compression keeps the most energy that fits, and says what it lost."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import gradrank as gr
from cases import CASES, batches, hand_plan, randomise_adapter, tiny_bert, tiny_llama
from gradrank.core.budget import Budget
from gradrank.serving.adapter import Adapter, Update
from gradrank.serving.check import logits
from gradrank.serving.compression import compress, truncate
from gradrank.serving.energy import energy
from gradrank.serving.installing import install, taken
from oracles import serving as oracle

SHAPES = ((6, 9), (12, 5), (7, 7))
CHEAPEST = 14


def update(name: str, shape: tuple[int, int], rank: int, seed: int = 0, scaling: float = 2.0,
           dtype: torch.dtype = torch.float32) -> Update:  # fmt: skip
    generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, name)))
    d_out, d_in = shape
    a = torch.randn(rank, d_in, generator=generator)
    b = torch.randn(d_out, rank, generator=generator) * 0.6 ** torch.arange(rank)
    return Update(name, a.to(dtype), b.to(dtype), scaling)


def adapter(ranks: tuple[int, ...] = (4, 3, 5), seed: int = 0, **options: Any) -> Adapter:
    return Adapter({
        f"m.{i}": update(f"m.{i}", shape, rank, seed, **options)
        for i, (shape, rank) in enumerate(zip(SHAPES, ranks, strict=True))
    })  # fmt: skip


def kept_energy(whole: Adapter, smaller: Adapter) -> float:
    lost = 0.0
    for name, own in whole.updates.items():
        left = smaller.updates.get(name)
        delta = oracle.product_of(own) - (oracle.product_of(left) if left else 0.0)
        lost += float(delta.square().sum())
    return sum(float(oracle.product_of(u).square().sum()) for u in whole.updates.values()) - lost


# --- the energies ----------------------------------------------------------------------------


@given(seed=st.integers(0, 100), rank=st.integers(1, 11), scaling=st.sampled_from([0.5, -3.0]))
def test_energies_are_those_of_the_dense_product(seed: int, rank: int, scaling: float) -> None:
    own = update("m.0", (6, 9), rank, seed, scaling)
    (found,) = energy(Adapter({"m.0": own})).values()
    wanted = [value for value in oracle.squared_singular_values(own) if value]
    squares = [value**2 for value in found.singular_values]
    assert squares == pytest.approx(wanted, rel=1e-9, abs=1e-12 * wanted[0])
    assert found.energy == pytest.approx(sum(wanted))
    assert found.stable_rank == pytest.approx(sum(wanted) / wanted[0])
    shares = [sum(wanted[: k + 1]) / sum(wanted) for k in range(len(wanted))]
    assert found.effective_rank == 1 + sum(share < 0.9 for share in shares)
    assert found.kept(1) == pytest.approx(shares[0])


def test_padding_and_cancelling_directions_are_no_rank() -> None:
    own = update("m.0", (6, 9), 3)
    twice = Update("m.0", torch.cat([own.a, own.a]), torch.cat([own.b, -own.b], 1), 2.0)
    found = energy(Adapter({"pad": own.padded(5), "zero": twice, "none": replace(own, scaling=0)}))
    assert [len(item.singular_values) for item in found.values()] == [3, 0, 0]
    assert (found["zero"].energy, found["zero"].effective_rank, found["zero"].kept(0)) == (0, 0, 1)


def test_an_update_without_components_has_no_energy() -> None:
    empty = Update("m.0", torch.zeros(0, 9), torch.zeros(6, 0), 2.0)
    assert energy(Adapter({"m.0": empty}))["m.0"].singular_values == ()


def test_an_absurdly_large_update_is_refused() -> None:
    own = update("m.0", (6, 9), 3, dtype=torch.float64)
    huge = replace(own, a=own.a * 1e200, b=own.b * 1e100)
    with pytest.raises(gr.PlanError, match=r"'m.0' is too large to be decomposed"):
        compress(Adapter({"m.0": huge}), 30)


# --- the choice ------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 100),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)),
    budget=st.integers(CHEAPEST + 3, 220),
)
def test_nothing_within_the_budget_keeps_more(
    seed: int, ranks: tuple[int, int, int], budget: int
) -> None:
    whole = adapter(ranks, seed, dtype=torch.float64)
    smaller, losses = compress(whole, budget)
    best = oracle.most_energy(whole, budget)
    assert kept_energy(whole, smaller) == pytest.approx(best, rel=1e-9)
    assert losses.kept * losses.energy == pytest.approx(best, rel=1e-9)
    assert smaller.parameters == losses.parameters_after <= budget
    # No direction that is left out would still have fitted.
    for name, own in whole.updates.items():
        left = smaller.ranks.get(name, 0)
        if left < own.rank:
            assert own.target.cost > budget - smaller.parameters


def test_the_oracle_catches_a_choice_in_proportion() -> None:
    whole = adapter(seed=3)
    half = whole.parameters // 2
    assert oracle.proportional_energy(whole, half) < 0.99 * oracle.most_energy(whole, half)


@given(seed=st.integers(0, 50), budget=st.integers(17, 150), more=st.integers(0, 60))
def test_a_larger_budget_keeps_as_much_or_more(seed: int, budget: int, more: int) -> None:
    whole = adapter(seed=seed)
    little, much = compress(whole, budget)[1], compress(whole, budget + more)[1]
    assert much.kept >= little.kept - 1e-12


@pytest.mark.parametrize("scaling", [0.25, 2.0, -1.5])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_each_update_becomes_the_nearest_of_its_rank(rank: int, scaling: float) -> None:
    whole = adapter(dtype=torch.float64, scaling=scaling)
    smaller, _ = truncate(whole, rank)
    for name, own in smaller.updates.items():
        assert own.rank == rank
        wanted = oracle.truncated(whole.updates[name], rank)
        assert float((own.delta() - wanted).norm()) < 1e-12 * float(wanted.norm())
        broken = oracle.first_components(whole.updates[name], rank)
        if rank < whole.updates[name].rank:
            assert float((own.delta() - broken).norm()) > 1e-3 * float(wanted.norm())
            assert torch.allclose(own.a.norm(dim=1), own.b.norm(dim=0))
            gram = own.a @ own.a.T
            assert float((gram - gram.diag().diag()).abs().max()) < 1e-12


def test_the_greedy_solver_is_named_and_keeps_the_budget() -> None:
    smaller, _ = compress(adapter(), 60, solver="greedy")
    assert smaller.parameters <= 60
    with pytest.raises(gr.OptionError, match="solver 'gready' is unknown"):
        compress(adapter(), 60, solver="gready")


# --- budgets ---------------------------------------------------------------------------------


def test_budgets_in_every_form() -> None:
    whole = adapter()
    limits = {
        form: compress(whole, form, base_parameters=1000)[1].budget
        for form in (60, "60", "uniform:1", Budget.uniform(2), "5%")
    }
    assert list(limits.values()) == [60, 60, 46, 92, 50]
    with pytest.raises(gr.BudgetError, match="needs the size of the base model"):
        compress(whole, "5%")
    with pytest.raises(gr.BudgetError, match="'lots' is not understood"):
        compress(whole, "lots")


def test_a_budget_above_all_loses_nothing_at_all() -> None:
    whole = adapter()
    smaller, losses = compress(whole, 10_000)
    assert losses.kept == 1
    assert not losses.dropped
    assert list(losses.lines()) == [losses.lines()[0]]
    for name, own in whole.updates.items():
        assert torch.equal(smaller.updates[name].a, own.a)
        assert torch.equal(smaller.updates[name].b, own.b)
        assert smaller.updates[name].scaling == own.scaling


def test_components_of_zeros_go_even_when_they_would_fit() -> None:
    whole = adapter()
    padded = whole.with_updates(own.padded(own.rank + 2) for own in whole.updates.values())
    smaller, losses = compress(padded, 10_000)
    assert smaller.ranks == whole.ranks
    assert losses.kept == 1
    for name, own in smaller.updates.items():
        assert torch.allclose(own.delta(), whole.updates[name].delta(), atol=1e-6)


def test_a_budget_below_the_cheapest_direction_is_refused() -> None:
    with pytest.raises(gr.BudgetError, match="13 is below the floor of 14 parameters"):
        compress(adapter(), 13)
    with pytest.raises(gr.BudgetError):
        compress(adapter(), 0)


def test_updates_of_zero_are_refused() -> None:
    whole = adapter()
    zero = whole.with_updates(replace(own, b=0 * own.b) for own in whole.updates.values())
    for shrink in (lambda: compress(zero, 100), lambda: truncate(zero, 1)):
        with pytest.raises(gr.PlanError, match="all updates of the adapter are zero"):
            shrink()


# --- scales and types ------------------------------------------------------------------------


def test_mixed_scales_become_one() -> None:
    mixed = {
        name: replace(own, scaling=scale)
        for (name, own), scale in zip(adapter().updates.items(), (0.5, 8.0, -2.0), strict=True)
    }
    whole = Adapter(mixed)
    for budget in (60, 10_000):
        smaller, losses = compress(whole, budget)
        assert {own.scaling for own in smaller.updates.values()} == {1.0}
        ratio = kept_energy(whole, smaller) / losses.energy
        assert ratio == pytest.approx(losses.kept, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_the_adapter_is_kept(dtype: torch.dtype) -> None:
    whole = adapter(dtype=dtype)
    smaller, losses = compress(whole, 60)
    assert {t.dtype for u in smaller.updates.values() for t in (u.a, u.b)} == {dtype}
    found = kept_energy(whole, smaller) / losses.energy
    assert found == pytest.approx(losses.kept, abs=4 * torch.finfo(dtype).eps)


def test_small_updates_survive_half_precision() -> None:
    """Balanced factors: the strength is not all in one of them, where it would vanish."""
    own = update("m.0", (6, 9), 4)
    tiny = replace(own, b=own.b * 1e-6)
    halves = Adapter({"m.0": tiny}).to(torch.float64)
    cut, losses = truncate(halves, 2)
    rounded = cut.to(torch.float16).updates["m.0"]
    error = (rounded.delta() - cut.updates["m.0"].delta()).norm()
    assert float(error) < 2e-3 * losses.energy**0.5


# --- what else an adapter brings ---------------------------------------------------------------


def test_a_compressed_model_computes_what_the_dense_truncation_computes() -> None:
    case = CASES["llama"]
    model = randomise_adapter(gr.apply(hand_plan(case.model()), case.model()))
    whole = taken(model)
    smaller, losses = compress(whole, whole.parameters // 2)
    assert losses.dropped or any(t.kept < 1 for t in losses.targets.values())
    (batch,) = batches(case, 1)
    base: Any = case.model()
    with torch.no_grad():
        for name, rank in ((n, t.rank_after) for n, t in losses.targets.items()):
            base.get_submodule(name).weight += oracle.truncated(whole.updates[name], rank).float()
    found = logits(install(case.model(), smaller), batch)
    torch.testing.assert_close(found, logits(base, batch), rtol=1e-4, atol=1e-4)


def test_a_head_and_biases_pass_through() -> None:
    config = LoraConfig(r=2, target_modules=["query", "value"], bias="all",
                        modules_to_save=["classifier"], init_lora_weights=False)  # fmt: skip
    model = get_peft_model(tiny_bert(), config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter)
    whole = taken(model)
    smaller, losses = compress(whole, 64)
    assert losses.dropped
    assert len(smaller.other) == len(whole.other)
    again: Any = install(tiny_bert(), smaller)
    values = {n.replace(".base_layer", ""): p for n, p in again.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "modules_to_save" in name:
            assert torch.equal(values[name.replace(".base_layer", "")], parameter)


@pytest.mark.parametrize(
    ("config", "other", "why"),
    [
        ({"use_dora": True}, {}, "DoRA magnitudes"),
        ({}, {"m.0.lora_magnitude_vector": torch.ones(6)}, "DoRA magnitudes"),
        ({"lora_bias": True}, {}, "biases of the factors"),
        ({}, {"e.lora_embedding_A": torch.ones(2, 6)}, "low-rank embedding 'e'"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights='pissa'"),
    ],
)
def test_what_smaller_ranks_would_break_is_refused(config: Any, other: Any, why: str) -> None:
    whole = replace(adapter(), config=config, other=other)
    with pytest.raises(gr.PlanError, match=f"cannot be compressed: .*{why}"):
        compress(whole, 60)
    with pytest.raises(gr.PlanError, match="cannot be cut"):
        truncate(whole, 1)


def test_an_adapter_without_updates_is_refused() -> None:
    with pytest.raises(gr.PlanError, match="updates no linear module"):
        compress(Adapter({}), 60)


# --- the account -----------------------------------------------------------------------------


def test_losses_are_told() -> None:
    whole = adapter()
    smaller, losses = compress(whole, 31)
    data = json.loads(json.dumps(losses.to_dict()))
    assert data["budget"] == 31
    assert data["parameters_before"] == whole.parameters
    assert data["parameters_after"] == smaller.parameters
    assert list(data["targets"]) == list(whole.updates)
    assert {n: t["rank_before"] for n, t in data["targets"].items()} == whole.ranks
    assert {n: t["rank_after"] for n, t in data["targets"].items() if t["rank_after"]} == (
        smaller.ranks
    )
    assert losses.dropped == tuple(n for n in whole.updates if n not in smaller.updates)
    lines = losses.lines(most=1)
    assert f"{whole.parameters:,} -> {smaller.parameters:,} parameters (budget 31)" in lines[0]
    worst = min(losses.targets, key=lambda name: losses.targets[name].kept)
    assert lines[1].startswith(f"{worst}: rank {whole.ranks[worst]} -> ")
    assert lines[2] == "and 2 modules that lost less"


def test_the_export_reports_what_was_lost(tmp_path: Any) -> None:
    model = randomise_adapter(gr.apply(hand_plan(tiny_llama()), tiny_llama()))
    whole = taken(model)
    report = gr.export(model, tmp_path / "out", budget="uniform:1")
    assert report.losses is not None
    spent = sum(own.target.cost for own in whole.updates.values())
    assert report.losses.parameters_after <= spent < whole.parameters
    assert report.change > 0
    assert sum(report.ranks.values()) == sum(t.rank_after for t in report.losses.targets.values())
