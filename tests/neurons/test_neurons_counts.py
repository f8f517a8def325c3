"""What is counted in the first stage: complete, unclipped gradients, whatever the setting."""

import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import gradrank as gr
from cases import CASES
from dynamic_cases import adamw, adapted, data
from gradrank.adapters.view import lora_sites
from gradrank.signals.unclipped import UnclippedGradients
from neurons.neuron_runs import (
    BUDGET,
    INITIAL,
    STEPS,
    Loop,
    counted,
    doubled,
    factors,
    pilora,
    reserved,
    row_sums,
    same_counts,
    splits,
    started,
    whole,
)
from pruning.pruning_runs import hooked

VALUE = 1e-4


def by_norm(parameters: Any) -> None:
    assert nn.utils.clip_grad_norm_(parameters, 1e-3) > 1e-3, "nothing was clipped"


def by_value(parameters: Any) -> None:
    assert any(bool((p.grad.abs() > VALUE).any()) for p in parameters), "nothing is clipped"
    nn.utils.clip_grad_value_(parameters, VALUE)


def standing(method: Any, **more: Any) -> tuple[Any, gr.Controller]:
    """A loop whose optimizer moves nothing, on an adapter that has been trained before."""
    model = reserved(method, trained=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    return Loop(model, optimizer, controller, **more), controller


# --- beside sums over the whole matrix ---------------------------------------------------------


@pytest.mark.parametrize("case", list(CASES))
def test_hits_are_those_of_the_whole_matrix_on_every_architecture(case: str) -> None:
    """Conv1D (GPT-2), grouped-query attention (llama), encoders, pictures; B = 0 at first."""
    model, optimizer, controller = started(pilora(interval=1), case)
    first = Loop(model, optimizer, controller)
    model(**data(case, 1)[0]).loss.backward()
    assert all(not site[1].grad.any() for site in factors(model)), "G^A = 0 where B = 0"
    assert any(sums.any() for sums in row_sums(model).values())
    optimizer.zero_grad()
    first.run(data(case, INITIAL))
    assert same_counts(counted(controller), first.hits)
    assert controller.run.neurons is not None
    assert controller.run.neurons["looks"] == INITIAL
    # Nothing that is always the same: rows of one target differ, and so do looks.
    assert any(0 < int(h) < INITIAL for hits in first.hits.values() for h in hits)


@pytest.mark.parametrize(
    "more",
    [
        {"micro": 3},
        {"micro": 3, "clip": by_value},
        {"clip": by_norm},
        {"context": functools.partial(torch.autocast, "cpu", torch.bfloat16)},
    ],
    ids=["accumulated", "accumulated-clipped", "clipped", "bfloat16"],
)
def test_hits_are_those_of_the_whole_matrix_in_every_setting(more: dict[str, Any]) -> None:
    model, optimizer, controller = started(pilora(interval=1))
    loop = Loop(model, optimizer, controller, **more).run(data(count=STEPS))
    assert same_counts(counted(controller), loop.hits)
    assert controller.run.parameters <= controller.run.budget


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_gradient_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        method = pilora(interval=1)
        model = reserved(method)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = adamw(model, 2e-2)
        controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
        loop = Loop(model, optimizer, controller).run(data(count=STEPS))
        assert same_counts(counted(controller), loop.hits)
        found.append((loop.hits, splits(controller), loop.losses))
    assert same_counts(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)


@pytest.mark.parametrize("case", ["llama", "vit"])
def test_micro_batches_count_as_the_batch_that_they_make(case: str) -> None:
    found = []
    for micro in (1, 2, 3):
        model, optimizer, controller = started(pilora(interval=1), case)
        loop = Loop(model, optimizer, controller, micro=micro).run(doubled(case, STEPS))
        found.append((counted(controller), splits(controller), loop.losses))
    for hits, masks, losses in found[1:]:
        assert same_counts(hits, found[0][0])
        assert masks == found[0][1]
        assert losses == pytest.approx(found[0][2], rel=1e-3)


def test_the_last_micro_batch_alone_would_count_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twin that keeps only what the last micro-batch added is told apart."""

    def last_only(self: Any, parameter: Any) -> None:
        before = getattr(parameter, "_before", torch.zeros_like(parameter))
        self._copies[id(parameter)] = (parameter.grad - before).detach().clone()
        parameter._before = parameter.grad.detach().clone()

    monkeypatch.setattr(UnclippedGradients, "_copy", last_only)
    model, optimizer, controller = started(pilora(interval=1, initial_steps=1))
    loop = Loop(model, optimizer, controller, micro=3).run(data(count=1))
    assert not same_counts(counted(controller), loop.hits)


# --- clipping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [by_norm, by_value])
def test_clipping_changes_neither_hits_nor_masks(clip: Any) -> None:
    found = []
    for chosen in (None, clip):
        loop, controller = standing(pilora(), clip=chosen)
        loop.run(data(count=INITIAL))
        found.append((counted(controller), splits(controller)))
    assert same_counts(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(("clip", "alike"), [(by_norm, True), (by_value, False)])
def test_a_twin_that_looks_at_clipped_gradients(
    clip: Any, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One factor for all leaves every hit as it is; clipping element by element does not."""
    loop, controller = standing(pilora(), clip=clip)
    loop.run(data(count=INITIAL))

    def as_stepped(self: Any) -> list[Any]:
        found = [p.grad.clone() for p in self._parameters]
        self.close()
        return found

    monkeypatch.setattr(UnclippedGradients, "take", as_stepped)
    twin, other = standing(pilora(), clip=clip)
    twin.run(data(count=INITIAL))
    assert same_counts(counted(controller), counted(other)) == alike
    assert (splits(controller) == splits(other)) == alike


# --- numbers that overflow ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_gradient_scaler_changes_no_hit_and_a_skipped_step_counts_for_nothing(
    dtype: Any,
) -> None:
    """The first overflow is in a step that is looked at; the next mini-batch is looked at."""
    items, overflows = data(count=STEPS), (1, 4)
    kept = [batch for index, batch in enumerate(items) if index not in overflows]
    model, optimizer, plain = started(pilora())
    if dtype is None:
        Loop(model, optimizer, plain).run(kept)
    model, optimizer, controller = started(pilora())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for index, batch in enumerate(items):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(**batch).loss
        scaler.scale(loss * (float("inf") if index in overflows else 1.0)).backward()
        before = controller.run.step
        scaler.step(optimizer)
        scaler.update()
        controller.step()
        assert (controller.run.step == before) == (index in overflows)
        optimizer.zero_grad()
    assert controller.run.neurons is not None
    assert controller.run.neurons["looks"] == INITIAL // 2
    assert [entry["left_out"] for entry in controller.run.decisions] == [0]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if dtype is None:
        assert same_counts(counted(controller), counted(plain))
        assert splits(controller) == splits(plain)


def spoilt(loop: Loop, steps: set[int], items: Any) -> None:
    """Gradients that are no numbers in some steps, which the loop sees and does not use."""
    for index, batch in enumerate(items, 1):
        factor = float("nan") if index in steps else 1.0
        (loop.model(**batch).loss * factor).backward()
        if index in steps:
            for parameter in loop.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
        loop.optimizer.step()
        loop.controller.step()
        loop.optimizer.zero_grad()


def test_a_look_at_nan_is_left_out_and_counted() -> None:
    loop, controller = standing(pilora())
    spoilt(loop, {2}, data(count=INITIAL))
    (entry,) = controller.run.decisions
    assert (entry["left_out"], entry["looks"]) == (1, 1)
    assert controller.run.neurons is not None
    assert {found["looks"] for found in controller.run.neurons["targets"].values()} == {1}
    alone, other = standing(pilora(interval=4))
    alone.run(data(count=INITIAL))
    assert same_counts(counted(controller), counted(other))


def test_without_any_finite_look_the_split_is_refused_and_nothing_has_changed() -> None:
    loop, controller = standing(pilora())
    before = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
    with pytest.raises(gr.MeasurementError, match="no look at finite gradients"):
        spoilt(loop, {2, 4}, data(count=INITIAL))
    assert all(torch.equal(before[n], p) for n, p in loop.model.named_parameters())
    controller.close()
    assert hooked(loop.optimizer) == 0
    chance, other = standing(pilora(rule="random"))
    spoilt(chance, {2, 4}, data(count=INITIAL))
    assert other.run.neurons is not None
    assert other.run.neurons["looks"] == 0
    assert other.run.neurons["maps"] == {}
    assert other.run.decisions[0]["left_out"] == 2


# --- what takes part ---------------------------------------------------------------------------


def test_looking_does_not_change_training() -> None:
    """Before the split a run is that of plain LoRA."""
    found = []
    for watched in (True, False):
        model = reserved(pilora(), lora_dropout=0.1)
        optimizer = adamw(model, 2e-2)
        torch.manual_seed(3)
        controller = gr.Controller(model, optimizer, pilora(), BUDGET, STEPS)
        if not watched:
            controller.close()
        for batch in data(count=INITIAL - 1):
            model(**batch).loss.backward()
            optimizer.step()
            if watched:
                controller.step()
            optimizer.zero_grad()
        controller.close()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_a_target_that_no_gradient_reaches_is_not_counted() -> None:
    """Its look does not count, and none of its rows is dominant."""
    method = pilora(interval=1)
    model = reserved(method, trained=True)
    name = next(iter(factors(model)))[0]
    module = model.get_submodule("base_model.model." + name)
    module.register_forward_hook(lambda *_: _[2].detach())
    optimizer = adamw(model, 2e-2)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    Loop(model, optimizer, controller).run(data(count=INITIAL))
    assert controller.run.neurons is not None
    targets = controller.run.neurons["targets"]
    assert (targets[name]["looks"], targets[name]["dominant_rows"]) == (0, 0)
    assert {e["looks"] for n, e in targets.items() if n != name} == {INITIAL}


def freeze(model: nn.Module, factor: str) -> None:
    for name, parameter in model.named_parameters():
        if f".lora_{factor}." in name:
            parameter.requires_grad_(False)


@pytest.mark.parametrize(("frozen", "start"), [("A", "restart"), ("A", "warm"), ("B", "warm")])
def test_a_frozen_factor_is_counted_without_and_stays_frozen(frozen: str, start: str) -> None:
    method = pilora(start=start)
    model = reserved(method, trained=True)
    freeze(model, frozen)
    optimizer = adamw(model, 2e-2)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    loop = Loop(model, optimizer, controller).run(data(count=STEPS))
    assert same_counts(counted(controller), loop.hits)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not any(f".lora_{frozen}." in name for name in trained)
    gr.settle(model)


def test_a_frozen_b_that_would_begin_again_at_zero_is_refused() -> None:
    model = reserved(pilora(), trained=True)
    freeze(model, "B")
    optimizer = adamw(model, 2e-2)
    with pytest.raises(gr.SurgeryError, match=r"B of 14 layers .* is frozen: .* start=warm"):
        gr.Controller(model, optimizer, pilora(), BUDGET, STEPS)
    assert hooked(optimizer) == 0


def test_another_learning_rate_per_factor_survives_the_split() -> None:
    """LoRA+: both blocks of B stay in the group of B."""
    model = reserved(pilora())
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if ".lora_A." in n], "lr": 1e-3},
        {"params": [p for n, p in named if ".lora_B." in n], "lr": 1e-2},
    ]
    optimizer = torch.optim.AdamW(groups)
    controller = gr.Controller(model, optimizer, pilora(), BUDGET, STEPS)
    Loop(model, optimizer, controller).run(data(count=STEPS))
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    for site in lora_sites(model, "default").values():
        for factor, raw in site.learned().items():
            assert id(raw) in held[factor != "A"]
    assert sum(map(len, held)) == sum(p.requires_grad for p in model.parameters())


def test_a_second_adapter_is_left_alone() -> None:
    model = adapted(rank=4)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    other = {n: p.detach().clone() for n, p in model.named_parameters() if ".other." in n}
    gr.reserve(model, pilora(), BUDGET, adapter="default")
    optimizer = adamw(model, 2e-2)
    controller = gr.Controller(model, optimizer, pilora(), BUDGET, STEPS, adapter="default")
    Loop(model, optimizer, controller).run(data(count=STEPS))
    assert controller.run.neurons
    assert all(torch.equal(other[n], p) for n, p in model.named_parameters() if ".other." in n)


def test_the_optimizer_begins_afresh_or_goes_on() -> None:
    for start, fresh in (("restart", True), ("warm", False)):
        model, optimizer, controller = started(pilora(start=start))
        Loop(model, optimizer, controller).run(data(count=INITIAL))
        kept = [s for s in optimizer.state.values() if any(torch.is_tensor(v) for v in s.values())]
        assert bool(kept) != fresh, start


def test_a_whole_run_leaves_no_hook() -> None:
    model, optimizer, _ = whole(pilora(interval=1))
    assert hooked(optimizer) == 0
    assert not [n for n, p in model.named_parameters() if p._post_accumulate_grad_hooks]
