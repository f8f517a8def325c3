"""All or nothing: whatever fails on the way, model and optimizer are as they were, bitwise."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gradrank as gr
from adapters.surgery_cases import everything, same, sites, step_of, trained
from cases import CASES
from gradrank.adapters import stores, surgery, swap
from gradrank.adapters.optimizers import OptimizerChange
from gradrank.adapters.reserve import reserve_ranks
from gradrank.core.errors import SurgeryError

LLAMA = CASES["llama"]


class FailureError(RuntimeError):
    pass


def failing(real: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function, whose call number ``at`` fails before it does anything."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise FailureError(f"call {at}")
        return real(*args, **kwargs)

    return wrapped


def halfway(real: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which does its work and then fails."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        real(*args, **kwargs)
        raise FailureError("afterwards")

    return wrapped


def edits_of(model: Any, drop: bool = True) -> dict[str, Any]:
    kinds = [gr.Shrink(2), gr.Grow(6), gr.Shrink(1, "norm"), gr.Drop() if drop else gr.Shrink(3)]
    return {name: kinds[i % 4] for i, name in enumerate(sites(model))}


def check_undone(model: Any, optimizer: Any, patch: Callable[[], None], drop: bool = True) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = everything(model, optimizer)
    patch()
    with pytest.raises(SurgeryError, match=r"was undone.*FailureError") as caught:
        gr.edit(model, edits_of(model, drop), optimizer)
    assert isinstance(caught.value.__cause__, FailureError)
    after = everything(model, optimizer)
    for key, value in before.items():
        assert same(after[key], value), key


WRITES = [
    (swap.nn, "Parameter", 1),
    (swap.nn, "Parameter", 8),
    (swap, "layer_alpha", 1),
    (swap, "layer_alpha", 9),
    (surgery, "fresh_rows", 2),
    (surgery, "truncate", 3),
    (surgery, "sync_config", 1),
    (surgery, "name_targets", 1),
]
STATE_WRITES = [
    (swap, "carry_state", 1),
    (swap, "carry_state", 6),
    (OptimizerChange, "replace", 1),
    (OptimizerChange, "replace", 7),
    (OptimizerChange, "remove", 1),
    (OptimizerChange, "remove", 4),
]


def named(entries: list[Any]) -> list[str]:
    return [f"{name}-{at}" for _, name, at in entries]


@pytest.mark.parametrize("held", [True, False], ids=["optimizer", "none"])
@pytest.mark.parametrize("write", WRITES, ids=named(WRITES))
def test_a_failing_write_undoes_everything(
    write: Any, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, at = write
    model, optimizer = trained()
    broken = failing(getattr(where, name), at)
    check_undone(
        model, optimizer if held else None, lambda: monkeypatch.setattr(where, name, broken)
    )


@pytest.mark.parametrize("kind", ["adamw", "momentum", "adafactor"])
@pytest.mark.parametrize("write", STATE_WRITES, ids=named(STATE_WRITES))
def test_a_failing_write_of_state_undoes_everything(
    write: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, at = write
    model, optimizer = trained(LLAMA, kind)
    broken = failing(getattr(where, name), at)
    check_undone(model, optimizer, lambda: monkeypatch.setattr(where, name, broken))


@pytest.mark.parametrize("name", ["sync_config", "name_targets"])
def test_a_configuration_that_was_half_written_is_restored(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"q_proj": 3},
        layers_to_transform=[0, 1],
    )
    broken = halfway(getattr(surgery, name))
    check_undone(model, optimizer, lambda: monkeypatch.setattr(surgery, name, broken))


MASKED_WRITES = [
    *((stores, "_copy", at) for at in (1, 2, 7, 20)),
    *((swap, "carry_state", at) for at in (1, 6)),
    (swap, "set_active", 1),
    (swap, "set_active", 5),
    (surgery, "sync_config", 1),
]


@pytest.mark.parametrize("held", [True, False], ids=["optimizer", "none"])
@pytest.mark.parametrize("write", MASKED_WRITES, ids=named(MASKED_WRITES))
def test_a_failing_write_at_fixed_shapes_undoes_everything(
    write: Any, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, at = write
    if name == "carry_state" and not held:
        where, name = surgery, "sync_config"
        at = 1
    model, optimizer = masked()
    broken = failing(getattr(where, name), at)
    check_undone(
        model,
        optimizer if held else None,
        lambda: monkeypatch.setattr(where, name, broken),
        drop=False,
    )


def masked(kind: str = "adamw") -> tuple[Any, Any]:
    model, _ = trained()
    reserve_ranks(model, dict.fromkeys(sites(model), 8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    step_of(model, optimizer, LLAMA)
    return model, optimizer


def test_an_undone_edit_leaves_a_run_that_goes_on_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, edited = trained(), trained()
    with monkeypatch.context() as patch:
        patch.setattr(surgery, "name_targets", failing(surgery.name_targets, 1))
        with pytest.raises(SurgeryError, match="undone"):
            gr.edit(edited[0], edits_of(edited[0]), edited[1])
    for seed in (3, 4):
        assert same(step_of(*edited, LLAMA, seed), step_of(*plain, LLAMA, seed))
    gr.edit(edited[0], edits_of(edited[0]), edited[1])


def test_the_rest_is_undone_where_undoing_fails() -> None:
    done: list[str] = []

    def work() -> None:
        with swap.Rollback() as rollback:
            rollback.push(lambda: done.append("first"))
            rollback.push(failing(lambda: None, 1))
            rollback.push(lambda: done.append("third"))
            raise ValueError("in between")

    with pytest.raises(SurgeryError, match=r"could not be undone entirely.*FailureError: call 1"):
        work()
    assert done == ["third", "first"]


def test_an_interrupt_is_undone_too_and_passes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    before = everything(model, optimizer)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(surgery, "sync_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gr.edit(model, edits_of(model), optimizer)
    assert same(everything(model, optimizer), before)


def test_the_old_factors_are_released() -> None:
    model, optimizer = trained()
    old = weakref.ref(sites(model)[next(iter(sites(model)))].raw("A"))
    gr.edit(model, edits_of(model), optimizer)
    gc.collect()
    assert old() is None
