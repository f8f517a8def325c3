"""Both stages in loops of one's own: degenerate splits, what is kept, what is told."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import gradrank as gr
from dynamic_cases import adamw, adapted, adapter_weights, data, same_tensors
from gradrank.adapters.view import lora_sites
from gradrank.record import RunRecord
from gradrank.watch.neurons import CELLS, MAPS, pictured
from neurons.neuron_runs import (
    BUDGET,
    INITIAL,
    RANK,
    STEPS,
    Loop,
    counted,
    pilora,
    reserved,
    splits,
    started,
    whole,
)
from pruning.pruning_runs import hooked, leftovers, logits, moments, stock, timeless

Q = "model.layers.0.self_attn.q_proj"


def check_stock(model: Any, folder: Path, case: str = "llama") -> None:
    """Settled, it is what PEFT loads."""
    trained = logits(model, case)
    gr.settle(model)
    assert leftovers(model) == []
    torch.testing.assert_close(logits(model, case), trained, rtol=1e-5, atol=1e-6)
    model.save_pretrained(folder)
    assert torch.equal(logits(stock(folder, case), case), logits(model, case))


# --- the second stage --------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["restart", "warm"])
def test_only_two_groups_of_rows_train_and_only_they_are_held(start: str, tmp_path: Path) -> None:
    model, optimizer, controller = whole(pilora(start=start))
    run = controller.run
    assert [entry["step"] for entry in run.decisions] == [INITIAL]
    assert run.parameters == run.decisions[0]["parameters"] < run.start_parameters == run.budget
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == run.parameters
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert moments(optimizer) == 2 * run.parameters + len(held)
    for name, site in lora_sites(model, "default").items():
        split = splits(controller)[name]
        assert site.partition == (split if split.is_split else None)
        b, dominant = site.linear("B").weight, torch.tensor(split.mask)
        assert not b[dominant, split.rank :].any()
        assert not b[~dominant, : split.rank].any()
        assert b[dominant, : split.rank].any()
        assert b[~dominant, split.rank :].any()
    check_stock(model, tmp_path)


def test_a_restart_changes_nothing_at_first_and_a_warm_one_goes_on() -> None:
    bare, found = logits(reserved(pilora())), {}
    for start in ("restart", "warm"):
        model, optimizer, controller = started(pilora(start=start))
        loop = Loop(model, optimizer, controller).run(data(count=INITIAL - 1))
        before = logits(model)
        loop.run(data(count=INITIAL)[-1:])
        found[start] = logits(model)
        assert not torch.equal(before, bare)
    assert torch.equal(found["restart"], bare)
    assert (found["warm"] - before).norm() < (before - bare).norm()


def test_nothing_that_a_record_keeps_is_missing() -> None:
    _, _, controller = whole(pilora(interval=1))
    neurons: Any = controller.run.neurons
    assert (neurons["step"], neurons["looks"], neurons["interval"]) == (INITIAL, INITIAL, 1)
    course: Any = controller.run.course
    for name, entry in neurons["targets"].items():
        assert sum(entry["hits"]) == entry["d_out"] == len(course.hits[name])
        hits = sum(times * rows for times, rows in enumerate(entry["hits"]))
        assert hits == int(course.hits[name].sum())
        majority = sum(entry["hits"][INITIAL // 2 + 1 :])
        assert entry["dominant_rows"] <= majority
    assert controller.run.decisions[0]["trimmed"] == 0
    assert list(neurons["maps"]) == list(pictured(controller.run._targets))
    assert 0 < len(neurons["maps"]) <= MAPS
    for name, cells in neurons["maps"].items():
        assert (cells["rows"], name.split(".")[2]) == (neurons["targets"][name]["d_out"], "1")
        for when in ("before", "after"):
            assert len(cells[when]) == min(cells["rows"], CELLS[0])
            assert {len(row) for row in cells[when]} == {min(cells["columns"], CELLS[1])}
            assert min(map(min, cells[when])) >= 0 < max(map(max, cells[when]))
        assert cells["before"] != cells["after"]
    record = RunRecord(name="pilora", kind="train", created="2026-01-01T00:00:00+00:00")
    record.neurons = neurons
    assert RunRecord.from_dict(record.to_dict()).neurons == neurons


def test_two_runs_are_equal_and_the_seed_draws_the_second_stage() -> None:
    found = []
    for seed in (0, 0, 1):
        model = reserved(pilora())
        optimizer = adamw(model, 2e-2)
        controller = gr.Controller(model, optimizer, pilora(), BUDGET, STEPS, seed=seed)
        Loop(model, optimizer, controller).run(data(count=STEPS))
        found.append((splits(controller), adapter_weights(model)))
    assert found[0][0] == found[1][0] == found[2][0]
    assert same_tensors(found[0][1], found[1][1])
    assert not same_tensors(found[0][1], found[2][1])


# --- degenerate splits -------------------------------------------------------------------------

DEGENERATE: dict[str, tuple[dict[str, Any], Any]] = {
    "none": ({"rule": "top_fraction", "fraction": 0.0}, {1}),
    "all": ({"rule": "top_fraction", "fraction": 1.0}, {RANK}),
    "all-lower": ({"rule": "top_fraction", "fraction": 1.0, "dominant_rank": 3}, {3}),
    "alone": ({"supplementary_rank": 0, "rule": "top_fraction"}, {RANK}),
    "alike": ({"supplementary_rank": 2, "rank": 2, "rule": "top_fraction"}, {4}),
    "equal-shares": ({"rule": "random", "fraction": 0.5, "supplementary_rank": 2}, None),
}


@pytest.mark.parametrize("start", ["restart", "warm"])
@pytest.mark.parametrize("what", DEGENERATE)
def test_a_degenerate_split_trains_saves_and_resumes(what: str, start: str, tmp_path: Path) -> None:
    options, ranks = DEGENERATE[what]
    method = pilora(start=start, **options)
    model, optimizer, controller = started(method)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for step, batch in enumerate(data(count=STEPS), 1):
        loop = Loop(model, optimizer, controller)
        loop.step(batch)
        assert torch.isfinite(torch.tensor(loop.losses)).all()
        if step == INITIAL + 1:
            save_file(get_peft_model_state_dict(model), folder / "adapter.safetensors")
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            controller.save(folder)
    if ranks is not None:
        assert set(controller.ranks.values()) == ranks
    assert controller.run.parameters <= controller.run.budget
    again, fresh, resumed = started(method)
    resumed.restore(folder)
    set_peft_model_state_dict(again, load_file(folder / "adapter.safetensors"))
    fresh.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    Loop(again, fresh, resumed).run(data(count=STEPS)[INITIAL + 1 :])
    assert same_tensors(adapter_weights(again), adapter_weights(model))
    assert timeless(resumed.run) == timeless(controller.run)
    assert resumed.run.neurons == controller.run.neurons
    check_stock(model, tmp_path / "settled")


def test_targets_without_a_dominant_row_lose_their_adapter_where_the_others_have_none(
    tmp_path: Path,
) -> None:
    """A head of three rows of which none is chosen, at r' = 0."""
    method = pilora(supplementary_rank=0, rule="random", fraction=0.1)
    model, _, controller = whole(method, "bert")
    lost = [name for name, rank in controller.ranks.items() if not rank]
    assert lost == ["classifier"]
    assert "classifier" not in lora_sites(model, "default")
    assert controller.run.ranks_over_time[-1][1]["classifier"] == 0
    check_stock(model, tmp_path, "bert")


def test_a_split_that_leaves_nothing_is_refused_and_changes_nothing() -> None:
    method = pilora(supplementary_rank=0, rule="top_fraction", fraction=0.0)
    model, optimizer, controller = started(method)
    Loop(model, optimizer, controller).run(data(count=INITIAL - 1))
    before = adapter_weights(model)
    model(**data()[0]).loss.backward()
    with pytest.raises(gr.GradrankError, match="supplementary_rank to 1 or more"):
        controller.run.after_step(INITIAL)
    assert same_tensors(adapter_weights(model), before)
    controller.close()
    assert hooked(optimizer) == 0


def test_rows_give_way_to_a_smaller_budget() -> None:
    method = pilora(rule="top_fraction", fraction=1.0)
    budget = 2_400
    model = adapted(rank=RANK)
    gr.reserve(model, method, budget)
    optimizer = adamw(model, 2e-2)
    controller = gr.Controller(model, optimizer, method, budget, STEPS)
    Loop(model, optimizer, controller).run(data(count=STEPS))
    (entry,) = controller.run.decisions
    assert entry["trimmed"] > 0
    assert controller.run.start_parameters > budget >= entry["parameters"]
    assert budget - entry["parameters"] < max(t.cost for t in controller.run._targets) * RANK


# --- what goes wrong is told -------------------------------------------------------------------


def test_a_loop_without_reserve_is_told_to_call_it() -> None:
    model = adapted(rank=2)
    optimizer = adamw(model)
    with pytest.raises(
        gr.SurgeryError, match=r"rank 4, and 14 of 14 .* gradrank\.reserve\(model, 'pilora'"
    ):
        gr.Controller(model, optimizer, pilora(), BUDGET, STEPS)
    assert hooked(optimizer) == 0


def test_an_adapter_above_the_rank_is_refused_with_both_ranks() -> None:
    with pytest.raises(
        gr.SurgeryError, match=r"14 layer\(s\) .* has 8, above 4\. Give the method that rank"
    ):
        gr.reserve(adapted(rank=8), pilora(), BUDGET)


@pytest.mark.parametrize("case", ["bert", "vit"])
def test_a_head_of_few_rows_keeps_a_rank_above_their_number(case: str) -> None:
    """PEFT gives every layer of `all-linear` the same rank, also a head of three rows."""
    method = pilora(start="warm")
    model = adapted(case, rank=RANK)
    gr.reserve(model, method, BUDGET)
    ranks = {name: site.rank for name, site in lora_sites(model, "default").items()}
    assert set(ranks.values()) == {RANK}
    optimizer = adamw(model, 2e-2)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    loop = Loop(model, optimizer, controller).run(data(case, STEPS))
    split = splits(controller)["classifier"]
    assert (split.d_out, split.rank) == (3, 3)
    assert [hits.tolist() for n, hits in counted(controller).items() if n == "classifier"] == [
        loop.hits["classifier"].tolist()
    ]


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({"initial_steps": STEPS}, STEPS, "would never reach its second stage"),
        ({"initial_steps": STEPS + 3}, STEPS, r"takes 11 of 8 steps \(initial_steps\)"),
        ({"interval": 5}, STEPS, r"interval"),
        ({}, INITIAL, "would never reach its second stage"),
    ],
)
def test_stages_that_cannot_be_are_refused(
    options: dict[str, Any], steps: int, message: str
) -> None:
    method = pilora(**options)
    model = reserved(pilora())
    optimizer = adamw(model)
    with pytest.raises(gr.OptionError, match=message):
        gr.Controller(model, optimizer, method, BUDGET, steps)
    assert hooked(optimizer) == 0


def test_a_budget_that_cannot_pay_the_supplementary_rank_is_refused() -> None:
    with pytest.raises(gr.BudgetError, match="supplementary_rank"):
        gr.reserve(adapted(rank=RANK), pilora(), 700)


def test_a_run_that_ends_in_its_first_stage_says_so() -> None:
    model, optimizer, controller = started(pilora())
    Loop(model, optimizer, controller).run(data(count=INITIAL - 1))
    with pytest.raises(gr.SurgeryError, match=r"after step 4\. Lower initial_steps, or train"):
        controller.finish()
    assert hooked(optimizer) == 0


def test_a_first_stage_above_the_budget_is_named() -> None:
    budget = 2_400
    model = adapted(rank=RANK)
    gr.reserve(model, pilora(), budget)
    optimizer = adamw(model, 2e-2)
    controller = gr.Controller(model, optimizer, pilora(), budget, STEPS)
    assert "more than the budget of 2,400" in controller.run.excess()
    assert "before the split, which falls due after step 4" in controller.run.excess()
    Loop(model, optimizer, controller).run(data(count=STEPS))
    assert controller.run.excess() == ""


def test_a_loop_that_forgets_the_controller_is_stopped() -> None:
    model, optimizer, _ = started(pilora(interval=1))
    model(**data()[0]).loss.backward()
    optimizer.step()
    model(**data()[1]).loss.backward()
    with pytest.raises(gr.SurgeryError, match=r"ran twice and controller\.step\(\) did not"):
        optimizer.step()
    assert hooked(optimizer) == 0
    assert not [p for p in model.parameters() if p._post_accumulate_grad_hooks]


def test_another_kind_of_optimizer_is_refused_by_name() -> None:
    class Wrapped:
        def __init__(self, inner: Any) -> None:
            self.param_groups, self.state, self.step = inner.param_groups, inner.state, inner.step

    model = reserved(pilora())
    with pytest.raises(gr.SurgeryError, match="a Wrapped does not let anybody look at gradients"):
        gr.Controller(model, Wrapped(adamw(model)), pilora(), BUDGET, STEPS)


def test_an_optimizer_made_too_early_is_refused() -> None:
    model = adapted(rank=2)
    optimizer = adamw(model)
    gr.reserve(model, pilora(), BUDGET)
    with pytest.raises(gr.SurgeryError, match="not in the optimizer; build the optimizer after"):
        gr.Controller(model, optimizer, pilora(), BUDGET, STEPS)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    model, optimizer, controller = started(pilora())
    Loop(model, optimizer, controller).run(data(count=3))
    controller.save(tmp_path)
    controller.close()
    for other in (pilora(interval=1), pilora(rule="mean"), pilora(start="warm")):
        _, _, resumed = started(other)
        with pytest.raises(gr.OptionError, match="made with other settings: options"):
            resumed.restore(tmp_path)
        resumed.close()


def test_a_second_stage_does_not_begin_again() -> None:
    """A model that is split already has no first stage."""
    model, optimizer, _ = whole(pilora())
    with pytest.raises(gr.GradrankError):
        gr.reserve(model, pilora(), BUDGET)
    assert hooked(optimizer) == 0
    gr.settle(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gr.reserve(model, pilora(rank=5), 4_000)
    assert {site.rank for site in lora_sites(model, "default").values()} == {5}
