"""The controller in loops of one's own: ranks move, the budget holds, mistakes are told."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gradrank as gr
from cases import CASES, batches
from dynamic_cases import (
    OPTIONS,
    RANK,
    STEPS,
    adamw,
    adapted,
    adapter_weights,
    data,
    hooks,
    method,
    parameters,
    same_tensors,
)
from gradrank.adapters import sidecar

DUE = [2, 4, 6]


def train(
    model: nn.Module,
    optimizer: Any,
    controller: gr.Controller,
    items: list[dict[str, Tensor]],
) -> list[float]:
    losses = []
    for batch in items:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        assert parameters(model) <= controller.run.budget
    return losses


# --- ranks move --------------------------------------------------------------------------------


def test_ranks_move_within_the_budget_on_every_architecture(tmp_path: Path) -> None:
    for case in CASES:
        model = adapted(case)
        bare = hooks(model)
        optimizer = adamw(model)
        controller = gr.Controller(model, optimizer, method(), f"uniform:{RANK}", STEPS)
        started = dict(controller.ranks)
        assert set(started.values()) == {RANK}
        losses = train(model, optimizer, controller, data(case))
        assert all(torch.isfinite(torch.tensor(losses)))
        assert [entry["step"] for entry in controller.run.decisions] == DUE
        ranks = controller.ranks
        assert len(set(ranks.values())) > 1, case
        assert all(1 <= rank <= 2 * RANK for rank in ranks.values())
        assert (
            parameters(model)
            == sum(entry.parameters for entry in _planned(controller))
            <= controller.run.budget
        )
        assert hooks(model) == bare
        _same_after_reload(model, case, tmp_path / case)


def _planned(controller: gr.Controller) -> list[gr.PlannedTarget]:
    ranks = controller.ranks
    return [gr.PlannedTarget(t, ranks[t.name]) for t in controller.run._targets]


def _same_after_reload(model: Any, case: str, folder: Path) -> None:
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(CASES[case].model(), folder).eval()
    batch = data(case, 1)[0]
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


def test_ranks_over_time_and_decisions_tell_the_same_story() -> None:
    model = adapted()
    optimizer = adamw(model)
    controller = gr.Controller(model, optimizer, method(max_delta=1), f"uniform:{RANK}", STEPS)
    train(model, optimizer, controller, data())
    run = controller.run
    assert run.ranks_over_time[0] == [0, dict.fromkeys(controller.ranks, RANK)]
    assert run.ranks_over_time[-1][1] == controller.ranks
    steps = [step for step, _ in run.ranks_over_time]
    assert steps == [0, *(entry["step"] for entry in run.decisions if entry["changed"])]
    cost = {target.name: target.cost for target in run._targets}
    for (_, old), (step, new) in zip(run.ranks_over_time, run.ranks_over_time[1:], strict=False):
        entry = next(e for e in run.decisions if e["step"] == step)
        assert max(abs(new[name] - old[name]) for name in new) == 1
        assert entry["changed"] == sum(new[name] != old[name] for name in new)
        assert entry["moved"] == sum(max(new[n] - old[n], 0) * cost[n] for n in new)
        assert entry["parameters"] == sum(new[n] * cost[n] for n in new) <= entry["budget"]
        assert set(entry["effective_rank"]) == set(entry["smoothed"]) == set(new)
    json.dumps(run.decisions, allow_nan=False)


def test_a_spared_budget_is_grown_into() -> None:
    model = adapted(rank=1)
    optimizer = adamw(model)
    controller = gr.Controller(model, optimizer, method(), "uniform:3", STEPS)
    before = parameters(model)
    train(model, optimizer, controller, data())
    assert before < parameters(model) <= controller.run.budget
    slack = controller.run.budget - parameters(model)
    assert slack < max(target.cost for target in controller.run._targets)


def test_two_runs_with_one_seed_are_equal_to_the_last_bit_and_seeds_matter() -> None:
    def run(seed: int) -> dict[str, Tensor]:
        model = adapted()
        optimizer = adamw(model)
        controller = gr.Controller(model, optimizer, method(), "uniform:4", STEPS, seed=seed)
        train(model, optimizer, controller, data())
        return adapter_weights(model)

    first = run(0)
    assert same_tensors(first, run(0))
    assert not same_tensors(first, run(1))


@pytest.mark.parametrize("options", [{"grow": "gradient"}, {"shrink": "norm"}, {"freeze_after": 5}])
def test_every_way_to_move_capacity_trains(options: dict[str, Any]) -> None:
    model = adapted()
    optimizer = adamw(model)
    controller = gr.Controller(model, optimizer, method(**options), "uniform:4", STEPS)
    losses = train(model, optimizer, controller, data())
    assert all(loss < 10 for loss in losses)
    assert len(controller.run.ranks_over_time) > 1
    if "freeze_after" in options:
        assert [entry["step"] for entry in controller.run.decisions] == [2, 4]


# --- loops of other shapes ---------------------------------------------------------------------


def test_gradient_accumulation_may_call_step_after_every_micro_batch() -> None:
    def run(every_micro_batch: bool) -> tuple[dict[str, int], dict[str, Tensor]]:
        model = adapted()
        optimizer = adamw(model)
        controller = gr.Controller(model, optimizer, method(), "uniform:4", STEPS)
        for index, batch in enumerate(data(count=2 * STEPS)):
            (model(**batch).loss / 2).backward()
            if index % 2:
                optimizer.step()
            if index % 2 or every_micro_batch:
                controller.step()
            if index % 2:
                optimizer.zero_grad()
        controller.finish()
        return controller.ranks, adapter_weights(model)

    (ranks, weights), (plain_ranks, plain_weights) = run(True), run(False)
    assert ranks == plain_ranks
    assert same_tensors(weights, plain_weights)
    assert len(set(ranks.values())) > 1


def test_accelerates_accumulation_gives_the_same_as_a_plain_loop() -> None:
    items = data(count=2 * STEPS)
    model = adapted()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, adamw(model))
    with gr.Controller(prepared, optimizer, method(), "uniform:4", STEPS) as controller:
        for batch in items:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                optimizer.step()
                controller.step()
                optimizer.zero_grad()
    assert [entry["step"] for entry in controller.run.decisions] == DUE

    plain = adapted()
    own = adamw(plain)
    with gr.Controller(plain, own, method(), "uniform:4", STEPS) as twin:
        for start in range(0, len(items), 2):
            for batch in items[start : start + 2]:
                (plain(**batch).loss / 2).backward()
            own.step()
            twin.step()
            own.zero_grad()
    assert controller.ranks == twin.ranks
    assert len(set(twin.ranks.values())) > 1
    assert same_tensors(adapter_weights(model), adapter_weights(plain))


def test_a_step_that_a_gradient_scaler_skips_counts_for_nothing() -> None:
    model = adapted()
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    controller = gr.Controller(model, optimizer, method(), "uniform:4", STEPS)
    skipped = 0
    for index, batch in enumerate(data(count=STEPS + 1)):
        loss = model(**batch).loss
        scaler.scale(loss * (float("inf") if index == 3 else 1.0)).backward()
        before = controller.run.step
        scaler.step(optimizer)
        scaler.update()
        assert controller.step() is None or index != 3
        skipped += controller.run.step == before
        optimizer.zero_grad()
    assert skipped == 1
    assert controller.run.step == STEPS
    assert [entry["step"] for entry in controller.run.decisions] == DUE
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_learning_rate_scheduler_and_clipping_work_beside_it() -> None:
    model = adapted()
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    controller = gr.Controller(model, optimizer, method(), "uniform:4", STEPS)
    for batch in data():
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1)
        optimizer.step()
        controller.step()
        schedule.step()
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-2 / (1 + STEPS))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


# --- what goes wrong is told -------------------------------------------------------------------


def controlled(**changes: Any) -> tuple[Any, torch.optim.AdamW, gr.Controller]:
    model = adapted()
    optimizer = adamw(model)
    given = {"method": method(), "budget": "uniform:4", "total_steps": STEPS} | changes
    return model, optimizer, gr.Controller(model, optimizer, **given)


def test_a_controller_that_was_never_stepped_says_so() -> None:
    model, optimizer, controller = controlled()
    model(**data()[0]).loss.backward()
    optimizer.step()
    with pytest.raises(gr.SurgeryError, match=r"never stepped\. Call controller\.step\(\)"):
        controller.finish()
    assert hooks(model) == 0


def test_a_controller_whose_optimizer_never_stepped_says_so() -> None:
    model, _, controller = controlled()
    other = adamw(model)
    train(model, other, controller, data())
    with pytest.raises(gr.SurgeryError, match=r"its optimizer made no step \(8 calls"):
        controller.finish()


def test_a_run_that_ends_before_the_first_decision_says_when_it_would_have_been() -> None:
    model, optimizer, controller = controlled(method=method(interval=5))
    train(model, optimizer, controller, data()[:3])
    with pytest.raises(
        gr.SurgeryError, match=r"never acted: the run ended after step 3, .* due after step 5"
    ):
        controller.finish()


def test_an_optimizer_that_steps_twice_without_the_controller_is_stopped() -> None:
    model, optimizer, controller = controlled()
    train(model, optimizer, controller, data()[:1])
    model(**data()[0]).loss.backward()
    optimizer.step()
    model(**data()[0]).loss.backward()
    with pytest.raises(gr.SurgeryError, match=r"ran twice and controller\.step\(\) did not"):
        optimizer.step()
    assert hooks(model) == 0
    # From then on it is left alone.
    optimizer.step()


def _breaks_off(controller: gr.Controller, model: nn.Module) -> None:
    with controller:
        assert hooks(model) > 0
        raise ZeroDivisionError


def test_leaving_the_block_by_an_exception_removes_the_hooks_and_hides_nothing() -> None:
    model, optimizer, controller = controlled()
    with pytest.raises(ZeroDivisionError):
        _breaks_off(controller, model)
    assert hooks(model) == 0
    optimizer.step()
    optimizer.step()


def test_leaving_the_block_too_early_is_an_error() -> None:
    model, optimizer, controller = controlled()
    with pytest.raises(gr.SurgeryError, match="never acted"), controller:
        train(model, optimizer, controller, data()[:1])


def test_what_cannot_work_is_refused_before_the_first_step() -> None:
    model = adapted()
    optimizer = adamw(model)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (gr.OptionError, "method 'gard' decides once, before training", {"method": "gard"}),
        (gr.OptionError, "Did you mean 'gard-dynamic'", {"method": "gard-dynamik"}),
        (gr.OptionError, r"total_steps is 0; a schedule needs", {"total_steps": 0}),
        (gr.OptionError, r"would never move any capacity: in 2 steps", {"total_steps": 2}),
        (gr.OptionError, "belong to the method object", {"options": {"beta": 0.1}}),
        (
            gr.BudgetError,
            r"adapter has 3,712 .*more than the budget of 2,784",
            {"budget": "uniform:3"},
        ),
        (gr.SurgeryError, "adapter 'other' is unknown. Known: default", {"adapter": "other"}),
    ]
    for kind, message, changes in cases:
        given = {"method": method(), "budget": "uniform:4", "total_steps": STEPS} | changes
        with pytest.raises(kind, match=message):
            gr.Controller(model, optimizer, **given)
    assert hooks(model) == 0
    assert not optimizer._optimizer_step_post_hooks


def test_the_wrong_optimizer_is_refused() -> None:
    model, other = adapted(), adapted()
    with pytest.raises(gr.SurgeryError, match="not in the optimizer; build the optimizer after"):
        gr.Controller(model, adamw(other), method(), "uniform:4", STEPS)


def test_a_model_without_adapter_is_refused() -> None:
    model = CASES["llama"].model()
    with pytest.raises(gr.SurgeryError, match="carries no PEFT adapter"):
        gr.Controller(model, adamw(model), method(), "uniform:4", STEPS)


def test_a_compiled_model_is_refused() -> None:
    model = adapted()
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(gr.SurgeryError, match=r"is compiled .*without torch\.compile"):
        gr.Controller(compiled, adamw(model), method(), "uniform:4", STEPS)
    inner = adapted()
    inner.base_model.model.model.layers[1].compile(backend="eager")
    with pytest.raises(gr.SurgeryError, match="is compiled"):
        gr.Controller(inner, adamw(inner), method(), "uniform:4", STEPS)


def test_a_method_by_name_takes_options_as_text() -> None:
    model = adapted()
    options = {key: str(value) for key, value in OPTIONS.items()}
    optimizer = adamw(model)
    controller = gr.Controller(model, optimizer, "gard-dynamic", "uniform:4", 8, options=options)
    train(model, optimizer, controller, data())
    assert [entry["step"] for entry in controller.run.decisions] == DUE


def test_a_step_without_backward_pass_is_told() -> None:
    model, optimizer, controller = controlled()
    optimizer.step()
    with pytest.raises(gr.MeasurementError, match="no output gradient arrived"):
        controller.step()
    controller.close()
    assert hooks(model) == 0


# --- resume ------------------------------------------------------------------------------------


def checkpoint(folder: Path, model: Any, optimizer: Any, controller: gr.Controller) -> None:
    folder.mkdir()
    save_file(get_peft_model_state_dict(model), folder / "adapter.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    controller.save(folder)


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_a_loop_resumes_to_the_same_ranks_and_weights_from_every_step(
    grow: str, tmp_path: Path
) -> None:
    model = adapted()
    optimizer = adamw(model)
    controller = gr.Controller(model, optimizer, method(grow=grow), "uniform:4", STEPS)
    for step, batch in enumerate(data(), 1):
        train(model, optimizer, controller, [batch])
        checkpoint(tmp_path / str(step), model, optimizer, controller)
    whole, ranks = adapter_weights(model), controller.ranks
    assert len(set(ranks.values())) > 1
    for step in range(1, STEPS):
        folder = tmp_path / str(step)
        again = adapted()
        fresh = adamw(again)
        resumed = gr.Controller(again, fresh, method(grow=grow), "uniform:4", STEPS)
        resumed.restore(folder)
        set_peft_model_state_dict(again, load_file(folder / "adapter.safetensors"))
        fresh.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        train(again, fresh, resumed, data()[step:])
        assert resumed.ranks == ranks, step
        assert same_tensors(adapter_weights(again), whole), step
        assert _timeless(resumed) == _timeless(controller)
        assert resumed.run.ranks_over_time == controller.run.ranks_over_time


def _timeless(controller: gr.Controller) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "seconds"} for e in controller.run.decisions]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint after step 5, when ranks have moved twice."""
    model, optimizer, controller = controlled()
    train(model, optimizer, controller, data()[:5])
    controller.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": method(beta=0.9)}, "options"),
        ({"budget": "uniform:5"}, "budget 3712 -> 4640"),
        ({"total_steps": 9}, "total_steps 8 -> 9"),
        ({"seed": 3}, "seed 0 -> 3"),
    ],
)
def test_a_state_of_a_run_with_other_settings_is_refused_by_name(
    changes: dict[str, Any], named: str, saved: Path
) -> None:
    _, _, controller = controlled(**changes)
    with pytest.raises(gr.OptionError, match=f"made with other settings: {named}"):
        controller.restore(saved)
    controller.close()


def test_a_missing_or_damaged_state_is_refused(saved: Path, tmp_path: Path) -> None:
    _, _, controller = controlled()
    with pytest.raises(gr.DataError, match="holds no gradrank_capacity"):
        controller.restore(tmp_path / "nothing")
    path = saved / sidecar.FILE
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(gr.DataError, match="damaged"):
            controller.restore(saved)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(gr.DataError, match="no sidecar"):
        controller.restore(saved)
    controller.close()


def _set(key: str, value: Any) -> Any:
    return lambda facts: facts | {key: value}


@pytest.mark.parametrize(
    "change",
    [
        _set("ranks", {}),
        _set("ranks", "many"),
        _set("ranks", {"a": "b"}),
        _set("scaling", None),
        _set("step", "last"),
        lambda facts: {k: v for k, v in facts.items() if k != "decisions"},
    ],
    ids=["no ranks", "ranks as text", "wrong ranks", "no scaling", "step as text", "no decisions"],
)
def test_a_state_with_nonsense_in_it_is_refused_as_damaged(change: Any, saved: Path) -> None:
    facts, tensors = sidecar.read(saved / sidecar.FILE)
    sidecar.write(saved / sidecar.FILE, change(facts), tensors)
    _, _, controller = controlled()
    with pytest.raises(gr.GradrankError):
        controller.restore(saved)
    controller.close()


def test_saving_changes_nothing_and_needs_no_decision(tmp_path: Path) -> None:
    model, optimizer, controller = controlled()
    controller.save(tmp_path)
    before = adapter_weights(model)
    controller.save(tmp_path)
    assert same_tensors(before, adapter_weights(model))
    train(model, optimizer, controller, data())
    other, plain, twin = controlled()
    train(other, plain, twin, data())
    assert same_tensors(adapter_weights(model), adapter_weights(other))
    assert sorted(path.name for path in tmp_path.iterdir()) == [sidecar.FILE]


def test_a_second_adapter_is_left_alone() -> None:
    model = adapted()
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("default")
    optimizer = adamw(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".second." in n}
    with gr.Controller(
        model, optimizer, method(), "uniform:4", STEPS, adapter="default"
    ) as controller:
        for batch in batches(CASES["llama"], STEPS):
            model(**batch).loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()
    assert len(set(controller.ranks.values())) > 1
    after = {n: p for n, p in model.named_parameters() if ".second." in n}
    assert same_tensors(before, after)


def test_an_abandoned_controller_speaks_up_when_the_process_ends(tmp_path: Path) -> None:
    script = tmp_path / "loop.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, gradrank as gr\n"
        "from cases import tiny_llama\n"
        "from peft import LoraConfig, get_peft_model\n"
        "model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules='all-linear'))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "controller = gr.Controller(model, optimizer, 'gard-dynamic', 'uniform:2', 99)\n"
    )
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, str(script), tests], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the controller never acted" in done.stderr
    assert "made no step" in done.stderr
