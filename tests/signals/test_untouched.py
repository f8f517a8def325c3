"""Measuring leaves no trace on the model or the process, however it ends."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradrank as gr
from cases import CASES, Case, batches
from gradrank.signals import measure as measuring
from gradrank.signals.untouched import untouched

LLAMA = CASES["llama"]
SIGNALS = ["spectrum", "mean-gradient"]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that measuring might leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    config = getattr(model, "config", None)
    return {
        "hooks": [len(getattr(m, kind)) for m in model.modules() for kind in hooks],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "grad id": [id(p.grad) for p in model.parameters() if p.grad is not None],
        "weights": [p.tolist() for p in model.parameters()],
        "dropout": [v for m in model.modules() for k, v in vars(m).items() if "drop" in k],
        "config": config.to_dict() if config is not None else None,
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),  # noqa: NPY002 - the legacy state is the subject
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


def odd_model(case: Case = LLAMA, checkpointing: bool = False) -> nn.Module:
    """A model with mixed flags, mixed modes and gradients in place."""
    model = case.model().train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": True})
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        if index % 4 == 0:
            parameter.grad = torch.full_like(parameter, float(index))
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_left_after_success(case: Case, checkpointing: bool) -> None:
    model, data = odd_model(case, checkpointing), batches(case, 2)
    before = snapshot(model)
    gr.measure(model, data, SIGNALS, num_batches=2)
    assert snapshot(model) == before


def test_the_snapshot_catches_each_kind_of_trace() -> None:
    changes: list[Callable[[nn.Module], object]] = [
        lambda m: next(m.modules()).register_forward_hook(lambda *_: None),
        lambda m: m.lm_head.register_full_backward_hook(lambda *_: None),
        lambda m: m.lm_head.weight.requires_grad_(not m.lm_head.weight.requires_grad),
        lambda m: m.model.train(not m.model.training),
        lambda m: setattr(m.model.norm.weight, "grad", torch.ones(32)),
        lambda m: setattr(m.config, "use_cache", not m.config.use_cache),
        lambda _: torch.rand(1),
        lambda _: random.random(),
    ]
    for change in changes:
        model = odd_model()
        before = snapshot(model)
        change(model)
        assert snapshot(model) != before


class StopError(Exception):
    pass


def raising(error: type[BaseException]) -> Callable[..., Any]:
    def stop(*_: Any, **__: Any) -> Any:
        raise error

    return stop


def failing_backward(model: nn.Module, batch: Any) -> Tensor:
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_ctx: Any, *_grads: Any) -> Any:
            raise StopError

    hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
    return Fail.apply(hidden).sum()


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "loss", "backward", "probe", "end", "progress"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_left_after_a_failure(
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: type[BaseException],
    checkpointing: bool,
) -> None:
    model, data = odd_model(checkpointing=checkpointing), batches(LLAMA, 2)
    options: dict[str, Any] = {}
    if where == "forward":
        data[1]["input_ids"] = data[1]["input_ids"] + 10_000
        error = IndexError
    elif where == "backward":
        options["loss_function"] = failing_backward
        error = StopError
    elif where == "loss":
        options["loss_function"] = raising(error)
    elif where == "progress":
        options["progress"] = raising(error)
    else:
        method = {"probe": "on_output_grad", "end": "end_batch"}[where]
        monkeypatch.setattr(measuring.SketchProbe, method, raising(error))
    before = snapshot(model)
    with pytest.raises(error):
        gr.measure(model, data, num_batches=2, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_nothing_is_left_after_a_failure_of_the_data(error: type[BaseException]) -> None:
    def stream() -> Iterator[Any]:
        torch.rand(3)
        yield batches(LLAMA, 1)[0]
        raise error

    model = odd_model()
    before = snapshot(model)
    with pytest.raises(error):
        gr.measure(model, stream(), num_batches=2)
    assert snapshot(model) == before


def test_a_loader_that_shuffles_leaves_the_random_state_and_is_seeded() -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(3, 27).reshape(8, 3))

    def loader() -> Any:
        return torch.utils.data.DataLoader(
            dataset,
            batch_size=2,
            shuffle=True,
            collate_fn=lambda rows: {
                "input_ids": torch.stack([row[0] for row in rows]),
                "labels": torch.stack([row[0] for row in rows]),
            },
        )

    model = odd_model()
    before = snapshot(model)
    first = gr.measure(model, loader(), num_batches=4, seed=5)
    assert snapshot(model) == before
    torch.rand(7)
    again = gr.measure(model, loader(), num_batches=4, seed=5)
    other = gr.measure(model, loader(), num_batches=4, seed=6)
    name = first.targets[0].name
    assert torch.equal(first.gram(name), again.gram(name))
    assert not torch.allclose(first.gram(name), other.gram(name), rtol=1e-3)


def test_an_endless_stream_is_read_no_further_than_needed() -> None:
    taken = []

    def stream() -> Iterator[Any]:
        while True:
            taken.append(1)
            yield batches(LLAMA, 1)[0]

    found = gr.measure(LLAMA.model(), stream(), num_batches=3, accumulate=2)
    assert found.batches == 3
    assert len(taken) == 6


def test_the_guard_restores_a_model_without_configuration() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    model[1].eval()
    before = snapshot(model)

    def fail_inside() -> None:
        with untouched(model, 0):
            assert not any(p.requires_grad for p in model.parameters())
            assert not any(m.training for m in model.modules())
            torch.rand(2)
            raise StopError

    with pytest.raises(StopError):
        fail_inside()
    assert snapshot(model) == before


def test_measuring_under_no_grad_works_and_keeps_it() -> None:
    model, data = LLAMA.model(), batches(LLAMA, 2)
    wanted = gr.measure(model, data, num_batches=2)
    with torch.no_grad():
        found = gr.measure(model, data, num_batches=2)
        assert not torch.is_grad_enabled()
    name = wanted.targets[0].name
    assert torch.equal(found.gram(name), wanted.gram(name))
