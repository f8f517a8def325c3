"""The methods that prune, in loops of one's own: what falls, what stays, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import gradrank as gr
from dynamic_cases import adamw, adapted, adapter_weights, data, same_tensors
from gradrank.adapters.view import lora_sites
from gradrank.capacity import CapacityRun
from pruning.pruning_runs import (
    BUDGET,
    DUE,
    METHODS,
    RANK,
    STEPS,
    everything,
    hooked,
    leftovers,
    logits,
    moments,
    pruned,
    pruning,
    reserved,
    stock,
    timeless,
    train,
)

WIDE = 2 * RANK


# --- directions go -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_run_ends_within_the_budget_and_as_stock_peft(name: str, tmp_path: Path) -> None:
    model, optimizer, controller = pruned(pruning(name))
    run = controller.run
    assert [entry["step"] for entry in run.decisions] == DUE
    spent = [run.start_parameters, *(entry["parameters"] for entry in run.decisions)]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] == 2 * run.budget
    assert all(entry["parameters"] <= entry["budget"] for entry in run.decisions)
    assert run.decisions[-1]["budget"] == run.budget
    ranks = run.ranks
    assert len(set(ranks.values())) > 1
    costs = {target.name: target.cost for target in run._targets}
    assert sum(rank * costs[target] for target, rank in ranks.items()) == spent[-1]
    assert hooked(optimizer) == 0
    trained = logits(model)
    assert gr.settle(model) == {target: rank for target, rank in ranks.items() if rank}
    assert leftovers(model) == []
    torch.testing.assert_close(logits(model), trained, rtol=1e-5, atol=1e-6)
    assert everything(model) == spent[-1]
    model.save_pretrained(tmp_path)
    again = stock(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert same_tensors(adapter_weights(again), adapter_weights(model))


@pytest.mark.parametrize("case", ["gpt2", "bert", "t5"])
def test_other_architectures_prune_too(case: str, tmp_path: Path) -> None:
    name = {"gpt2": "igu", "bert": "igu-direction", "t5": "adalora"}[case]
    model, _, controller = pruned(pruning(name), case)
    assert controller.run.parameters <= controller.run.budget
    gr.settle(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(stock(tmp_path, case), case), logits(model, case))


@pytest.mark.parametrize("name", METHODS)
def test_memory_falls_with_every_pruning(name: str) -> None:
    method = pruning(name)
    model, optimizer = reserved(method)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    sizes = []
    for batch in data(count=STEPS):
        train(model, optimizer, controller, [batch])
        live = {id(p) for p in model.parameters() if p.requires_grad}
        groups = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in groups} == live == {id(p) for p in optimizer.state}
        # Factors, and one lambda per direction.
        assert everything(model) == controller.run.parameters + sum(controller.ranks.values())
        # Two moments, and a step count per tensor.
        assert moments(optimizer) == 2 * everything(model) + len(live)
        sizes.append(everything(model))
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3] > sizes[4] >= sizes[6] == sizes[-1]


def test_a_target_without_directions_loses_its_adapter() -> None:
    model, _, controller = pruned(pruning("as-code"))
    off = [target for target, rank in controller.ranks.items() if not rank]
    assert off, "the test shows nothing"
    assert not set(off) & set(lora_sites(model, "default"))
    assert not [
        n for n, _ in model.named_parameters() if ".lora_" in n and n.split(".lora_")[0] in off
    ]
    history = controller.run.ranks_over_time
    assert history[0] == [0, dict.fromkeys(controller.ranks, WIDE)]
    assert history[-1][1] == controller.ranks
    gr.settle(model)
    named = model.peft_config["default"].target_modules
    assert not [target for target in off if target in named]


def test_no_target_goes_below_its_least_rank() -> None:
    _, _, controller = pruned(pruning("as-code", r_min=1))
    assert min(controller.ranks.values()) == 1
    assert controller.run.parameters <= controller.run.budget


def test_two_runs_with_one_seed_are_equal_to_the_last_bit_and_seeds_matter() -> None:
    def run(seed: int) -> dict[str, Tensor]:
        model, optimizer = reserved(pruning("igu"))
        method = pruning("igu")
        controller = gr.Controller(model, optimizer, method, BUDGET, STEPS, seed=seed)
        train(model, optimizer, controller, data(count=STEPS))
        return adapter_weights(model)

    first = run(0)
    assert same_tensors(first, run(0))
    assert not same_tensors(first, run(1))


@pytest.mark.parametrize("name", METHODS)
def test_looking_does_not_change_training(name: str) -> None:
    """Before the first pruning a run is that of the same form without any method."""
    # With one segment as-code trains at alpha = 1 only.
    options = {"segments": 1} if name == "as-code" else {}
    method = pruning(name, orthogonality=0.0, warmup=5, **options)
    model, optimizer = reserved(method, lora_dropout=0.1)
    plain, own = reserved(method, lora_dropout=0.1)
    items = data(count=5)
    torch.manual_seed(3)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    train(model, optimizer, controller, items)
    controller.close()
    torch.manual_seed(3)
    for batch in items:
        plain(**batch).loss.backward()
        own.step()
        own.zero_grad()
    assert same_tensors(adapter_weights(model), adapter_weights(plain))


def test_the_published_codes_variant_does_change_training() -> None:
    method = pruning("as-code", orthogonality=0.0, warmup=5)
    model, optimizer = reserved(method)
    plain, own = reserved(method)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    train(model, optimizer, controller, data(count=3))
    controller.close()
    for batch in data(count=3):
        plain(**batch).loss.backward()
        own.step()
        own.zero_grad()
    assert not same_tensors(adapter_weights(model), adapter_weights(plain))


# --- restart -----------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["svd", "keep"])
@pytest.mark.parametrize("name", ["igu", "adalora"])
def test_a_restart_keeps_the_ranks_and_nothing_else(name: str, init: str) -> None:
    method = pruning(name, after="restart", init=init)
    model, optimizer = reserved(method)
    twin, other = reserved(pruning(name, init=init))
    bare = logits(twin)  # a new adapter changes nothing
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    going_on = gr.Controller(twin, other, pruning(name, init=init), BUDGET, STEPS)
    items = data(count=STEPS)
    train(model, optimizer, controller, items[: DUE[-1]])
    train(twin, other, going_on, items[: DUE[-1]])
    assert controller.ranks == going_on.ranks
    assert not torch.equal(logits(twin), bare)
    assert torch.equal(logits(model), bare)
    assert moments(optimizer) == 0
    assert moments(other) > 0
    losses = train(model, optimizer, controller, items[DUE[-1] :])
    assert all(torch.isfinite(torch.tensor(losses)))
    assert not torch.equal(logits(model), bare)
    assert moments(optimizer) > 0
    assert controller.ranks == going_on.ranks


# --- what goes wrong is told -------------------------------------------------------------------


def test_a_loop_without_reserve_is_told_to_call_it() -> None:
    model = adapted(rank=RANK)
    optimizer = adamw(model)
    with pytest.raises(
        gr.SurgeryError, match=r"14 of 14 layers .* Call gradrank\.reserve\(model, 'igu'"
    ):
        gr.Controller(model, optimizer, pruning("igu"), BUDGET, STEPS)
    assert hooked(optimizer) == 0


def test_an_optimizer_made_too_early_is_refused() -> None:
    model = adapted(rank=RANK)
    optimizer = adamw(model)
    gr.reserve(model, pruning("igu"), BUDGET)
    with pytest.raises(gr.SurgeryError, match="not in the optimizer; build the optimizer after"):
        gr.Controller(model, optimizer, pruning("igu"), BUDGET, STEPS)
    assert hooked(optimizer) == 0


def test_forms_and_methods_are_not_mixed_up() -> None:
    model, optimizer = reserved(pruning("igu"))
    with pytest.raises(gr.SurgeryError, match=r"14 layers .* in SVD form\. Call gradrank\.settle"):
        gr.Controller(model, optimizer, "gard-dynamic", "uniform:8", 200)
    with pytest.raises(gr.SurgeryError, match="SVD form already"):
        gr.reserve(model, pruning("igu"), BUDGET)
    assert hooked(optimizer) == 0


def test_a_controller_that_was_never_stepped_says_so() -> None:
    method = pruning("igu")
    model, optimizer = reserved(method)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    model(**data()[0]).loss.backward()
    optimizer.step()
    with pytest.raises(gr.SurgeryError, match=r"never stepped\. Call controller\.step\(\)"):
        controller.finish()
    assert hooked(optimizer) == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_loop_that_forgets_the_controller_is_stopped_by_name(name: str) -> None:
    method = pruning(name)
    model, optimizer = reserved(method)
    gr.Controller(model, optimizer, method, BUDGET, STEPS)
    model(**data()[0]).loss.backward()
    optimizer.step()
    model(**data()[1]).loss.backward()
    with pytest.raises(gr.SurgeryError, match=r"ran twice and controller\.step\(\) did not"):
        optimizer.step()
    assert hooked(optimizer) == 0


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({}, 4, r"would never take any capacity away: of 4 steps the first 1 .* the last 3"),
        ({"score_every": 4}, STEPS, r"after step 3 without having looked .* every 4 steps"),
    ],
)
def test_a_schedule_that_cannot_decide_is_refused(
    options: dict[str, Any], steps: int, message: str
) -> None:
    method = pruning("igu", **options)
    model, optimizer = reserved(method)
    with pytest.raises(gr.OptionError, match=message):
        gr.Controller(model, optimizer, method, BUDGET, steps)
    assert hooked(optimizer) == 0


def test_a_budget_that_takes_nothing_away_is_refused() -> None:
    model = adapted(rank=RANK)
    with pytest.raises(gr.OptionError, match=r"there is nothing to take away\. Raise initial_rank"):
        gr.reserve(model, pruning("igu", initial_rank=RANK), BUDGET)
    # Reserved for one budget, run with another.
    method = pruning("igu")
    model, optimizer = reserved(method)
    with pytest.raises(
        gr.BudgetError, match=r"7,424 parameters .* has 3,712 to begin with \(rank 4"
    ):
        gr.Controller(model, optimizer, method, "uniform:8", STEPS)
    assert hooked(optimizer) == 0


def test_a_run_that_ends_above_its_budget_is_warned_about() -> None:
    method = pruning("igu")
    model, optimizer = reserved(method)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    train(model, optimizer, controller, data(count=STEPS)[: DUE[0]])
    with pytest.warns(UserWarning, match=r"more than the budget of 1,856: .* after step 7"):
        controller.finish()


def test_another_kind_of_optimizer_is_refused_by_name() -> None:
    class Wrapped:
        def __init__(self, inner: Any) -> None:
            self.param_groups, self.state, self.step = inner.param_groups, inner.state, inner.step

    method = pruning("igu")
    model, optimizer = reserved(method)
    with pytest.raises(gr.SurgeryError, match="a Wrapped does not let anybody look at gradients"):
        gr.Controller(model, Wrapped(optimizer), method, BUDGET, STEPS)


# --- losses that are not the model's own -------------------------------------------------------


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    found = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return functional.cross_entropy(found.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


@pytest.mark.parametrize("name", METHODS)
def test_a_model_without_loss_needs_a_loss_function(name: str) -> None:
    method = pruning(name)
    model, optimizer = reserved(method)
    items = [{"input_ids": batch["input_ids"]} for batch in data(count=STEPS)]

    def run(controller: gr.Controller) -> None:
        with controller:
            for batch in items:
                own_loss(model, batch).backward()
                optimizer.step()
                controller.step()
                optimizer.zero_grad()

    if name in {"igu", "igu-direction"}:
        with pytest.raises(
            gr.MeasurementError, match=r"gave no loss .* loss_function\(model, batch\)"
        ):
            run(gr.Controller(model, optimizer, method, BUDGET, STEPS))
        assert hooked(optimizer) == 0
        optimizer.zero_grad()
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS, loss_function=own_loss)
    run(controller)
    assert controller.run.parameters <= controller.run.budget
    # The labels are the inputs: the same gradients as the model's own loss gives.
    twin, _, theirs = pruned(method)
    assert controller.ranks == theirs.ranks
    for key, weight in adapter_weights(twin).items():
        torch.testing.assert_close(adapter_weights(model)[key], weight, rtol=1e-3, atol=1e-4)


# --- numbers that are not finite ---------------------------------------------------------------


def test_a_look_that_overflows_is_left_out_and_counted() -> None:
    calls = []

    def overflows(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return own_loss(model, batch) * (float("inf") if len(calls) == 2 else 1.0)

    method = pruning("igu", estimator="grid", segments=1)  # two passes per look
    model, optimizer = reserved(method)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS, loss_function=overflows)
    losses = train(model, optimizer, controller, data(count=STEPS))
    assert [entry["left_out"] for entry in controller.run.decisions] == [1, 1, 1]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert controller.run.parameters <= controller.run.budget


def test_where_every_look_overflows_the_first_pruning_says_so() -> None:
    def overflows(model: nn.Module, batch: Any) -> Tensor:
        return own_loss(model, batch) * float("inf")

    method = pruning("igu")
    model, optimizer = reserved(method)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS, loss_function=overflows)
    with pytest.raises(gr.MeasurementError, match="no mini-batch with finite gradients"):
        train(model, optimizer, controller, data(count=STEPS))
    controller.close()
    assert hooked(optimizer) == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_steps_that_a_gradient_scaler_skips_count_for_nothing(name: str) -> None:
    method = pruning(name)
    model, optimizer = reserved(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    for index, batch in enumerate(data(count=STEPS + 2)):
        loss = model(**batch).loss
        # The second one is to be skipped in a step that is looked at, the other after it.
        scaler.scale(loss * (float("inf") if index in {1, 4} else 1.0)).backward()
        before = controller.run.step
        scaler.step(optimizer)
        scaler.update()
        controller.step()
        assert (controller.run.step == before) == (index in {1, 4})
        optimizer.zero_grad()
    assert [entry["step"] for entry in controller.run.decisions] == DUE
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert controller.run.parameters <= controller.run.budget


@pytest.mark.parametrize("name", METHODS)
def test_a_trainers_step_that_was_skipped_does_not_block_a_pruning(name: str) -> None:
    """The Trainer counts steps that its gradient scaler skips, also where one is looked at."""
    method = pruning(name)
    model, optimizer = reserved(method)
    run = CapacityRun(model, optimizer, method, BUDGET, STEPS)
    run.before_step(1)
    for step, batch in enumerate(data(count=STEPS), 1):
        model(**batch).loss.backward()
        if step not in DUE:
            optimizer.step()
        run.after_step(step)
        optimizer.zero_grad()
    run.close()
    assert [entry["step"] for entry in run.decisions] == DUE
    assert run.parameters <= run.budget


def test_training_that_diverged_is_refused_at_the_next_pruning() -> None:
    for name in METHODS:
        method = pruning(name)
        model, optimizer = reserved(method)
        controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
        for step, batch in enumerate(data(count=DUE[0]), 1):
            model(**batch).loss.backward()
            if step == 2:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.fill_(float("nan"))
            optimizer.step()
            if step < DUE[0]:
                controller.step()
            optimizer.zero_grad()
        with pytest.raises(gr.GradrankError, match="training has diverged"):
            controller.step()
        controller.close()
        assert hooked(optimizer) == 0


# --- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in METHODS),
        ("igu", {"aggregate": 2}),
        ("adalora", {"after": "restart"}),
    ],
)
def test_a_loop_resumes_to_the_last_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    method = pruning(name, **options)
    model, optimizer = reserved(method)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    items = data(count=STEPS)
    for step, batch in enumerate(items, 1):
        train(model, optimizer, controller, [batch])
        folder = tmp_path / str(step)
        folder.mkdir()
        save_file(get_peft_model_state_dict(model), folder / "adapter.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        controller.save(folder)
    whole = adapter_weights(model)
    # Before the first pruning, between two, after one and after the last; 4 is in mid-aggregate.
    for step in (2, 4, 5, 8):
        folder = tmp_path / str(step)
        again, fresh = reserved(method)
        resumed = gr.Controller(again, fresh, method, BUDGET, STEPS)
        resumed.restore(folder)
        set_peft_model_state_dict(again, load_file(folder / "adapter.safetensors"))
        fresh.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        train(again, fresh, resumed, items[step:])
        assert resumed.ranks == controller.ranks, step
        assert timeless(resumed.run) == timeless(controller.run), step
        assert resumed.run.ranks_over_time == controller.run.ranks_over_time
        assert same_tensors(adapter_weights(again), whole), step
        mine, theirs = resumed.run.course.state(), controller.run.course.state()
        assert same_tensors(mine, theirs), step


def test_a_state_of_another_method_is_refused_by_name(tmp_path: Path) -> None:
    method = pruning("igu")
    model, optimizer = reserved(method)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    train(model, optimizer, controller, data()[:4])
    controller.save(tmp_path)
    controller.close()
    for other, named in ((pruning("adalora"), "method"), (pruning("igu", beta1=0.5), "options")):
        again, fresh = reserved(other)
        resumed = gr.Controller(again, fresh, other, BUDGET, STEPS)
        with pytest.raises(gr.OptionError, match=f"made with other settings: {named}"):
            resumed.restore(tmp_path)
        resumed.close()
