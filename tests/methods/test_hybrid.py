"""Hybrid: ranks and neuron partitions in one knapsack, against every combination of dense ones."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import gradrank as gr
from cases import CASES, batches
from gradrank.methods import hybrid
from gradrank.ops.rows import by_energy
from gradrank.signals.mean_gradient import MeanGradientProbe, MeanGradientStatistic
from gradrank.signals.measurement import Measurement
from oracles import capacities as oracle

SHARES = "1/2,1/3"


def matrix(shape: tuple[int, int], seed: int, spread: float = 1.5) -> Tensor:
    """Random, with rows of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp(spread * torch.randn(shape[0], 1, generator=generator, dtype=torch.float64))
    return rows * torch.randn(*shape, generator=generator, dtype=torch.float64)


def measured(matrices: Mapping[str, Tensor], directions: int = 16) -> Measurement:
    """What the probe makes of gradients that are these matrices: one token per output row."""
    targets = tuple(gr.Target(name, g.shape[1], g.shape[0]) for name, g in matrices.items())
    probe = MeanGradientProbe(targets, directions, 0, rows=True)
    for batch in range(4):
        for target in targets:
            kept = probe.on_input(target, matrices[target.name].float())
            probe.on_output_grad(target, kept, torch.eye(target.d_out))
        probe.end_batch(batch)
    return Measurement(targets, None, probe.finish(), {"base_parameters": 1000})


def gain_of(plan: gr.Plan, matrices: Mapping[str, Tensor]) -> float:
    """The gain of a plan, from the dense matrices."""
    total = 0.0
    for name, rank in plan.ranks.items():
        split = plan.partitions.get(name)
        choice: oracle.Choice = ("rank", rank)
        if split is not None:
            rows = tuple(i for i, is_dominant in enumerate(split.mask) if is_dominant)
            choice = ("rows", rows, split.rank, split.supplementary_rank)
        total += oracle.gain(matrices[name], choice)
    return total


def cuts(d_out: int) -> list[int]:
    return [max(1, round(d_out / 2)), max(1, round(d_out / 3))]


SMALL = {"a": matrix((4, 3), 0), "b": matrix((6, 2), 1), "c": matrix((3, 4), 2)}


@pytest.mark.parametrize("budget", [7, 8, 11, 15, 19, 24, 31, 38])
def test_it_is_the_best_of_all_combinations(budget: int) -> None:
    options = {name: oracle.choices(g, cuts(g.shape[0])) for name, g in SMALL.items()}
    wanted, _ = oracle.best(SMALL, options, budget)
    plan = gr.allocate(measured(SMALL), gr.Hybrid(shares=SHARES), budget)
    assert plan.parameters <= budget
    assert gain_of(plan, SMALL) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("fault", ["wrong rows", "ranks only", "directions of the whole"])
def test_the_enumeration_catches_broken_twins(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, budgets = measured(SMALL), (15, 19, 24, 31)
    method = gr.Hybrid(shares=SHARES)
    if fault == "wrong rows":
        monkeypatch.setattr(hybrid, "by_energy", lambda factors: by_energy(factors).flip(0))
    elif fault == "ranks only":
        method = gr.Hybrid(shares=None)
    else:
        monkeypatch.setattr(hybrid, "split_energies", _shared_directions)
    short = []
    for budget in budgets:
        options = {name: oracle.choices(g, cuts(g.shape[0])) for name, g in SMALL.items()}
        wanted, _ = oracle.best(SMALL, options, budget)
        short.append(1 - gain_of(gr.allocate(found, method, budget), SMALL) / wanted)
    assert max(short) > 0.01


def _shared_directions(factors: Tensor, order: Tensor, cuts: list[int]) -> list[Any]:
    """As if a group's directions were those of all rows: what both groups gain is the same."""
    whole = torch.linalg.svdvals(factors.double()).square()
    return [(whole[:cut], whole[: len(order) - cut]) for cut in cuts]


def test_a_third_of_the_rows_with_all_the_energy_gets_a_partition() -> None:
    g = torch.zeros(24, 12, dtype=torch.float64)
    mine = [1, 2, 5, 8, 13, 14, 19, 23]
    g[mine] = matrix((8, 12), 3, spread=0.0)
    others = {"flat": 0.05 * matrix((12, 12), 4, spread=0.0)}
    plan = gr.allocate(measured({"a": g, **others}), gr.Hybrid(shares="1/3"), 6 * (12 + 8))
    split = plan.partitions["a"]
    assert [i for i, is_dominant in enumerate(split.mask) if is_dominant] == mine
    assert (split.rank, split.supplementary_rank) == (6, 0)
    assert plan.ranks["flat"] == 0
    assert plan.slack == 0
    flat = gr.allocate(measured({"a": g, **others}), "waterfill", 6 * (12 + 8))
    assert gain_of(plan, {"a": g, **others}) > 1.2 * gain_of(flat, {"a": g, **others})


def test_a_rank_for_all_rows_and_a_larger_one_for_a_third() -> None:
    """Rows that share one strong direction, and a third that have more to say."""
    generator = torch.Generator().manual_seed(5)
    g = torch.outer(torch.ones(30), torch.randn(6, generator=generator)).double()
    g[:10] += 3 * matrix((10, 6), 6, spread=0.0)
    plan = gr.allocate(measured({"a": g}), gr.Hybrid(shares="1/3"), 5 * (6 + 10) + 26)
    split = plan.partitions["a"]
    assert (split.dominant_rows, split.rank, split.supplementary_rank) == (10, 5, 1)


def test_energies_of_groups_are_exact_when_the_sketch_holds_the_rank() -> None:
    generator = torch.Generator().manual_seed(7)
    g = matrix((80, 5), 8) @ torch.randn(5, 60, generator=generator, dtype=torch.float64)
    found = measured({"a": g}, directions=8)
    assessment = gr.Hybrid(directions=8).assess(found.targets, found)
    for split in assessment.splits["a"]:
        rows = torch.tensor([split.bits >> i & 1 == 1 for i in range(80)])
        for group, energies in ((g[rows], split.upper), (g[~rows], split.lower)):
            wanted = torch.linalg.svdvals(group).square()
            some = torch.tensor(energies, dtype=torch.float64)[:5]
            torch.testing.assert_close(some, wanted[: some.numel()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", ["uniform:1", "uniform:3", 3333])
def test_without_shares_it_is_waterfill(budget: object) -> None:
    case = CASES["llama"]
    model, data = case.model(), batches(case, 6)
    plain = gr.measure(model, data, gr.MeanGradient(), num_batches=6)
    kept = gr.measure(model, data, gr.MeanGradient(rows=True), num_batches=6)
    wanted = gr.allocate(plain, "waterfill", budget)
    for found in (plain, kept):
        plan = gr.allocate(found, gr.Hybrid(shares=None), budget)
        assert plan.ranks == wanted.ranks
        assert plan.scores == wanted.scores
        assert not plan.partitions
    assert gr.Hybrid(shares=None).signals() == (gr.MeanGradient(),)


@pytest.mark.parametrize("budget", ["uniform:1", "uniform:4"])
def test_partitions_never_hold_less_than_ranks_alone(budget: str) -> None:
    case = CASES["llama"]
    found = gr.measure(case.model(), batches(case, 6), gr.MeanGradient(rows=True), num_batches=6)
    for solver in ("exact", "greedy"):
        gains = []
        for shares in (None, "1/2", "1/2,1/4"):
            method = gr.Hybrid(shares=shares, solver=solver)
            assessment = method.assess(found.targets, found)
            plan = gr.allocate(found, method, budget)
            gains.append(_estimated(plan, assessment))
        assert gains[0] <= gains[1] * (1 + 1e-9)
        if solver == "exact":
            assert gains[1] <= gains[2] * (1 + 1e-9)


def _estimated(plan: gr.Plan, assessment: gr.Assessment) -> float:
    total = 0.0
    for name, rank in plan.ranks.items():
        split = plan.partitions.get(name)
        if split is None:
            total += sum((assessment.gains or {})[name][:rank])
            continue
        mine = next(s for s in assessment.splits[name] if s.bits == split.bits)
        total += sum(mine.upper[: split.rank]) + sum(mine.lower[: split.supplementary_rank])
    return total


def test_bounds_hold_for_every_row_and_for_the_lora_that_serves() -> None:
    found = measured({"a": matrix((24, 12), 9), "b": matrix((18, 12), 10)})
    plan = gr.allocate(found, gr.Hybrid(r_min=1, r_max=5), "uniform:2")
    assert plan.partitions
    for name, rank in plan.ranks.items():
        split = plan.partitions.get(name)
        assert (rank if split is None else split.supplementary_rank) >= 1
        assert rank <= 5


def test_a_measurement_without_row_factors_is_refused() -> None:
    case = CASES["llama"]
    plain = gr.measure(case.model(), batches(case, 2), gr.MeanGradient(), num_batches=2)
    with pytest.raises(gr.MeasurementError, match=r"row factors.*MeanGradient\(rows=True\)"):
        gr.allocate(plain, "hybrid")


def test_two_methods_share_one_request() -> None:
    case = CASES["llama"]
    asked = [*gr.Waterfill().signals(), *gr.Hybrid().signals()]
    for order in (asked, asked[::-1]):
        found = gr.measure(case.model(), batches(case, 2), order, num_batches=2)
        assert found.need_mean_gradient().rows
    with pytest.raises(gr.OptionError, match="asked for twice"):
        gr.measure(case.model(), batches(case, 2), [gr.MeanGradient(7), *asked], num_batches=2)


@pytest.mark.parametrize("shares", ["", "1/2,1/2", "0", "1", "3/2", "half", "1/0", "1/2,", "-1/4"])
def test_wrong_shares_are_refused(shares: str) -> None:
    with pytest.raises(gr.OptionError, match="'shares' of method 'hybrid'"):
        gr.Hybrid(shares=shares)


def test_too_many_shares_are_refused() -> None:
    with pytest.raises(gr.OptionError, match="up to 16"):
        gr.Hybrid(shares=",".join(f"{i}/100" for i in range(1, 18)))


def test_rows_that_two_halves_do_not_agree_on_are_told() -> None:
    """Even and odd batches with unrelated gradients of the same energy per target."""
    matrices = {name: matrix((40, 20), seed) * (seed + 1) for name, seed in (("a", 1), ("b", 3))}
    swapped = {
        name: g[torch.randperm(40, generator=torch.Generator().manual_seed(2))]
        for name, g in matrices.items()
    }
    targets = tuple(gr.Target(name, 20, 40) for name in matrices)
    probe = MeanGradientProbe(targets, 16, 0, rows=True)
    for batch in range(4):
        for target in targets:
            g = (swapped if batch % 2 else matrices)[target.name].float()
            probe.on_output_grad(target, probe.on_input(target, g), torch.eye(40))
        probe.end_batch(batch)
    plan = gr.allocate(Measurement(targets, None, probe.finish(), {}), "hybrid", 120)
    assert plan.reliability is not None
    assert plan.reliability["row_agreement"] < 0.5
    assert "partitions may rest on chance" in plan.reliability["reason"]
    same = gr.allocate(measured(matrices), "hybrid", 120).reliability
    assert same is not None
    assert same["row_agreement"] == pytest.approx(1.0)
    assert "chance" not in same["reason"]


def test_the_smallest_shapes() -> None:
    """One output row cannot be split; two can."""
    found = measured({"one": matrix((1, 5), 0), "two": matrix((2, 5), 1), "z": torch.zeros(3, 5)})
    assessment = gr.Hybrid().assess(found.targets, found)
    assert not assessment.splits["one"]
    assert [split.bits.bit_count() for split in assessment.splits["two"]] == [1]
    assert "z" not in assessment.splits
    plan = gr.allocate(found, "hybrid", 13)
    assert plan.ranks["z"] == 0


def test_a_statistic_of_a_half_can_be_judged() -> None:
    found = measured(SMALL)
    (half, _), *_ = found.halves(1)
    statistic = half.need_mean_gradient()
    assert isinstance(statistic, MeanGradientStatistic)
    assert set(statistic.rows) == {"whole"}
    assert gr.Hybrid().assess(found.targets, half).splits
