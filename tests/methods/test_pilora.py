"""PiLoRA: options, timetable, ranks, counting, splits within a budget, and its twin."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradrank as gr
from gradrank.allocation.neurons import RULES
from gradrank.methods.course import DynamicMethod, NeuronCourse
from gradrank.methods.method import build
from gradrank.ops.neurons import neuron_importance
from gradrank.schedule import TwoStage
from methods.pilora_cases import INITIAL, INTERVAL, MAX_NORM, NAMES, network, steps, twin
from oracles.pilora import MISTAKES

TARGETS = [
    gr.Target("layers.0.q_proj", 8, 8),
    gr.Target("layers.0.k_proj", 8, 4),
    gr.Target("layers.0.up_proj", 8, 12),
    gr.Target("score", 8, 1),
]
WHOLE = sum(target.cost for target in TARGETS)

# --- options -------------------------------------------------------------------------------------

REFUSED: list[tuple[str, list[Any], str]] = [
    ("rank", [0, -1], "at least supplementary_rank and 1, 1 here, or none"),
    ("dominant_rank", [0, -1], "at least supplementary_rank and 1, 1 here, or none"),
    ("supplementary_rank", [-1], "0 or more"),
    ("interval", [0, -1], "1 or more"),
    ("initial_steps", [0, -3], "1 or more, or none"),
    ("rule", ["majorty", ""], "one of majority, mean, top_fraction, cumulative, random"),
    ("fraction", [-0.1, 1.1, math.nan], r"in \[0, 1\]"),
    ("threshold", [-0.1, 1.1, math.nan], r"in \[0, 1\]"),
    ("start", ["cold", ""], "'restart' or 'warm'"),
]


@pytest.mark.parametrize(("option", "values", "rule"), REFUSED)
def test_values_out_of_range_are_refused_with_their_rule(
    option: str, values: list[Any], rule: str
) -> None:
    for value in values:
        with pytest.raises(gr.OptionError, match=rf"'{option}' of method 'pilora' is .*{rule}"):
            gr.PiLora(**{option: value})


def test_every_option_that_has_a_range_is_tested_above() -> None:
    tested = {option for option, *_ in REFUSED}
    assert {field.name for field in dataclasses.fields(gr.PiLora)} - tested == {"seed"}


def test_the_supplementary_rank_is_not_above_the_others() -> None:
    assert gr.PiLora(rank=4, supplementary_rank=4).supplementary_rank == 4
    for option in ("rank", "dominant_rank"):
        with pytest.raises(gr.OptionError, match=rf"'{option}'.*4 here"):
            gr.PiLora(**{option: 3}, supplementary_rank=4)


def test_it_is_built_from_text_and_is_a_dynamic_method() -> None:
    made = build(gr.METHODS["pilora"], {"rank": "8", "initial_steps": "none", "rule": "mean"})
    assert made == gr.PiLora(rank=8, rule="mean")
    assert isinstance(made, DynamicMethod)
    assert made.signals() == ()


# --- timetable, ranks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "first"), [(8, 10), (12, 10), (60, 20), (300, 100), (900, 100), (5000, 500)]
)
def test_without_initial_steps_short_runs_still_get_looks(total: int, first: int) -> None:
    assert gr.PiLora().timetable(total) == TwoStage(total, first, 10)
    assert gr.PiLora(initial_steps=7, interval=3).timetable(total) == TwoStage(total, 7, 3)


def course(budget: int = 3 * WHOLE, total: int = 12, targets: Any = None, **options: Any) -> Any:
    return gr.PiLora(**{"interval": 1} | options).course(targets or TARGETS, budget, total)


def test_a_course_has_the_ranks_of_both_stages() -> None:
    found = course(rank=6, dominant_rank=5, supplementary_rank=2, start="warm")
    assert isinstance(found, NeuronCourse)
    assert list(found.ceilings.values()) == [6, 4, 6, 1]
    assert list(found.supplementary.values()) == [2, 2, 2, 1]
    assert found.start == "warm"
    assert found.schedule == TwoStage(12, 4, 1)
    look(found)
    split = found.split(99 * WHOLE).partitions
    assert [split[t.name].rank for t in TARGETS] == [5, 4, 5, 1]
    only = course(dominant_rank=5)
    assert only.ceilings["layers.0.q_proj"] == 5


def half_cost(rank: int, lower: int, targets: list[gr.Target]) -> int:
    total = 0
    for target in targets:
        flags = [i < math.ceil(target.d_out / 2) for i in range(target.d_out)]
        upper, least = min(rank, target.max_rank), min(lower, target.max_rank)
        total += gr.NeuronPartition.of(flags, upper, least).parameters(target.d_in)
    return total


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 3), st.integers(0, 900))
def test_without_a_rank_it_is_the_largest_with_which_half_of_all_fit(lower: int, more: int) -> None:
    budget = lower * WHOLE + more
    found = gr.PiLora(supplementary_rank=lower).first_rank(TARGETS, budget)
    most = max(target.max_rank for target in TARGETS)
    fitting = [r for r in range(1, most + 1) if half_cost(r, lower, TARGETS) <= budget]
    assert found == max([1, lower, *fitting])


def test_a_plan_is_uniform_within_the_budget_and_at_most_the_rank() -> None:
    def ranks(budget: int, **options: Any) -> list[int]:
        return list(gr.allocate(TARGETS, gr.PiLora(**options), budget).ranks.values())

    uniform = list(gr.allocate(TARGETS, "uniform", 3 * WHOLE).ranks.values())
    first = gr.PiLora().first_rank(TARGETS, 3 * WHOLE)
    assert ranks(3 * WHOLE) == [min(rank, first) for rank in uniform]
    assert ranks(99 * WHOLE, rank=2) == [2, 2, 2, 1]
    assert ranks(2 * WHOLE, rank=2) == [2, 2, 2, 1]
    for budget in range(WHOLE, 4 * WHOLE, 7):
        course = gr.PiLora(interval=1, initial_steps=1).course(TARGETS, budget, 2)
        # Otherwise the adapter of the plan could not be brought to the rank of the first stage.
        assert all(r <= c for r, c in zip(ranks(budget), course.ceilings.values(), strict=True))
    tight = ranks(2 * WHOLE - 9, rank=3)
    assert max(tight) <= 3
    assert tight == [
        min(3, r) for r in gr.allocate(TARGETS, "uniform", 2 * WHOLE - 9).ranks.values()
    ]


def test_what_the_budget_leaves_does_not_lift_a_small_target_above_the_rank() -> None:
    targets = [gr.Target("a", 50, 50), gr.Target("b", 8, 8)]
    assert gr.allocate(targets, "uniform", 231).ranks["b"] > 2
    assert gr.allocate(targets, gr.PiLora(rank=2), 231).ranks == {"a": 1, "b": 2}


def test_a_budget_below_the_supplementary_rank_is_refused_everywhere() -> None:
    method = gr.PiLora(supplementary_rank=3, rank=4)
    message = r"below the floor of .*supplementary rank 3.*lower supplementary_rank"
    with pytest.raises(gr.BudgetError, match=message):
        gr.allocate(TARGETS, method, 2 * WHOLE)
    with pytest.raises(gr.BudgetError, match=message):
        method.course(TARGETS, 2 * WHOLE, 12)


def test_the_budget_holds_from_the_decision_on() -> None:
    found = course(budget=100, total=9, initial_steps=3)
    assert [found.allowed(step, 160) for step in (0, 2, 3, 9)] == [160, 160, 100, 100]
    assert [found.allowed(step, 60) for step in (0, 3)] == [100, 100]
    never = course(budget=100, total=9, initial_steps=9)
    assert never.allowed(9, 160) == 160


# --- counting ------------------------------------------------------------------------------------


def importance(seed: int = 0, targets: Any = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ordered = sorted(targets or TARGETS, key=lambda target: target.name)
    return {t.name: torch.rand(t.d_out, generator=generator) ** 2 for t in ordered}


def look(found: Any, times: int = 3) -> Any:
    for seed in range(times):
        found.look(importance(seed))
    return found


def test_a_look_counts_rows_above_the_mean_and_adds_up_shares() -> None:
    found = course()
    k = "layers.0.k_proj"
    found.look({k: torch.tensor([1.0, 2.0, 6.0, 3.0])})
    found.look({k: torch.tensor([5.0, 0.0, 3.0, 2.0])})
    assert found.hits[k].tolist() == [1, 0, 2, 0]
    assert found.shares[k].tolist() == pytest.approx([7 / 12, 2 / 12, 9.6 / 12, 5.4 / 12])
    assert found.looks == {t.name: 2 if t.name == k else 0 for t in TARGETS}


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 3.4e38])
def test_equal_rows_are_never_hits_however_their_mean_rounds(value: float) -> None:
    for rows in (1, 3, 4093):
        target = gr.Target("q", 2, rows)
        found = gr.PiLora(rank=1).course([target], 9 * target.cost, 20)
        found.look({"q": torch.full((rows,), value)})
        assert not found.hits["q"].any()
        assert found.looks == {"q": 1}


def test_the_scale_of_a_look_does_not_matter() -> None:
    plain, scaled = look(course()), course()
    for seed in range(3):
        scaled.look({n: s * 2.0 ** (20 - 30 * seed) for n, s in importance(seed).items()})
    for name in plain.hits:
        assert torch.equal(plain.hits[name], scaled.hits[name])
        torch.testing.assert_close(plain.shares[name], scaled.shares[name], rtol=1e-12, atol=0)


def test_a_target_without_importance_does_not_count_the_look() -> None:
    found = look(course(), 2)
    q = TARGETS[0].name
    found.look(importance(2) | {q: torch.zeros(8)})
    assert found.looks == {t.name: 2 if t.name == q else 3 for t in TARGETS}
    assert found.shares[q].sum().item() == pytest.approx(2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_look_is_taken_whole_or_not_at_all(bad: float) -> None:
    found = look(course())
    before = found.state()
    spoiled = importance(7)
    spoiled["score"][0] = bad
    with pytest.raises(gr.MeasurementError, match=r"'score' is negative or not finite"):
        found.look(spoiled)
    for wrong, message in (
        ({"layers.0.q_proj": torch.ones(8), "score": torch.ones(2)}, r"'score' has 1 output rows"),
        ({"layers.0.q_proj": torch.ones(8), "lm_head": torch.ones(2)}, r"'lm_head' has no output"),
    ):
        with pytest.raises(gr.MeasurementError, match=message):
            found.look(wrong)
    assert all(torch.equal(before[key], tensor) for key, tensor in found.state().items())


# --- splitting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("budget", [WHOLE, 2 * WHOLE - 1, 3 * WHOLE, 9 * WHOLE])
def test_every_rule_keeps_every_budget_in_any_order(rule: str, budget: int) -> None:
    decisions = [
        look(course(budget, targets=targets, rank=4, rule=rule)).split(budget)
        for targets in (TARGETS, TARGETS[::-1])
    ]
    first, backwards = decisions
    assert first.partitions == backwards.partitions
    assert list(backwards.partitions) == [target.name for target in TARGETS[::-1]]
    partitions = first.partitions
    assert first.ranks == {name: p.lora_rank for name, p in partitions.items()}
    assert sum(partitions[t.name].parameters(t.d_in) for t in TARGETS) <= budget
    rows = {name: p.dominant_rows for name, p in partitions.items()}
    assert first.details["dominant_share"] == {t.name: rows[t.name] / t.d_out for t in TARGETS}
    assert first.facts["looks"] == 3
    assert first.facts["dominant_share"] == sum(rows.values()) / 25
    assert (first.facts["trimmed"] == 0) == (budget == 9 * WHOLE)
    assert rows["layers.0.up_proj"] > 0 or budget < 3 * WHOLE


def test_the_mean_frequency_of_hits_is_reported() -> None:
    found = course()
    found.look({"layers.0.k_proj": torch.tensor([1.0, 2.0, 6.0, 3.0])})
    found.look({"layers.0.k_proj": torch.tensor([5.0, 0.0, 3.0, 2.0])})
    rate = found.split(9 * WHOLE).details["hit_rate"]
    assert rate == {t.name: 3 / 8 if t.name == "layers.0.k_proj" else 0 for t in TARGETS}


def test_the_rows_that_give_way_are_those_that_were_hit_least_often() -> None:
    target = gr.Target("q", 4, 6)
    found = gr.PiLora(rank=4, rule="top_fraction", fraction=1.0, interval=1).course([target], 35, 9)
    for rows in ([9, 9, 9, 1, 1, 1], [9, 9, 1, 1, 7, 1], [9, 1, 1, 8, 1, 1]):
        found.look({"q": torch.tensor(rows, dtype=torch.float32)})
    whole = found.split(4 * 10).partitions["q"]
    assert whole.dominant_rows == 6
    assert whole.lora_rank == 4
    # 4 (4 + 3) + (4 + 3) parameters. Of the three rows with one hit the fourth has most importance.
    cut = found.split(35)
    assert cut.partitions["q"].mask == [True, True, False, True, False, False]
    assert cut.facts["trimmed"] == 3


def test_nothing_to_split_by_is_refused_unless_chance_decides() -> None:
    for rule in RULES:
        empty = course(rule=rule, rank=4)
        if rule == "random":
            assert empty.split(9 * WHOLE).facts == {
                "looks": 0.0,
                "dominant_share": 13 / 25,
                "trimmed": 0.0,
            }
        else:
            with pytest.raises(gr.MeasurementError, match="no look at finite gradients"):
                empty.split(9 * WHOLE)


def test_a_random_split_is_not_trimmed_by_what_was_seen() -> None:
    options: dict[str, Any] = {"rule": "random", "rank": 4, "seed": 5}
    seen, blind = look(course(**options)), course(**options)
    budget = 2 * WHOLE
    assert seen.split(budget).facts["trimmed"] > 0
    assert seen.split(budget).partitions == blind.split(budget).partitions
    other = course(**options | {"seed": 6})
    assert other.split(9 * WHOLE).partitions != blind.split(9 * WHOLE).partitions


def test_a_single_row_gets_the_supplementary_rank_or_none() -> None:
    split = look(course(rank=4)).split(9 * WHOLE)
    assert split.partitions["score"].ranks == (0, 1)
    assert not split.partitions["score"].is_split
    without = look(course(rank=4, supplementary_rank=0)).split(9 * WHOLE)
    assert without.ranks["score"] == 0
    assert without.partitions["layers.0.q_proj"].ranks == (4, 0)
    assert without.partitions["layers.0.q_proj"].is_split


def test_equal_ranks_are_two_groups_still() -> None:
    split = look(course(rank=2, supplementary_rank=2)).split(9 * WHOLE)
    assert split.partitions["layers.0.q_proj"].ranks == (2, 2)
    assert split.ranks["layers.0.q_proj"] == 4


def test_a_split_that_leaves_nothing_to_train_is_refused() -> None:
    found = course(rank=4, supplementary_rank=0)
    found.look({target.name: torch.ones(target.d_out) for target in TARGETS})
    with pytest.raises(gr.BudgetError, match="every one of 4 targets ends at rank 0"):
        found.split(9 * WHOLE)


# --- memory --------------------------------------------------------------------------------------


def test_a_course_goes_on_where_it_was_saved() -> None:
    first, whole = look(course(), 2), look(course(), 4)
    again = course(targets=TARGETS[::-1])
    again.restore({key: tensor.clone() for key, tensor in first.state().items()})
    for seed in (2, 3):
        again.look(importance(seed))
    assert again.split(3 * WHOLE).partitions == whole.split(3 * WHOLE).partitions
    assert whole.state().keys() == again.state().keys()
    assert all(torch.equal(whole.state()[key], t) for key, t in again.state().items())
    # What was handed out is not what is counted on.
    assert first.looks["score"] == 2


def damaged(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    hits, shares, looks = (f"{kind}/score" for kind in ("hits", "shares", "looks"))
    return {
        "missing": {key: t for key, t in state.items() if key != hits},
        "empty": {},
        "longer": state | {hits: torch.zeros(2, dtype=torch.int64)},
        "type": state | {hits: torch.zeros(1)},
        "more hits than looks": state | {hits: torch.tensor([4])},
        "negative": state | {hits: torch.tensor([-1])},
        "nan": state | {shares: torch.tensor([math.nan], dtype=torch.float64)},
        "shares of other looks": state | {looks: torch.tensor(9)},
        "looks": state | {looks: torch.tensor([3])},
    }[what]


@pytest.mark.parametrize(
    "what",
    [
        "missing",
        "empty",
        "longer",
        "type",
        "more hits than looks",
        "negative",
        "nan",
        "shares of other looks",
        "looks",
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(what: str) -> None:
    found = look(course(), 1)
    before = found.state()
    with pytest.raises(gr.OptionError, match=r"neurons of 'score' that could be right|'layers"):
        found.restore(damaged(look(course()).state(), what))
    assert all(torch.equal(before[key], tensor) for key, tensor in found.state().items())


# --- a whole first stage beside the twin ---------------------------------------------------------


def first_stage(model: Any, found: Any, data: Any) -> list[float]:
    """Plain training with torch; looks are taken as the watch takes them, before clipping."""
    net, losses = model.base_model.model, []
    layers = {name: net.get_submodule(name) for name in NAMES}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.02)
    for step, micro_batches in enumerate(data, start=1):
        optimizer.zero_grad()
        total = 0.0
        for x, y in micro_batches:
            loss = ((model(x) - y) ** 2).mean() / len(micro_batches)
            loss.backward()
            total += loss.item()
        losses.append(total)
        if found.schedule.observes(step):
            sums = {}
            for name, layer in layers.items():
                A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                sums[name] = neuron_importance(A, B, A.grad, B.grad)
            found.look(sums)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
    return losses


@pytest.mark.parametrize("interval", [1, INTERVAL, 3])
def test_counts_and_masks_are_those_of_algorithm_1(interval: int) -> None:
    model, data = network(), steps()
    targets = [
        gr.Target(name, layer.in_features, layer.out_features)
        for name in NAMES
        for layer in [model.base_model.model.get_submodule(name)]
    ]
    method = gr.PiLora(rank=3, interval=interval, initial_steps=INITIAL)
    found = method.course(targets, 9 * sum(t.cost for t in targets), len(data))
    oracle = twin(model, interval=interval)
    oracle.first_stage(data[:INITIAL])
    losses = first_stage(model, found, data[:INITIAL])
    torch.testing.assert_close(losses, oracle.losses, rtol=1e-9, atol=0)
    assert {name: hits.tolist() for name, hits in found.hits.items()} == oracle.hits
    partitions = found.split(9 * sum(t.cost for t in targets)).partitions
    assert {name: [int(d) for d in p.mask] for name, p in partitions.items()} == oracle.masks()
    assert set(found.looks.values()) == {oracle.looks}
    assert 0 < sum(map(sum, oracle.masks().values())) < 17
    for mistake in MISTAKES:
        wrong = twin(network(), interval=interval, broken=mistake)
        wrong.first_stage(data[:INITIAL])
        assert wrong.hits != oracle.hits, mistake
