"""Splitting the rows of live layers: function, optimizer, saves, refusals, all or nothing."""

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import gradrank as gr
from adapters.partition_cases import partitions, rows_of, shake, splits, update, whole_b
from adapters.surgery_cases import (
    OPTIMIZERS,
    built_that_way,
    distance,
    everything,
    logits,
    reloaded,
    same,
    sites,
    step_of,
    train,
    trainable,
    trained,
)
from cases import CASES
from gradrank.adapters import surgery
from gradrank.adapters.apply import count_trainable
from gradrank.adapters.reserve import reserve_ranks, settle, start_svd
from gradrank.core.errors import SurgeryError
from gradrank.core.partition import NeuronPartition
from gradrank.ops.moments import Carry, carry_tensor
from oracles import partitions as oracle

LLAMA = CASES["llama"]
Q = "model.layers.0.self_attn.q_proj"


def lone(d_in: int = 9, d_out: int = 8, rank: int = 4, seed: int = 0) -> Any:
    """One adapted linear layer with random factors."""
    torch.manual_seed(seed)
    model = get_peft_model(
        nn.Sequential(nn.Linear(d_in, d_out)),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"]),
    )
    shake(model, 0.5, seed)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_the_forward_pass_is_that_of_the_paper(name: str) -> None:
    case = CASES[name]
    model, optimizer = trained(case)
    gr.edit(model, partitions(model, rank=3, rest=2), optimizer)
    shake(model)
    generator = torch.Generator().manual_seed(0)
    for site in sites(model).values():
        base = site.layer.get_base_layer()
        W0 = base.weight.T if name == "gpt2" else base.weight
        x = torch.randn(5, W0.shape[1], generator=generator)
        bias = 0 if base.bias is None else base.bias
        dominant = torch.tensor(site.partition.mask)
        args = (x, W0, site.raw("A"), _full(site), dominant, 3, site.scaling)
        with torch.no_grad():
            found = site.layer(x) - bias
            assert distance(found, oracle.hidden(*args)) < 1e-5
            assert distance(found, oracle.hidden_without_masks(*args)) > 1e-3


def _full(site: Any) -> Tensor:
    """B with junk in the places that nobody sees."""
    split, blocks = site.partition, site.learned()
    whole = torch.randn(split.d_out, split.lora_rank, generator=torch.Generator().manual_seed(1))
    dominant = torch.tensor(split.mask)
    with torch.no_grad():
        whole[dominant, : split.rank] = blocks["B_d"]
        whole[~dominant, split.rank :] = blocks["B_s"]
    return whole


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_restart_begins_like_a_new_adapter(case: Any) -> None:
    if case.name == "mixtral":
        pytest.skip("expert parameters are refused by name elsewhere")
    model, optimizer = trained(case)
    scaling = {name: site.scaling for name, site in sites(model).items()}
    state = torch.get_rng_state()
    report = gr.edit(model, partitions(model), optimizer, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    with model.disable_adapter():
        plain = logits(model, case)
    assert distance(logits(model, case), plain) < 1e-6
    for name, site in sites(model).items():
        split, raw = site.partition, site.learned()
        assert (site.form, site.rank, site.scaling) == ("partition", 5, scaling[name])
        assert raw["A"].shape == (5, site.linear("A").in_features)
        assert raw["B_d"].shape == (split.dominant_rows, 4)
        assert raw["B_s"].shape == (split.d_out - split.dominant_rows, 1)
        bound = raw["A"].shape[1] ** -0.5
        assert 0.8 * bound < float(raw["A"].detach().abs().max()) <= bound
        assert site.parameters == split.parameters(raw["A"].shape[1])
        assert site.parameters == sum(p.numel() for p in raw.values())
        assert all(not optimizer.state.get(p) for p in raw.values())
        assert report.ranks[name] == (4, 5)
    used = sum(site.parameters for site in sites(model).values())
    assert report.parameters[1] == used == count_trainable(model)["adapter"]
    before = logits(model, case)
    train(model, optimizer, case, 2)
    assert distance(logits(model, case), before) > 1e-4


def test_seeds_make_a_restart_repeatable() -> None:
    rows = []
    for seed in (1, 1, 2):
        model, _ = trained()
        gr.edit(model, partitions(model), seed=seed)
        rows.append([site.raw("A").detach().clone() for site in sites(model).values()])
    assert same(rows[0], rows[1])
    assert not same(rows[0], rows[2])
    assert not torch.equal(rows[0][0], rows[0][1])  # every target has its own


@pytest.mark.parametrize("start", ["restart", "warm"])
@pytest.mark.parametrize("rest", [0, 1, 4])
@pytest.mark.parametrize("named", [False, True])
def test_the_optimizer_is_ordered_as_one_that_is_built_afresh(
    start: str, rest: int, named: bool
) -> None:
    model, _ = trained()
    held = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held if named else [p for _, p in held])
    train(model, optimizer, LLAMA)
    gr.edit(model, partitions(model, start, rest=rest), optimizer)
    fresh = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for _, p in fresh]
    if named:
        assert group["param_names"] == [n for n, _ in fresh]
    assert set(map(id, optimizer.state)) <= {id(p) for p in group["params"]}
    assert all(p.numel() for p in group["params"])
    for site in sites(model).values():
        assert site.raw("B_s").requires_grad == (rest > 0)
    train(model, optimizer, LLAMA, 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("start", ["restart", "warm"])
def test_the_next_step_is_that_of_a_model_built_that_way(name: str, start: str) -> None:
    model, optimizer = trained(optimizer=name)
    gr.edit(model, partitions(model, start), optimizer)
    twin, other = trained(optimizer=name)
    gr.edit(twin, partitions(twin, "restart", seed=0))
    with torch.no_grad():
        for mine, theirs in zip(trainable(twin), trainable(model), strict=True):
            mine.copy_(theirs)
    other = OPTIMIZERS[name](trainable(twin))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(step_of(model, optimizer, LLAMA), step_of(twin, other, LLAMA))


def test_a_warm_start_keeps_rows_and_moments() -> None:
    model, optimizer = trained(steps=3)
    before = {
        name: (
            {f: raw.detach().clone() for f, raw in site.learned().items()},
            {f: copy.deepcopy(optimizer.state[raw]) for f, raw in site.learned().items()},
        )
        for name, site in sites(model).items()
    }
    gr.edit(model, partitions(model, "warm", rank=4, rest=2), optimizer)
    for name, site in sites(model).items():
        values, state = before[name]
        raw, dominant = site.learned(), torch.tensor(site.partition.mask)
        assert torch.equal(raw["A"][:4], values["A"])
        assert torch.equal(raw["B_d"], values["B"][dominant])
        now = {factor: optimizer.state[p] for factor, p in raw.items()}
        grown = Carry.select(range(4), fresh=2)
        for key, role in (("exp_avg", "first"), ("exp_avg_sq", "second")):
            whole = carry_tensor(state["B"][key], grown, 1, role)
            assert torch.equal(now["A"][key], carry_tensor(state["A"][key], grown, 0, role))
            assert torch.equal(now["B_d"][key], whole[dominant, :4])
            assert torch.equal(now["B_s"][key], whole[~dominant, 4:])
        assert now["B_s"]["step"] == now["B_d"]["step"] == 3
        assert float(now["B_s"]["exp_avg_sq"].min()) >= 0


def test_a_warm_start_is_exact_where_ranks_suffice() -> None:
    model, _ = trained(steps=3)
    wanted, before = logits(model), {n: update(s) for n, s in sites(model).items()}
    gr.edit(model, partitions(model, "warm", rank=4, rest=4))
    assert distance(logits(model), wanted) < 1e-6
    for name, site in sites(model).items():
        assert distance(update(site), before[name]) < 1e-6


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    mask=st.lists(st.booleans(), min_size=8, max_size=8),
    rank=st.integers(1, 6),
    rest=st.integers(0, 6),
    start=st.sampled_from(["restart", "warm"]),
)
def test_any_mask_gives_the_nearest_update(
    mask: list[bool], rank: int, rest: int, start: str
) -> None:
    model = lone()
    site = sites(model)["0"]
    A, B = (raw.detach().clone() for raw in site.learned().values())
    split = NeuronPartition.of(mask, rank, rest)
    if not split.lora_rank:
        with pytest.raises(SurgeryError, match="every target would be dropped"):
            gr.edit(model, {"0": gr.Partition(split, start)})
        return
    gr.edit(model, {"0": gr.Partition(split, start)})
    after = sites(model)["0"]
    assert after.rank == split.lora_rank == after.raw("A").shape[0]
    assert after.parameters == split.parameters(9)
    assert after.partition == (split if split.is_split else None)
    assert after.form == ("partition" if split.is_split else "plain")
    dominant = torch.tensor(mask)
    wanted = oracle.best_update(A, B, dominant, rank, rest) * after.scaling
    if start == "restart":
        wanted = torch.zeros_like(wanted)
    assert distance(update(after).double(), wanted) < 1e-5
    with torch.no_grad():
        expanded = whole_b(after)
    if split.is_split:
        assert not expanded[dominant][:, rank:].any()
        assert not expanded[~dominant][:, :rank].any()


def test_the_nearest_update_is_not_that_of_all_rows() -> None:
    A, B = torch.randn(4, 9), torch.randn(8, 4)
    dominant = torch.arange(8) % 3 == 0
    right = oracle.best_update(A, B, dominant, 3, 1)
    assert distance(right, oracle.best_update_of_all_rows(A, B, dominant, 3, 1)) > 0.1


@pytest.mark.parametrize("start", ["restart", "warm"])
@pytest.mark.parametrize(("flag", "rank"), [(True, 3), (False, 2)])
def test_one_group_is_plain_lora_of_its_rank(start: str, flag: bool, rank: int) -> None:
    model, optimizer = trained()
    wanted = {n: update(s) for n, s in sites(model).items()}
    edits = {
        name: gr.Partition(NeuronPartition.of([flag] * site.linear("B").out_features, 3, 2), start)
        for name, site in sites(model).items()
    }
    gr.edit(model, edits, optimizer)
    for name, site in sites(model).items():
        assert (site.form, site.rank, site.partition) == ("plain", rank, None)
        if start == "warm":
            U, S, Vh = torch.linalg.svd(wanted[name].double(), full_matrices=False)
            best = U[:, :rank] * S[:rank] @ Vh[:rank]
            assert distance(update(site).double(), best) < 1e-6
        else:
            assert not update(site).any()
            assert all(not optimizer.state.get(raw) for raw in site.learned().values())
    train(model, optimizer, LLAMA, 2)


def test_a_target_without_a_group_loses_its_adapter() -> None:
    model, optimizer = trained()
    none = NeuronPartition.of([False] * 32, 4, 0)
    report = gr.edit(model, {Q: gr.Partition(none)}, optimizer)
    assert Q not in sites(model)
    assert report.ranks[Q] == (4, 0)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == list(map(id, trainable(model)))


def test_a_single_output_row() -> None:
    model = lone(d_out=1, rank=1)
    wanted = update(sites(model)["0"])
    gr.edit(model, {"0": gr.Partition(NeuronPartition.of([True], 1, 1), "warm")})
    assert torch.equal(update(sites(model)["0"]), wanted)
    gr.edit(model, {"0": gr.Partition(NeuronPartition.of([False], 4, 1))})
    assert not update(sites(model)["0"]).any()
    assert sites(model)["0"].rank == 1


@pytest.mark.parametrize("rest", [0, 2])
def test_saves_are_stock_and_merging_is_exact(rest: int) -> None:
    model, optimizer = trained()
    gr.edit(model, partitions(model, "warm", rank=3, rest=rest), optimizer)
    train(model, optimizer, LLAMA, 2)
    wanted = logits(model)
    loaded = reloaded(model, LLAMA)
    assert torch.equal(logits(loaded), wanted)
    for name, site in sites(loaded).items():
        assert (site.form, site.rank) == ("plain", 3 + rest)
        assert torch.equal(update(site), update(sites(model)[name]))
    weights = {n: s.layer.get_base_layer().weight.clone() for n, s in sites(model).items()}
    model.merge_adapter()
    assert distance(logits(model), wanted) < 2e-6
    model.unmerge_adapter()
    for name, site in sites(model).items():
        assert distance(site.layer.get_base_layer().weight, weights[name]) < 1e-6
    merged = copy.deepcopy(model).merge_and_unload()
    assert distance(logits(merged), wanted) < 2e-6
    wanted = logits(model)  # unmerging has rounded the base weight
    ranks = settle(model)
    assert set(ranks.values()) == {3 + rest}
    assert torch.equal(logits(model), wanted)
    assert all(site.form == "plain" for site in sites(model).values())
    gr.edit(model, partitions(model, "warm", rank=3, rest=1, seed=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    model, _ = trained()
    model.to(dtype)
    gr.edit(model, partitions(model, "warm"))
    for site in sites(model).values():
        assert {raw.dtype for raw in site.learned().values()} == {dtype}
    assert logits(model).dtype == dtype


@pytest.mark.parametrize("at", ["attach_partition", "sync_config"])
@pytest.mark.parametrize("start", ["restart", "warm"])
def test_a_failure_on_the_way_leaves_everything_as_it_was(
    at: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    before, wanted = everything(model, optimizer), logits(model)
    count = iter(range(100))

    def fail(*args: Any, **kwargs: Any) -> None:
        if at == "sync_config" or next(count) == 5:
            raise RuntimeError("no")
        attach(*args, **kwargs)

    where: Any = surgery if at == "sync_config" else surgery.Replace.__module__
    if isinstance(where, str):
        attach = getattr(__import__(where, fromlist=["x"]), at)
        monkeypatch.setattr(f"{where}.{at}", fail)
    else:
        monkeypatch.setattr(where, at, fail)
    with pytest.raises(SurgeryError, match="was undone; model and optimizer are as they were"):
        gr.edit(model, partitions(model, start), optimizer)
    assert same(everything(model, optimizer), before)
    assert torch.equal(logits(model), wanted)
    monkeypatch.undo()
    gr.edit(model, partitions(model, start), optimizer)
    train(model, optimizer, LLAMA)


def refused(model: nn.Module, edits: dict[str, Any], optimizer: Any = None) -> str:
    before = everything(model, optimizer)
    with pytest.raises(SurgeryError, match="nothing was changed") as caught:
        gr.edit(model, edits, optimizer)
    assert same(everything(model, optimizer), before)
    return str(caught.value)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (
            NeuronPartition.of([True, False] * 4, 4, 1),
            "has 32 output rows, and its partition is of 8",
        ),
        (NeuronPartition.of([True] * 8, 4, 1), "has 32 output rows, and its partition is of 8"),
        (
            NeuronPartition.of([True, False] * 16, 33, 1),
            r"rank 33 in one group, above min\(d_in, d_o",
        ),
        (NeuronPartition.of([True, False] * 16, 4, 40), "rank 40 in one group"),
        ([True, False], "make one with NeuronPartition.of"),
    ],
)
def test_partitions_that_do_not_fit_are_refused(split: Any, words: str) -> None:
    model, optimizer = trained(steps=1)
    text = refused(model, {Q: gr.Partition(split)}, optimizer)
    assert re.search(words, text), text


@pytest.mark.parametrize(
    "edit", [gr.Grow(6), gr.Shrink(2), gr.Select((0, 1)), gr.Shrink(1, "norm"), "again"]
)
def test_a_partitioned_layer_takes_no_other_edit(edit: Any) -> None:
    model, optimizer = trained(steps=1)
    gr.edit(model, partitions(model), optimizer)
    chosen = partitions(model)[Q] if edit == "again" else edit
    text = refused(model, {Q: chosen}, optimizer)
    assert "has a neuron partition already; call gradrank.settle(model) first" in text
    gr.edit(model, {Q: gr.Drop()}, optimizer)
    assert Q not in sites(model)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == list(map(id, trainable(model)))


def test_settings_that_cannot_be_split_are_refused() -> None:
    model, optimizer = trained(steps=1)
    model.merge_adapter()
    assert "is merged into its base weight" in refused(model, partitions(model), optimizer)
    model.unmerge_adapter()
    handle = sites(model)[Q].raw("B").register_hook(lambda grad: grad)
    assert "has hooks on its factor B" in refused(model, partitions(model), optimizer)
    handle.remove()
    masked, _ = trained(steps=1)
    reserve_ranks(masked, dict.fromkeys(sites(masked), 6))
    assert "has a component mask, whose rows cannot be split" in refused(masked, partitions(masked))
    formed, _ = trained(steps=1)
    start_svd(formed, {})
    assert "has the SVD form, whose rows cannot be split" in refused(formed, partitions(formed))


def test_other_targets_keep_what_they_have() -> None:
    model, optimizer = trained()
    kept = {n: s.learned() for n, s in sites(model).items() if n != Q}
    gr.edit(model, {Q: gr.Partition(splits(model)[Q])}, optimizer)
    for name, learned in kept.items():
        now = sites(model)[name].learned()
        assert {f: id(p) for f, p in now.items()} == {f: id(p) for f, p in learned.items()}
    twin, made = built_that_way(settled(model), optimizer, LLAMA, "adamw")
    assert len(trainable(twin)) == len(made.param_groups[0]["params"])


def settled(model: Any) -> Any:
    copied = copy.deepcopy(model)
    settle(copied)
    return copied


def test_rows_of_every_target_differ() -> None:
    model, _ = trained(steps=1)
    masks = {tuple(rows_of(site)) for site in sites(model).values()}
    assert len(masks) > 3
