"""What is refused of the SVD form and of Select, and that whatever fails changes nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradrank as gr
from adapters.surgery_cases import everything, same, sites, step_of, trainable, trained
from adapters.svd_cases import LLAMA, WIDE, started, svd_trained
from adapters.test_surgery_rollback import FailureError, failing
from gradrank.adapters import reserve, stores, surgery, svd, swap
from gradrank.adapters.edits import Select
from gradrank.adapters.guard import check
from gradrank.adapters.optimizers import OptimizerChange
from gradrank.adapters.reserve import reserve_ranks, restart, settle, start_svd
from gradrank.core.errors import OptionError, SurgeryError

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"  # 32 -> 16


def refused(model: Any, edits: Any, optimizer: Any = None) -> str:
    before = everything(model, optimizer)
    with pytest.raises(SurgeryError) as caught:
        gr.edit(model, edits, optimizer)
    assert same(everything(model, optimizer), before)
    return str(caught.value)


@pytest.mark.parametrize(
    ("components", "words"),
    [
        ((0, 0), "more than once"),
        ((-1,), "from 0"),
        ((True,), "from 0"),
        ((1.0,), "whole numbers"),
        (3, "whole numbers"),
    ],
)
def test_a_selection_that_makes_no_sense(components: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Select(components)


def test_a_selection_takes_any_sequence_of_whole_numbers() -> None:
    chosen: Any = torch.tensor([2, 0])
    assert Select(chosen) == Select((2, 0)) == Select([2, 0])  # type: ignore[arg-type]


def test_edits_that_the_form_does_not_have() -> None:
    model, optimizer = svd_trained()
    assert "has rank 6 and no component 6, 9 to keep" in refused(
        model, {Q: Select((1, 6, 9))}, optimizer
    )
    text = refused(model, {Q: Select(())}, optimizer)
    assert "would keep no component; use Drop() to remove the adapter" in text
    text = refused(model, {Q: gr.Shrink(3)}, optimizer)
    assert "has the SVD form" in text
    assert "Shrink(rank, by='norm') or Select(components)" in text
    assert "above min(d_in, d_out), 16" in refused(model, {K: gr.Grow(17)}, optimizer)


def test_edits_that_a_fixed_shape_does_not_have() -> None:
    model, optimizer = svd_trained(fixed=True)
    assert "above the rank reserved for it, 6" in refused(model, {Q: gr.Grow(7)}, optimizer)
    assert "has a fixed shape and cannot be dropped" in refused(model, {Q: gr.Drop()}, optimizer)
    gr.edit(model, {Q: Select(())}, optimizer)
    gr.edit(model, {Q: gr.Shrink(0)}, optimizer)  # stays off
    assert "has rank 0 and no component 0" in refused(model, {Q: Select((0,))}, optimizer)
    masked, _ = trained(steps=1)
    reserve_ranks(masked, {Q: 6})
    assert "would keep no component; keep at least one" in refused(masked, {Q: Select(())})


@pytest.mark.parametrize("factor", ["A", "B", "lam"])
def test_every_factor_is_checked(factor: str) -> None:
    model = started()
    raw = sites(model)[Q].raw(factor)
    handle = raw.register_hook(lambda gradient: gradient)
    assert f"has hooks on its factor {factor}" in refused(model, {Q: gr.Grow(7)})
    handle.remove()
    others = [p for p in trainable(model) if p is not raw]
    name = {"A": "lora_A", "B": "lora_B", "lam": "lam"}[factor]
    text = refused(model, {Q: gr.Grow(7)}, torch.optim.AdamW(others))
    assert f"{Q}.{name}: not in the optimizer" in text
    with torch.no_grad():
        raw.view(-1)[0] = torch.nan
    with pytest.raises(SurgeryError, match=f"NaN or infinite values in its factor {factor}"):
        gr.edit(model, {Q: Select((1,))})


class Engine(nn.Module):
    """What DeepSpeed's engine looks like from outside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module, self.peft_config = model, model.peft_config


Engine.__module__ = "deepspeed.runtime.engine"


def test_deepspeed_is_refused_by_name() -> None:
    model = started(fixed=True)
    with pytest.raises(SurgeryError, match=r"one process, and not under DeepSpeed; use DDP"):
        check(sites(model), {Q: Select((0,))}, None, None, Engine(model))
    plain, _ = trained(steps=1)
    before = everything(plain)
    with pytest.raises(SurgeryError, match=r"nothing was changed: .* not under DeepSpeed"):
        start_svd(Engine(plain), {Q: 6}, adapter="default", fixed=True)
    assert same(everything(plain), before)


@pytest.fixture
def group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_under_ddp_only_a_fixed_shape_can_be_edited() -> None:
    model = started()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trainable(model))
    with pytest.raises(SurgeryError, match="trains under DistributedDataParallel"):
        gr.edit(wrapped, {Q: Select((0,))}, optimizer)
    plain, _ = trained(steps=1)
    with pytest.raises(SurgeryError, match="trains under DistributedDataParallel"):
        start_svd(DistributedDataParallel(plain), {Q: 6})
    fixed = started(fixed=True)
    made = torch.optim.AdamW(trainable(fixed))
    held = DistributedDataParallel(fixed)
    gr.edit(held, {Q: Select((0, 4)), K: Select(())}, made)
    assert [sites(fixed)[name].rank for name in (Q, K)] == [2, 0]
    restart(held, made)
    assert sites(fixed)[Q].rank == 2


def test_starting_is_refused_whole() -> None:
    model, _ = trained(steps=1)
    before = everything(model)
    with pytest.raises(SurgeryError, match=r"is unknown\. Did you mean"):
        start_svd(model, {Q: 6, Q.replace("proj", "prj"): 6})
    assert same(everything(model), before)
    for attach, words in (
        (lambda m: reserve_ranks(m, {Q: 6}), "a component mask already"),
        (lambda m: start_svd(m, {Q: 6}), "the SVD form already"),
    ):
        again, _ = trained(steps=1)
        attach(again)
        for start in (start_svd, reserve_ranks):
            before = everything(again)
            with pytest.raises(SurgeryError, match=words):
                start(again, {Q: 6})
            assert same(everything(again), before)
    for options, words in (
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ):
        other, _ = trained(steps=1, **options)
        before = everything(other)
        with pytest.raises(SurgeryError, match=words):
            start_svd(other, {Q: 6})
        assert same(everything(other), before)
    merged, _ = trained(steps=1)
    merged.merge_adapter()
    with pytest.raises(SurgeryError, match="is merged"):
        start_svd(merged, {Q: 6})


def test_restarting_needs_the_form() -> None:
    model, optimizer = trained(steps=1)
    with pytest.raises(SurgeryError, match="Call start_svd first"):
        restart(model, optimizer)


def test_settling_is_refused_whole() -> None:
    model = started(fixed=True)
    names = list(sites(model))
    gr.edit(model, {n: Select(()) for n in names})
    before = everything(model)
    with pytest.raises(SurgeryError, match="no adapter would be left"):
        settle(model)
    assert same(everything(model), before)
    gr.edit(model, {n: gr.Grow(2) for n in names[1:]})
    model.add_adapter("second", model.peft_config["default"])
    before = everything(model)
    with pytest.raises(SurgeryError, match=rf"'{names[0]}' .*carries other adapters too"):
        settle(model)
    assert same(everything(model), before)
    model.delete_adapter("second")
    sites(model)[names[-1]].layer.merge()
    with pytest.raises(SurgeryError, match=r"cannot be settled: .* is merged"):
        settle(model)


def check_undone(
    work: Callable[[], object], model: Any, optimizer: Any, patch: Callable[[], None]
) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = everything(model, optimizer)
    patch()
    with pytest.raises(SurgeryError, match=r"was undone.*FailureError") as caught:
        work()
    assert isinstance(caught.value.__cause__, FailureError)
    after = everything(model, optimizer)
    for key, value in before.items():
        assert same(after[key], value), key


REAL = [
    (swap.nn, "Parameter", 3),
    (swap.nn, "Parameter", 11),
    (swap, "layer_alpha", 5),
    (swap, "carry_state", 3),
    (OptimizerChange, "replace", 8),
    (OptimizerChange, "remove", 3),
    (surgery, "unit_rows", 2),
    (surgery, "sync_config", 1),
    (surgery, "name_targets", 1),
]
FIXED = [
    *((stores, "_copy", at) for at in (1, 3, 9, 25)),
    *((swap, "carry_state", at) for at in (3, 7)),
    *((swap, "set_active", at) for at in (1, 4)),
    (stores.Store, "forget", 2),
    (surgery, "sync_config", 1),
]


@pytest.mark.parametrize("write", REAL, ids=str)
def test_a_failing_edit_is_undone(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, at = write
    model, optimizer = svd_trained()
    kinds = [Select((4, 1)), gr.Grow(8), gr.Shrink(2, "norm"), gr.Drop()]
    edits = {n: kinds[i % 4] for i, n in enumerate(sites(model))}
    broken = failing(getattr(where, name), at)
    check_undone(
        lambda: gr.edit(model, edits, optimizer),
        model,
        optimizer,
        lambda: monkeypatch.setattr(where, name, broken),
    )
    monkeypatch.undo()
    gr.edit(model, edits, optimizer)
    step_of(model, optimizer, LLAMA)


@pytest.mark.parametrize("write", FIXED, ids=str)
def test_a_failing_edit_at_fixed_shapes_is_undone(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, at = write
    model, optimizer = svd_trained(fixed=True)
    gr.edit(model, {n: Select((0, 2, 4)) for n in sites(model)}, optimizer)
    step_of(model, optimizer, LLAMA)
    kinds = [Select((2, 1)), gr.Grow(5), gr.Shrink(1, "norm"), Select(())]
    edits = {n: kinds[i % 4] for i, n in enumerate(sites(model))}
    broken = failing(getattr(where, name), at)
    check_undone(
        lambda: gr.edit(model, edits, optimizer),
        model,
        optimizer,
        lambda: monkeypatch.setattr(where, name, broken),
    )


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("write", [(stores, "_copy", 7), (stores.Store, "forget", 5)], ids=str)
def test_a_failing_restart_is_undone(
    write: Any, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, at = write
    model, optimizer = svd_trained(fixed)
    broken = failing(getattr(where, name), at)
    check_undone(
        lambda: restart(model, optimizer),
        model,
        optimizer,
        lambda: monkeypatch.setattr(where, name, broken),
    )


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "write", [(svd, "attach_svd", 4), (svd, "sync_config", 1), (swap.nn, "Parameter", 5)], ids=str
)
def test_a_failing_start_is_undone(
    write: Any, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, at = write
    model, optimizer = trained()
    broken = failing(getattr(where, name), at)
    check_undone(
        lambda: start_svd(model, dict.fromkeys(sites(model), WIDE), fixed=fixed),
        model,
        optimizer,
        lambda: monkeypatch.setattr(where, name, broken),
    )
    assert all(site.form == "plain" for site in sites(model).values())
    step_of(model, optimizer, LLAMA)


def test_what_reserve_offers() -> None:
    assert reserve.start_svd is start_svd
    assert set(reserve.__all__) == {"refit", "reserve_ranks", "restart", "settle", "start_svd"}
