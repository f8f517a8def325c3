"""Partitions at a fixed shape: the same training as the compact form, no parameter replaced."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import gradrank as gr
from adapters.partition_cases import partitions, splits, update
from adapters.surgery_cases import (
    OPTIMIZERS,
    distance,
    everything,
    logits,
    reloaded,
    same,
    sites,
    train,
    trainable,
    trained,
)
from cases import CASES
from gradrank.adapters import forms, swap
from gradrank.adapters.neurons import reserve_neurons
from gradrank.adapters.reserve import reserve_ranks, settle
from gradrank.core.errors import OptionError, SurgeryError, TargetError
from gradrank.core.partition import NeuronPartition

LLAMA = CASES["llama"]
Q = "model.layers.0.self_attn.q_proj"


def reserved(fixed: bool, name: str = "adamw", rank: int = 4, rest: int = 2) -> tuple[Any, Any]:
    """A model with room for partitions, a few steps into its first stage."""
    model, _ = trained(steps=1)
    names = sites(model)
    ranks = reserve_neurons(
        model, dict.fromkeys(names, rank), dict.fromkeys(names, rest), fixed=fixed
    )
    assert set(ranks.values()) == {rank}
    optimizer = OPTIMIZERS[name](trainable(model))
    train(model, optimizer, LLAMA, 2)
    return model, optimizer


def in_use(site: Any) -> dict[str, Tensor]:
    """A and the whole B, as far as they are in use."""
    a, b = site.linear("A").weight.detach(), site.linear("B").weight.detach()
    return {"A": a[: site.rank], "B": b[:, : site.rank]}


def settled(model: Any) -> Any:
    twin = copy.deepcopy(model)
    settle(twin)
    return twin


def farthest(left: Any, right: Any) -> float:
    pairs = zip(sites(left).values(), sites(right).values(), strict=True)
    return max(distance(in_use(a)[f], in_use(b)[f]) for a, b in pairs for f in ("A", "B"))


@pytest.mark.parametrize("name", ["adamw", "adam", "momentum"])
@pytest.mark.parametrize("start", ["restart", "warm"])
def test_both_forms_train_alike(name: str, start: str) -> None:
    (compact, made), (fixed, other) = reserved(False, name), reserved(True, name)
    assert farthest(compact, fixed) < 1e-6
    objects = list(map(id, fixed.parameters()))
    for model, optimizer in ((compact, made), (fixed, other)):
        report = gr.edit(model, partitions(model, start, rest=2), optimizer, seed=7)
        assert report.reset == ()
        train(model, optimizer, LLAMA, 4, seed=9)
    assert list(map(id, fixed.parameters())) == objects
    assert farthest(compact, fixed) < 2e-6
    assert distance(logits(compact), logits(fixed)) < 1e-5
    assert {s.form for s in sites(compact).values()} == {"partition"}
    for name_, site in sites(fixed).items():
        twin = sites(compact)[name_]
        assert (site.form, site.masked, site.rank) == ("partition-mask", True, 6)
        assert (site.partition, site.parameters) == (twin.partition, twin.parameters)
        assert not (site.raw("B").detach() != in_use(site)["B"]).any()  # dormant ones are zero


def test_before_the_split_it_is_lora_of_rank_r() -> None:
    model, optimizer = reserved(True)
    plain, _ = reserved(False)
    for site, twin in zip(sites(model).values(), sites(plain).values(), strict=True):
        assert (site.rank, site.partition, site.form) == (4, None, "partition-mask")
        assert site.parameters == twin.parameters
        assert site.raw("A").shape[0] == 6
    loaded = reloaded(model, LLAMA)
    assert {site.rank for site in sites(loaded).values()} == {4}
    assert torch.equal(logits(loaded), logits(settled(model)))
    assert distance(logits(loaded), logits(plain)) < 1e-6
    gr.edit(model, partitions(model, rest=2), optimizer)
    train(model, optimizer, LLAMA, 2)
    loaded = reloaded(model, LLAMA)
    assert {site.rank for site in sites(loaded).values()} == {6}
    assert distance(logits(loaded), logits(model)) == 0.0
    wanted, ranks = logits(model), settle(model)
    assert set(ranks.values()) == {6}
    assert torch.equal(logits(model), wanted)
    assert all(site.form == "plain" for site in sites(model).values())


@pytest.mark.parametrize("junk", [1e3, float("inf"), float("nan")])
def test_nothing_dormant_reaches_function_or_gradient(junk: float) -> None:
    model, optimizer = reserved(True)
    gr.edit(model, partitions(model, rest=2), optimizer)
    train(model, optimizer, LLAMA)
    wanted = logits(model)
    masks = {}
    with torch.no_grad():
        for name, site in sites(model).items():
            visible = site.linear("B").parametrizations["weight"][0].mask
            site.raw("B")[~visible] = junk
            masks[name] = visible
    assert torch.equal(logits(model), wanted)
    train(model, torch.optim.SGD(trainable(model), 0.0), LLAMA)
    model(**CASES["llama"].batch(torch.Generator().manual_seed(1))).loss.backward()
    for name, site in sites(model).items():
        grad = site.raw("B").grad
        assert not grad[~masks[name]].any()
        assert grad[masks[name]].any()


@pytest.mark.parametrize("at", [3, 20])
@pytest.mark.parametrize("start", ["restart", "warm"])
def test_a_failure_leaves_everything(at: int, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = reserved(True)
    before, split = everything(model, optimizer), swap.set_partition
    count = iter(range(100))

    def fail(*args: Any) -> None:
        if next(count) == min(at, len(sites(model)) - 1):
            raise RuntimeError("no")
        split(*args)

    monkeypatch.setattr(swap, "set_partition", fail)
    with pytest.raises(SurgeryError, match="was undone"):
        gr.edit(model, partitions(model, start), optimizer)
    assert same(everything(model, optimizer), before)
    assert {site.partition for site in sites(model).values()} == {None}


@pytest.mark.parametrize("fixed", [False, True])
def test_one_group_and_no_group(fixed: bool) -> None:
    model, optimizer = reserved(fixed)
    count = sites(model)[Q].linear("B").out_features
    other = Q.replace("q_proj", "o_proj")
    third = Q.replace("q_proj", "k_proj")
    rows = sites(model)[third].linear("B").out_features
    report = gr.edit(
        model,
        {
            Q: gr.Partition(NeuronPartition.of([True] * count, 4, 2)),
            other: gr.Partition(NeuronPartition.of([False] * count, 4, 2)),
            third: gr.Partition(NeuronPartition.of([False] * rows, 4, 0)),
        },
        optimizer,
    )
    assert {n: pair[1] for n, pair in report.ranks.items()} == {Q: 4, other: 2, third: 0}
    found = sites(model)
    assert (found[Q].rank, found[Q].partition) == (4, None)
    assert (found[other].rank, found[other].partition) == (2, None)
    assert (third in found) == fixed
    assert not fixed or found[third].rank == found[third].parameters == 0
    train(model, optimizer, LLAMA, 2)
    wanted = logits(model)
    assert distance(logits(reloaded(model, LLAMA)), wanted) < 1e-6
    settle(model)
    assert third not in sites(model)
    assert distance(logits(model), wanted) < 1e-6


def test_raw_tensors_restore_either_stage() -> None:
    model, optimizer = reserved(True)
    twin, _ = reserved(True)
    stages = [{n: _copied(s) for n, s in sites(model).items()}]
    gr.edit(model, partitions(model, rest=2), optimizer)
    train(model, optimizer, LLAMA)
    stages.append({n: _copied(s) for n, s in sites(model).items()})
    wanted = logits(model)
    for stage in (1, 0, 1):
        for name, site in sites(twin).items():
            forms.load_raw_tensors(site.layer, "default", stages[stage][name])
        assert {site.rank for site in sites(twin).values()} == {(4, 6)[stage]}
    assert torch.equal(logits(twin), wanted)
    assert same({n: s.partition for n, s in sites(twin).items()}, splits(model, rest=2))


def _copied(site: Any) -> dict[str, Tensor]:
    raw = forms.raw_tensors(site.layer, "default")
    return {name: tensor.detach().clone() for name, tensor in raw.items()}


def test_refusals_name_the_layer() -> None:
    model, _ = trained(steps=1)
    names = sites(model)
    before = everything(model)
    for ranks, words in (
        (dict.fromkeys(names, 3), r"has 4, above 3. Give the method that rank \(rank=4\)"),
        (dict.fromkeys(names, 40), "would get rank 40, above min"),
        ({"nope": 4}, "'nope' is unknown"),
    ):
        for fixed in (False, True):
            with pytest.raises(SurgeryError, match=words):
                reserve_neurons(model, ranks, {}, fixed=fixed)
    assert same(everything(model), before)
    reserve_neurons(model, {}, dict.fromkeys(names, 1), fixed=True)
    with pytest.raises(SurgeryError, match="have room for a neuron partition already"):
        reserve_ranks(model, {})
    with pytest.raises(SurgeryError, match="together above the 5 that were reserved"):
        gr.edit(model, partitions(model, rest=2))
    layer = sites(model)[Q].layer
    with pytest.raises(OptionError, match="does not fit 32 rows with room for rank 5"):
        forms.set_partition(layer, "default", NeuronPartition.of([True] * 32, 4, 1))
    plain, _ = trained(steps=1)
    split = NeuronPartition.of([True, False] * 16, 3, 1)
    with pytest.raises(TargetError, match="Call attach_partition_mask first"):
        forms.set_partition(sites(plain)[Q].layer, "default", split)


def test_ranks_move_within_the_room_before_the_split() -> None:
    model, optimizer = reserved(True)
    wanted = logits(model)
    gr.edit(model, {Q: gr.Grow(6)}, optimizer)
    assert distance(logits(model), wanted) < 1e-6
    gr.edit(model, {Q: gr.Shrink(4)}, optimizer)
    assert distance(logits(model), wanted) < 1e-5


def test_a_failed_reservation_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trained(steps=1)
    before = everything(model)
    monkeypatch.setattr(
        "gradrank.adapters.neurons.sync_config",
        lambda *_: (_ for _ in ()).throw(RuntimeError("no")),
    )
    with pytest.raises(SurgeryError, match="was undone"):
        reserve_neurons(model, {}, dict.fromkeys(sites(model), 2), fixed=True)
    assert same(everything(model), before)


def test_copies_of_a_split_model_are_whole() -> None:
    model, optimizer = reserved(True)
    gr.edit(model, partitions(model, rest=2), optimizer)
    train(model, optimizer, LLAMA)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    settle(twin)
    assert {s.form for s in sites(model).values()} == {"partition-mask"}
    assert update(sites(twin)[Q]).shape == update(sites(model)[Q]).shape


def test_checkpointing_and_autocast_agree() -> None:
    for fixed in (False, True):
        model, optimizer = reserved(fixed)
        base: Any = model.get_base_model()
        gr.edit(model, partitions(model, rest=2), optimizer)
        batch = LLAMA.batch(torch.Generator().manual_seed(2))
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                base.activation_checkpointing_enable({"use_reentrant": False})
                model.train()  # what checkpointing asks for; there is no dropout
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            found.append([p.grad.clone() for p in trainable(model)])
        assert same(found[0], found[1])
