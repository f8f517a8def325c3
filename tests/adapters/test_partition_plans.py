"""Plans with neuron partitions, and models that take the shape of a checkpoint."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradrank as gr
from adapters.partition_cases import partitions, rows_of, splits
from adapters.surgery_cases import (
    everything,
    logits,
    reloaded,
    same,
    sites,
    train,
    trainable,
    trained,
)
from cases import CASES, hand_plan
from gradrank.adapters import sidecar
from gradrank.adapters.apply import adapter_ranks, count_trainable
from gradrank.adapters.neurons import reserve_neurons
from gradrank.adapters.reserve import refit
from gradrank.core.errors import DataError, PlanError, SurgeryError
from gradrank.core.partition import NeuronPartition
from gradrank.core.planned import PlannedTarget

LLAMA = CASES["llama"]
Q = "model.layers.0.self_attn.q_proj"


def split_plan(model: nn.Module, rank: int = 4, rest: int = 1) -> gr.Plan:
    """Every second target with two groups of rows, and one without any adapter."""
    plan = hand_plan(model, lambda _: 8)
    targets = []
    for number, planned in enumerate(plan.targets):
        count = planned.target.d_out
        mask = [(row * 7) % 5 < 2 for row in range(count)]
        capacity: Any = (NeuronPartition.of(mask, rank, rest), rank, 0)[number % 3]
        targets.append(PlannedTarget.of(planned.target, capacity))
    return dataclasses.replace(plan, targets=tuple(targets))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("rest", [0, 2])
def test_a_plan_is_built_with_its_parameters(name: str, rest: int) -> None:
    case = CASES[name]
    plan = split_plan(case.model(), rest=rest)
    assert plan.partitions
    model = gr.apply(plan, case.model())
    assert count_trainable(model)["adapter"] == plan.parameters
    assert adapter_ranks(model) == {n: r for n, r in plan.ranks.items() if r}
    assert {n: s.partition for n, s in sites(model).items() if s.partition} == plan.partitions
    optimizer = torch.optim.AdamW(trainable(model), 1e-2)
    model.eval()
    with model.disable_adapter():
        before = logits(model, case)
    assert torch.equal(logits(model, case), before)
    train(model, optimizer, case, 2)
    assert not torch.equal(logits(model, case), before)
    assert torch.equal(logits(reloaded(model, case), case), logits(model, case))


def test_a_stock_configuration_cannot_say_it() -> None:
    plan = split_plan(LLAMA.model())
    with pytest.raises(PlanError, match=r"gradrank.apply\(plan, model\)"):
        plan.lora_config()


@pytest.mark.parametrize("options", [{"init_lora_weights": False}, {"init_lora_weights": "pissa"}])
def test_what_fills_b_is_refused_and_the_model_left(options: dict[str, Any]) -> None:
    plan, base = split_plan(LLAMA.model()), LLAMA.model()
    names, values = list(base.state_dict()), [p.clone() for p in base.parameters()]
    with pytest.raises(PlanError, match="does not begin with B = 0"):
        gr.apply(plan, base, **options)
    assert list(base.state_dict()) == names
    assert all(map(torch.equal, base.parameters(), values))
    gr.apply(plan, base, init_lora_weights="gaussian")


def test_an_error_on_the_way_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, base = split_plan(LLAMA.model()), LLAMA.model()
    names = list(base.state_dict())

    def fail(*_: Any) -> None:
        raise gr.OptionError("no")

    monkeypatch.setattr("gradrank.adapters.apply.attach_partition", fail)
    with pytest.raises(PlanError, match="cannot be split: no"):
        gr.apply(plan, base)
    assert list(base.state_dict()) == names
    assert not hasattr(base, "peft_config")


def shapes(model: Any) -> dict[str, Any]:
    return {n: (s.rank, s.partition) for n, s in sites(model).items()}


@pytest.mark.parametrize("held", [False, True])
def test_a_plain_model_takes_the_shape_of_a_split_one(held: bool) -> None:
    model, optimizer = trained()
    gr.edit(model, partitions(model, "warm", rest=2), optimizer)
    train(model, optimizer, LLAMA)
    twin, other = trained(steps=1)
    ranks = {n: s.rank for n, s in sites(model).items()}
    refit(twin, ranks, other if held else None, partitions=splits(model, rest=2))
    assert shapes(twin) == shapes(model)
    formed = sidecar.formed_tensors(model, "default")
    sidecar.load_formed(twin, "default", formed)
    assert torch.equal(logits(twin), logits(model))
    other = other if held else torch.optim.AdamW(trainable(twin), 1e-2, weight_decay=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the moments
    for each, made in ((model, optimizer), (twin, other)):
        train(each, made, LLAMA, 2, seed=8)
    assert torch.equal(logits(twin), logits(model))


def test_a_split_model_takes_other_shapes() -> None:
    model, optimizer = trained()
    gr.edit(model, partitions(model, rest=2), optimizer)
    other = splits(model, rank=3, rest=1, seed=9)
    plain = dict.fromkeys(sites(model), 2)
    before = everything(model, optimizer)
    for ranks, wanted in ((plain, None), (dict.fromkeys(plain, 4), other)):
        with pytest.raises(SurgeryError, match="Build the adapter and the optimizer anew"):
            refit(model, ranks, optimizer, partitions=wanted)
    assert same(everything(model, optimizer), before)
    refit(model, dict.fromkeys(plain, 4), partitions=other)
    assert shapes(model) == {n: (4, split) for n, split in other.items()}
    refit(model, plain)
    assert shapes(model) == dict.fromkeys(plain, (2, None))
    same_again = shapes(model)
    refit(model, plain)
    assert shapes(model) == same_again


def test_a_refit_that_is_refused_changes_nothing() -> None:
    model, _ = trained()
    gr.edit(model, partitions(model, rest=2))
    before, wanted = everything(model), logits(model)
    bad = {**splits(model, seed=4), Q: NeuronPartition.of([True, False], 4, 1)}
    with pytest.raises(SurgeryError, match="its partition is of 2"):
        refit(model, dict.fromkeys(sites(model), 5), partitions=bad)
    after = everything(model)
    for key in ("layers", "config", "buffers"):
        assert same(after[key], before[key])
    assert {n: p[0] for n, p in after["parameters"].items()} == {
        n: p[0] for n, p in before["parameters"].items()
    }
    assert torch.equal(logits(model), wanted)


def test_a_fixed_shape_takes_either_stage() -> None:
    model, _ = trained(steps=1)
    names = dict.fromkeys(sites(model), 4)
    reserve_neurons(model, names, dict.fromkeys(names, 2), fixed=True)
    optimizer = torch.optim.AdamW(trainable(model))
    objects = list(map(id, model.parameters()))
    split = splits(model, rest=2)
    refit(model, dict.fromkeys(names, 6), optimizer, partitions=split)
    assert shapes(model) == {n: (6, s) for n, s in split.items()}
    refit(model, names, optimizer)
    assert shapes(model) == dict.fromkeys(names, (4, None))
    refit(model, {**names, Q: 0}, optimizer)
    assert shapes(model)[Q] == (0, None)
    assert list(map(id, model.parameters())) == objects
    before = everything(model, optimizer)
    with pytest.raises(SurgeryError, match="room for rank 6"):
        refit(model, dict.fromkeys(names, 7), optimizer)
    with pytest.raises(SurgeryError, match="on another number of rows"):
        refit(model, names, optimizer, partitions={Q: NeuronPartition.of([True, False], 4, 1)})
    assert same(everything(model, optimizer), before)


def test_partitions_of_a_sidecar(tmp_path: Path) -> None:
    model, _ = trained(steps=1)
    wanted = splits(model)
    path = tmp_path / sidecar.FILE
    sidecar.write(path, {"partitions": {n: s.to_dict() for n, s in wanted.items()}}, {})
    assert sidecar.stored_partitions(path) == wanted
    sidecar.write(path, {"ranks": {}}, {})
    assert sidecar.stored_partitions(path) == {}
    for damage in ([], {"q": 3}, {"q": {"d_out": 4}}, {"q": {**wanted[Q].to_dict(), "rank": "x"}}):
        sidecar.write(path, {"partitions": damage}, {})
        with pytest.raises(DataError, match="is damaged"):
            sidecar.stored_partitions(path)
    with pytest.raises(DataError, match="holds no"):
        sidecar.stored_partitions(tmp_path / "nothing")


def test_masks_survive_a_sidecar(tmp_path: Path) -> None:
    model, optimizer = trained()
    gr.edit(model, partitions(model, rest=0), optimizer)
    path = tmp_path / sidecar.FILE
    sidecar.write(path, {}, sidecar.formed_tensors(model, "default"))
    tensors = sidecar.read(path)[1]
    twin, _ = trained()
    gr.edit(twin, partitions(twin, rest=0, seed=3))
    assert shapes(twin) != shapes(model)
    sidecar.load_formed(twin, "default", tensors)
    assert shapes(twin) == shapes(model)
    assert torch.equal(logits(twin), logits(model))
    assert rows_of(sites(twin)[Q]) == sites(twin)[Q].partition.mask
