"""The exam of every method that moves capacity while a model trains; a new one takes it too."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dynamic_cases
import gradrank as gr
import pruning_cases
from cases import CASES, batches
from dynamic_cases import adamw, adapted
from gradrank.adapters.view import lora_sites
from gradrank.methods.course import DirectionCourse, DynamicMethod, SpectrumCourse
from gradrank.methods.method import build

NAMES = [name for name in gr.METHODS if isinstance(build(gr.METHODS[name], {}), DynamicMethod)]
STEPS, RANK, BUDGET = pruning_cases.STEPS, 4, "uniform:4"
# What a run of twelve steps needs; a method that is not here is examined with its defaults.
OPTIONS: dict[str, Mapping[str, Any]] = {
    "gard-dynamic": dynamic_cases.OPTIONS,
    **{
        name: pruning_cases.COMMON | more | {"initial_rank": 2 * RANK}
        for name, more in pruning_cases.OPTIONS.items()
    },
    "elalora": {"moves": 3, "interval": 2, "warmup": 2, "final": 3},
    "pilora": {"rank": RANK, "supplementary_rank": 1, "interval": 2, "initial_steps": 6},
}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def made(name: str) -> Any:
    return build(gr.METHODS[name], OPTIONS.get(name, {}))


def course(method: Any) -> Any:
    return method.course([gr.Target("m", 9, 9)], 90, STEPS)


def prunes(method: Any) -> bool:
    found = course(method)
    return isinstance(found, DirectionCourse) and not found.elastic


def costs(model: Any) -> dict[str, int]:
    """Parameters of every target, of two groups of rows where it is split."""
    return {
        name: site.rank * sum(_features(site))
        if site.partition is None
        else site.partition.parameters(_features(site)[0])
        for name, site in lora_sites(model, "default").items()
    }


def _features(site: Any) -> tuple[int, int]:
    return site.linear("A").in_features, site.linear("B").out_features


def started(method: Any, case: str = "llama", seed: int = 0) -> tuple[Any, Any, gr.Controller]:
    model = adapted(case, rank=RANK)
    if not isinstance(course(method), SpectrumCourse):
        gr.reserve(model, method, BUDGET)
    optimizer = adamw(model)
    return model, optimizer, gr.Controller(model, optimizer, method, BUDGET, STEPS, seed=seed)


def data(case: str = "llama") -> list[dict[str, Tensor]]:
    return batches(CASES[case], STEPS)


def train(model: Any, optimizer: Any, controller: Any, items: Sequence[Any]) -> None:
    for batch in items:
        pruning_cases.step(model, optimizer, controller, batch)


def story(model: Any, controller: gr.Controller) -> tuple[Any, ...]:
    """All that a run is: ranks and decisions over time, and the weights in the end."""
    run = controller.run
    return run.ranks_over_time, pruning_cases.timeless(controller), pruning_cases.weights(model)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def whole(method: Any, case: str = "llama", seed: int = 0) -> tuple[Any, gr.Controller]:
    model, optimizer, controller = started(method, case, seed)
    torch.manual_seed(1)
    train(model, optimizer, controller, data(case))
    return model, controller


def test_all_that_move_capacity_are_examined() -> None:
    assert set(NAMES) >= {"gard-dynamic", "igu", "igu-direction", "adalora", "pilora"}
    assert set(OPTIONS) <= set(NAMES)


def test_two_runs_are_equal_to_the_last_bit(name: str) -> None:
    first, again = (story(*whole(made(name))) for _ in range(2))
    assert same(first, again)
    assert len(first[0]) > 1, "nothing moved"


def backwards(method: Any) -> Any:
    """The same method, told of the targets in the opposite order."""

    class Backwards(type(method)):
        __slots__ = ()

        def course(self, targets: Sequence[gr.Target], budget: int, total_steps: int) -> Any:
            return type(method).course(self, targets[::-1], budget, total_steps)

    return build(Backwards, OPTIONS.get(method.name, {}))


def test_the_order_of_targets_does_not_matter(name: str) -> None:
    forward, reverse = story(*whole(made(name))), story(*whole(backwards(made(name))))
    assert same(forward[0], reverse[0])
    assert same(forward[2], reverse[2])


@pytest.mark.parametrize("case", list(CASES))
def test_the_budget_is_kept_on_every_architecture_and_the_adapter_is_stock(
    name: str, case: str, tmp_path: Path
) -> None:
    method = made(name)
    model, optimizer, controller = started(method, case)
    run, one = controller.run, pruning_cases.cost(controller)
    reserved = run.parameters
    assert reserved <= max(run.budget, run.course.allowed(0, reserved))
    for batch in data(case):
        before = controller.ranks
        train(model, optimizer, controller, [batch])
        after = controller.ranks
        allowed = run.course.allowed(run.step, reserved)
        spent = sum(costs(model).values())
        assert spent == run.parameters <= max(allowed, run.budget) or before == after
        if run.decisions and run.decisions[-1]["step"] == run.step:
            entry = run.decisions[-1]
            assert entry["parameters"] == spent <= entry["budget"] == allowed
            lost = [one[n] for n in after if after[n] < before[n]]
            if prunes(method):
                assert all(after[n] <= before[n] for n in after)
                # Nothing that went could still have been paid.
                assert allowed - spent < min(lost, default=allowed + 1)
    assert run.parameters <= run.budget
    assert [entry["step"] for entry in run.decisions] == list(run.course.schedule.decisions)
    gr.settle(model)
    stock = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    # Where rows are split, the stock adapter has zeros that nobody trained.
    assert stock == sum(rank * one[target] for target, rank in run.ranks.items())
    zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if ".lora_B." in n)
    assert stock - run.parameters <= (zeros if run.neurons else 0)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(CASES[case].model(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**data(case)[0]).logits, model.eval()(**data(case)[0]).logits)


def hooks(model: nn.Module, optimizer: Any) -> int:
    return (
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        + sum(len(m._backward_hooks) + len(m._backward_pre_hooks) for m in model.modules())
        + sum(len(p._backward_hooks or {}) for p in model.parameters())
        + len(optimizer._optimizer_step_pre_hooks)
        + len(optimizer._optimizer_step_post_hooks)
    )


def at_the_end(model: Any, optimizer: Any, controller: Any) -> None:
    with controller:
        train(model, optimizer, controller, data())


def in_the_loop(model: Any, optimizer: Any, controller: Any) -> None:
    def loop() -> None:
        with controller:
            train(model, optimizer, controller, data()[:3])
            model(**data()[3])
            raise KeyError("loop")

    with pytest.raises(KeyError, match="loop"):
        loop()


def in_the_model(model: Any, optimizer: Any, controller: Any) -> None:
    broken = data()[3] | {"labels": data()[3]["labels"][:1]}

    def loop() -> None:
        with controller:
            train(model, optimizer, controller, [*data()[:3], broken])

    with pytest.raises(ValueError, match="batch_size"):
        loop()


def by_hand(model: Any, optimizer: Any, controller: Any) -> None:
    train(model, optimizer, controller, data()[:1])
    controller.close()
    controller.close()


@pytest.mark.parametrize("ends", [at_the_end, in_the_loop, in_the_model, by_hand])
def test_no_hook_is_left(name: str, ends: Callable[..., None]) -> None:
    model, optimizer, controller = started(made(name))
    assert hooks(model, optimizer) > 0
    ends(model, optimizer, controller)
    assert hooks(model, optimizer) == 0
    loss = model(**data()[0]).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)


def test_it_resumes_in_mid_schedule_to_the_last_bit(name: str, tmp_path: Path) -> None:
    model, optimizer, controller = started(made(name))
    torch.manual_seed(1)
    for batch in data():
        train(model, optimizer, controller, [batch])
        folder = tmp_path / str(controller.run.step)
        folder.mkdir()
        save_file(get_peft_model_state_dict(model), folder / "adapter.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        controller.save(folder)
    want = story(model, controller)
    for step in range(1, STEPS, 2):
        folder = tmp_path / str(step)
        again, fresh, resumed = started(made(name))
        resumed.restore(folder)
        _load(again, folder)
        fresh.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        train(again, fresh, resumed, data()[step:])
        assert same(story(again, resumed), want), step


def _load(model: Any, folder: Path) -> None:
    """What a loop does with any adapter; targets that have lost theirs are in no file."""
    set_peft_model_state_dict(model, load_file(folder / "adapter.safetensors"))
    assert lora_sites(model, "default")
