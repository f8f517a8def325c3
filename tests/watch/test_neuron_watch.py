"""What a watch of neurons keeps between looks: copies, maps, and what was left out."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

import gradrank as gr
from dynamic_cases import adamw, data
from gradrank.core.partition import NeuronPartition
from gradrank.methods.course import Decision
from gradrank.watch import neurons
from gradrank.watch.neurons import CELLS, MAPS, NeuronWatch, pictured
from neurons.neuron_runs import BUDGET, STEPS, pilora, reserved, row_sums


def watched(**options: Any) -> tuple[Any, Any, NeuronWatch, Any]:
    method = pilora(**options)
    model = reserved(method, trained=True)
    optimizer = adamw(model, 0.0)
    controller = gr.Controller(model, optimizer, method, BUDGET, STEPS)
    controller.close()
    run = controller.run
    course: Any = run.course
    return model, optimizer, NeuronWatch(model, optimizer, course, run._targets, "default"), run


def step(model: Any, optimizer: Any, index: int = 0, factor: float = 1.0) -> None:
    (model(**data()[index]).loss * factor).backward()
    optimizer.step()


def test_only_steps_that_are_looked_at_cost_copies() -> None:
    model, optimizer, watch, run = watched(interval=3)
    copied = []
    for number in range(1, 7):
        watch.before_step(number)
        copied.append(sum(bool(p._post_accumulate_grad_hooks) for p in model.parameters()))
        step(model, optimizer)
        watch.after_step(number)
        optimizer.zero_grad()
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    trained = sum(p.requires_grad for p in model.parameters())
    # The first stage has four steps.
    assert copied == [0, 0, trained, 0, 0, 0]
    assert set(run.course.looks.values()) == {1}
    watch.close()
    watch.close()


def test_a_look_does_not_wait_for_a_second_one_before_it_can_be_saved() -> None:
    """After one look the map before and the map after are one."""
    model, optimizer, watch, run = watched(interval=1)
    watch.before_step(1)
    step(model, optimizer)
    state = watch.state()
    assert torch.equal(load(save(state))["neurons/left_out"], torch.tensor([0]))
    before = {k: t for k, t in state.items() if k.startswith("maps/before/")}
    assert before
    assert all(torch.equal(t, state[k.replace("before", "after")]) for k, t in before.items())
    watch.before_step(2)
    step(model, optimizer, 1)
    later = watch.state()
    assert all(torch.equal(later[key], cells) for key, cells in before.items())
    assert not all(torch.equal(later[k.replace("before", "after")], t) for k, t in before.items())
    fresh = watched(interval=1)[2]
    fresh.restore(load(save(later)))
    assert fresh.state().keys() == later.keys()
    assert all(torch.equal(fresh.state()[key], later[key]) for key in later)
    assert run.course.looks


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_look_that_is_not_finite_leaves_counts_and_maps_alone(factor: float) -> None:
    model, optimizer, watch, run = watched(interval=1)
    watch.before_step(1)
    model(**data()[0]).loss.backward()
    first = row_sums(model)
    optimizer.step()
    optimizer.zero_grad()
    state, counts = watch.state(), copy.deepcopy(run.course.state())
    assert any(found.any() for found in first.values())
    watch.before_step(2)
    (model(**data()[1]).loss * factor).backward()
    for parameter in model.parameters():
        parameter.grad = None
    optimizer.step()
    assert watch.left_out == 1
    later = watch.state()
    assert int(later.pop("neurons/left_out")) == 1
    assert all(torch.equal(later[key], state[key]) for key in later)
    assert all(torch.equal(counts[key], found) for key, found in run.course.state().items())


def test_pictured_are_the_last_targets_of_the_deepest_block() -> None:
    blocks = [gr.Target(f"layers.{i}.m{k}", 4, 4) for i in range(3) for k in range(MAPS + 2)]
    found = pictured((*blocks, gr.Target("head", 4, 4)))
    assert found == tuple(f"layers.2.m{k}" for k in range(2, MAPS + 2))
    flat = tuple(gr.Target(name, 4, 4) for name in ("first", "second", "head"))
    assert pictured(flat) == ("first", "second", "head")
    assert pictured(()) == ()


def test_the_first_process_decides_which_rows_are_dominant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows travel in words of 32; what this process chose itself does not matter."""
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (
        {
            str(rows): NeuronPartition.of(
                (torch.rand(rows, generator=generator) < 0.5).tolist(), 3, 1
            )
            for rows in (1, 31, 32, 33, 64, 100)
        }
        for _ in range(2)
    )
    sent: list[list[int]] = []
    monkeypatch.setattr(neurons, "of_first_process", lambda words: sent.append(words) or words)
    assert neurons._agreed(theirs) == theirs
    monkeypatch.setattr(neurons, "of_first_process", lambda _: sent[0])
    assert mine != theirs
    assert neurons._agreed(mine) == theirs
    assert max(sent[0]) < 2**32


def test_evidence_of_a_target_that_was_never_looked_at() -> None:
    _, _, watch, run = watched(rule="random")
    decision = Decision({}, {}, {}, partitions=run.course.split(10**6).partitions)
    found = watch.evidence(decision)
    assert found["maps"] == {}
    assert {entry["looks"] for entry in found["targets"].values()} == {0}
    assert all(entry["hits"] == [entry["d_out"]] for entry in found["targets"].values())
    assert CELLS == (64, 48)
