"""ElaLoRA's rule: what goes, what comes, and what it costs."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradrank as gr
import pruning_cases
from cases import CASES, batches
from dynamic_cases import adamw, adapted
from gradrank.adapters.view import lora_sites
from gradrank.methods.course import Decision, DirectionCourse
from gradrank.methods.elalora import ElaLora, ElaLoraCourse
from gradrank.methods.importance import ElementImportance
from oracles.elalora import one_round, round_by_ranks, round_with_open_losers

TARGETS = [gr.Target("a", 4, 4), gr.Target("b", 6, 6), gr.Target("c", 4, 12), gr.Target("d", 4, 4)]
COSTS = {target.name: target.cost for target in TARGETS}
SHORT: dict[str, Any] = {"moves": 4, "interval": 2, "warmup": 2, "final": 3}


class Told(ElementImportance):
    """Importance that the test tells."""

    def __init__(self, told: Mapping[str, Sequence[float]]) -> None:
        super().__init__(0.85, 0.85, "product", 0.0)
        self.told = told

    def scores(self, targets: Any, lam: Any) -> dict[str, Tensor]:
        return {n: torch.tensor(found, dtype=torch.float64) for n, found in self.told.items()}


def decided(
    told: Mapping[str, Sequence[float]],
    budget: int,
    targets: Sequence[gr.Target] = TARGETS,
    **o: Any,
) -> Decision:
    course = ElaLoraCourse(ElaLora(**o), Told(told), targets, budget, 20)
    assert isinstance(course, DirectionCourse)
    return course.choose(budget, {n: torch.ones(len(found)) for n, found in told.items()})


def test_the_room_of_the_least_important_goes_to_the_most_important() -> None:
    told = {"a": [5.0, 0.1], "b": [9.0], "c": [0.2, 0.3], "d": [4.0]}
    found = decided(told, 8 * 2 + 12 + 16 * 2 + 8, moves=2)
    # 8 and 16 parameters are free: b (12) comes first, then d (8).
    assert found.keep == {"a": (0,), "b": (0,), "c": (1,), "d": (0,)}
    assert found.ranks == {"a": 1, "b": 2, "c": 1, "d": 2}
    assert found.details["importance"] == {"a": 5.0, "b": 9.0, "c": 0.3, "d": 4.0}


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    told=st.fixed_dictionaries(
        {n: st.lists(st.integers(0, 6).map(float), min_size=1, max_size=4) for n in COSTS}
    ),
    slack=st.integers(0, 40),
    moves=st.integers(1, 6),
    most_new=st.integers(1, 3),
    r_max=st.integers(2, 5),
)
def test_a_round_is_the_slow_one(
    told: dict[str, list[float]], slack: int, moves: int, most_new: int, r_max: int
) -> None:
    budget = sum(COSTS[n] * len(found) for n, found in told.items()) + slack
    options = {"moves": moves, "max_growth": most_new, "r_max": r_max}
    found = decided(told, budget, **options)
    kept, new = one_round(TARGETS, told, budget, moves, most_new, 1, r_max)
    assert found.keep == kept
    assert found.ranks == {n: len(kept[n]) + new[n] for n in kept}
    assert sum(COSTS[n] * rank for n, rank in found.ranks.items()) <= budget
    turned = decided(told, budget, TARGETS[::-1], **options)
    assert turned.ranks == found.ranks
    assert turned.keep == found.keep


def test_the_twin_catches_broken_ones() -> None:
    told = {"a": [5.0, 4.5, 0.1], "b": [9.0], "c": [8.0, 0.3], "d": [4.0]}
    budget = sum(COSTS[n] * len(found) for n, found in told.items())
    found = decided(told, budget, moves=1)
    for broken in (round_by_ranks, round_with_open_losers):
        kept, new = broken(TARGETS, told, budget, 1, 2)
        assert found.keep == kept
        assert found.ranks != {n: len(kept[n]) + new[n] for n in kept}, broken.__name__


def test_nan_scores_are_refused() -> None:
    with pytest.raises(gr.MeasurementError, match=r"\('a', ...\) is NaN"):
        decided({"a": [float("nan")], "b": [1.0], "c": [1.0], "d": [1.0]}, 100)


def run(case: str = "llama", **options: Any) -> tuple[Any, gr.Controller]:
    method, model = ElaLora(**SHORT | options), adapted(case, rank=2)
    gr.reserve(model, method, "uniform:2")
    optimizer = adamw(model, lr=2e-2)
    controller = gr.Controller(model, optimizer, method, "uniform:2", 12)
    for batch in batches(CASES[case], 12):
        pruning_cases.step(model, optimizer, controller, batch)
    return model, controller


def test_a_run_moves_ranks_and_stays_at_the_budget() -> None:
    model, controller = run()
    assert [d["step"] for d in controller.run.decisions] == [4, 6, 8, 9]
    assert controller.run.start_parameters == controller.run.budget
    assert all(
        d["parameters"] <= d["budget"] == controller.run.budget for d in controller.run.decisions
    )
    assert sum(d["moved"] for d in controller.run.decisions) > 0
    assert len(set(controller.ranks.values())) > 1
    assert min(controller.ranks.values()) >= 1
    site = max(lora_sites(model, "default").values(), key=lambda s: s.rank)
    importance: Any = controller.run.course._importance
    assert {
        importance._mean[name, "lam"].shape[0] == rank for name, rank in controller.ranks.items()
    } == {True}
    assert site.rank > 2


def test_growth_does_not_change_the_function() -> None:
    """What comes has λ = 0: without anything taken away the outputs stay."""
    method, model = ElaLora(**SHORT), adapted(rank=1)
    gr.reserve(model, method, "uniform:1")
    controller = gr.Controller(model, adamw(model), method, "uniform:2", 12)
    optimizer: Any = controller.run._optimizer
    for batch in batches(CASES["llama"], 3):
        pruning_cases.step(model, optimizer, controller, batch)
    data = batches(CASES["llama"], 1, seed=3)[0]
    model(**data).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        before = model.eval()(**data).logits
        report = controller.step()
        after = model(**data).logits
    assert report is not None
    assert report.moved > 0
    assert torch.allclose(before, after, atol=1e-6)


def test_fixed_shapes_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    method, model = ElaLora(**SHORT), adapted(rank=2)
    gr.reserve(model, method, "uniform:2", fixed=True)
    monkeypatch.setattr("gradrank.adapters.guard.wrapping", lambda *_: "DistributedDataParallel")
    with pytest.raises(
        gr.SurgeryError, match=r"'elalora' adds directions.*DistributedDataParallel"
    ):
        gr.Controller(model, adamw(model), method, "uniform:2", 12)


def test_options_are_checked() -> None:
    for name, wrong in (
        ("moves", 0),
        ("max_growth", 0),
        ("r_min", 0),
        ("beta1", 1.0),
        ("final", 0),
    ):
        with pytest.raises(gr.OptionError, match=rf"'{name}' of method 'elalora'"):
            ElaLora(**{name: wrong})
