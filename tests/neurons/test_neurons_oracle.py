"""A whole two-stage run of the controller beside Algorithm 1, loops and all."""

import math
from typing import Any

import pytest
import torch

import gradrank as gr
from gradrank.adapters.view import lora_sites
from gradrank.core.partition import NeuronPartition
from methods.pilora_cases import (
    DECAY,
    INITIAL,
    INTERVAL,
    LR,
    MAX_NORM,
    NAMES,
    RANK,
    STEPS,
    SUPPLEMENTARY,
    network,
    steps,
    twin,
)
from oracles.neuron_rules import fewest_that_reach
from oracles.pilora import MISTAKES, Groups, TwoStages

PLENTY = 10_000  # more parameters than any split asks for, so that no row gives way


class Fast:
    """The library's run of both stages."""

    def __init__(self, model: Any, total: int = STEPS, **options: Any) -> None:
        settings: dict[str, Any] = {
            "rank": RANK,
            "supplementary_rank": SUPPLEMENTARY,
            "interval": INTERVAL,
            "initial_steps": INITIAL,
        }
        method = gr.PiLora(**settings | options)
        gr.reserve(model, method, PLENTY)
        self.model, self.dtype = model, next(model.parameters()).dtype
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=DECAY
        )
        self.controller = gr.Controller(model, self.optimizer, method, PLENTY, total)
        self.losses: list[float] = []

    def train(self, data: Any) -> None:
        for micro_batches in data:
            total = 0.0
            for x, y in micro_batches:
                found = self.model(x.to(self.dtype)) - y.to(self.dtype)
                loss = (found**2).mean() / len(micro_batches)
                loss.backward()
                total += loss.item()
            held = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(held, MAX_NORM)
            self.optimizer.step()
            self.controller.step()
            self.optimizer.zero_grad()
            self.losses.append(total)

    def hits(self) -> dict[str, list[int]]:
        course: Any = self.controller.run.course
        return {name: hits.tolist() for name, hits in course.hits.items()}

    def masks(self) -> dict[str, list[int]]:
        neurons: Any = self.controller.run.neurons
        return {
            name: [int(row) for row in NeuronPartition.from_dict(entry).mask]
            for name, entry in neurons["targets"].items()
        }

    def groups(self) -> dict[str, Groups]:
        """The factors that the second stage begins with, in the twin's words."""
        found, masks = {}, self.masks()
        for name, site in lora_sites(self.model, "default").items():
            copies = {k: p.detach().clone().double() for k, p in site.learned().items()}
            A, none = copies["A"], torch.zeros(0, 0).double()
            if site.partition is not None:
                rank = site.partition.rank
                parts = A[:rank], copies["B_d"], A[rank:], copies["B_s"]
            elif all(masks[name]):
                parts = A, copies["B"], A[:0], none
            else:
                parts = A[:0], none, A, copies["B"]
            found[name] = Groups(masks[name], *parts)
        return found


def both(dtype: torch.dtype) -> tuple[Fast, TwoStages]:
    model, data = network().to(dtype), steps()
    oracle = twin(model)
    fast = Fast(model)
    fast.train(data[:INITIAL])
    oracle.first_stage(data[:INITIAL])
    assert fast.masks() == oracle.masks()
    oracle.second_stage(data[INITIAL:], fast.groups())
    fast.train(data[INITIAL:])
    return fast, oracle


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_whole_run_is_that_of_algorithm_1(dtype: torch.dtype, rtol: float) -> None:
    fast, oracle = both(dtype)
    assert fast.hits() == oracle.hits
    assert fast.controller.run.neurons is not None
    assert fast.controller.run.neurons["looks"] == oracle.looks == INITIAL // INTERVAL
    assert any(0 < sum(mask) < len(mask) for mask in oracle.masks().values())
    torch.testing.assert_close(fast.losses, oracle.losses, rtol=rtol, atol=0)
    assert min(abs(a - b) for a, b in zip(oracle.losses, oracle.losses[1:], strict=False)) > 1e-3
    for name, site in lora_sites(fast.model, "default").items():
        groups = oracle.layers[name].groups
        assert groups is not None
        update = site.layer.get_delta_weight("default").double()
        wanted = site.scaling * groups.update().detach()
        torch.testing.assert_close(update, wanted, rtol=rtol, atol=rtol)


def test_the_ranks_after_the_split_are_those_of_the_groups() -> None:
    fast, oracle = both(torch.float64)
    for name, site in lora_sites(fast.model, "default").items():
        dominant = sum(oracle.masks()[name])
        upper = RANK if dominant else 0
        lower = SUPPLEMENTARY if dominant < len(oracle.masks()[name]) else 0
        assert site.rank == upper + lower
    assert oracle.masks()["head"] == [0]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_broken_twin_is_told_apart(mistake: str) -> None:
    data = steps()[:INITIAL]
    fast, wrong = Fast(network()), twin(network(), broken=mistake)
    fast.train(data)
    wrong.first_stage(data)
    assert fast.losses == pytest.approx(wrong.losses, rel=1e-9)
    assert fast.hits() != wrong.hits
    assert fast.masks() != wrong.masks()


def test_a_second_stage_with_other_rows_is_told_apart() -> None:
    """The losses of stage 2 do depend on the mask."""
    model, data = network(), steps()
    oracle, fast = twin(model), Fast(model)
    fast.train(data[:INITIAL])
    oracle.first_stage(data[:INITIAL])
    groups = fast.groups()
    for name, own in groups.items():
        shifted = [*own.mask[1:], own.mask[0]]
        groups[name] = Groups(shifted, own.A_d, own.B_d, own.A_s, own.B_s)
        oracle.layers[name].groups = groups[name]
    oracle.masks = lambda: {name: own.mask for name, own in groups.items()}  # type: ignore[method-assign]
    oracle.second_stage(data[INITIAL:], groups)
    fast.train(data[INITIAL:])
    assert fast.losses[INITIAL] == pytest.approx(oracle.losses[INITIAL], rel=1e-9)  # B = 0
    assert abs(fast.losses[-1] / oracle.losses[-1] - 1) > 1e-3


def shares(oracle: TwoStages, name: str) -> list[float]:
    rows = [[s / math.fsum(look[name]) for s in look[name]] for look in oracle.importance]
    return [math.fsum(column) for column in zip(*rows, strict=True)]


def wanted_mask(oracle: TwoStages, name: str, rule: str) -> list[int]:
    hits, found = oracle.hits[name], shares(oracle, name)
    order = sorted(range(len(hits)), key=lambda i: (-found[i], -hits[i], i))
    if rule == "majority":
        return [int(h > oracle.looks / 2) for h in hits]
    if rule == "mean":
        return [int(h > sum(hits) / len(hits)) for h in hits]
    rows = math.ceil(0.4 * len(hits)) if rule == "top_fraction" else fewest_that_reach(found, 0.7)
    return [int(i in order[:rows]) for i in range(len(hits))]


@pytest.mark.parametrize("rule", ["majority", "mean", "top_fraction", "cumulative"])
def test_the_masks_of_every_rule_follow_from_the_twins_importance(rule: str) -> None:
    model, data = network(), steps()
    oracle = twin(model, interval=1)
    fast = Fast(model, interval=1, rule=rule, fraction=0.4, threshold=0.7)
    fast.train(data)
    oracle.first_stage(data[:INITIAL])
    wanted = {name: wanted_mask(oracle, name, rule) for name in NAMES}
    assert fast.masks() == wanted
    assert 0 < sum(wanted["first"]) < len(wanted["first"])


def test_chance_does_not_look_at_what_it_controls_for() -> None:
    found = []
    for seed, salt in ((0, 0), (0, 5), (1, 0)):
        fast = Fast(network(salt), rule="random", fraction=0.4, seed=seed)
        fast.train(steps())
        found.append(fast.masks())
    assert found[0] == found[1] != found[2]
    assert [sum(found[0][name]) for name in ("first", "second")] == [4, 3]
