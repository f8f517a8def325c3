"""The exam that every registered method must pass; a new registry line is examined by itself."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import gradrank as gr
from cases import CASES, batches
from gradrank.adapters.apply import count_trainable
from gradrank.methods import registry
from gradrank.methods.course import DynamicMethod
from gradrank.methods.method import Method, build, describe_options
from gradrank.methods.pruning import PruningOptions
from gradrank.signals.facts import find_targets, model_facts
from gradrank.signals.measurement import Measurement

NAMES = list(gr.METHODS)
COUNT = 6


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def measured(case: str, signals: tuple[Any, ...]) -> Measurement:
    made = CASES[case]
    data = batches(made, COUNT)
    return gr.measure(made.model(), data, list(signals), num_batches=COUNT)


def material(name: str, case: str = "llama") -> Any:
    """Exactly what a method asks for: its own signals, or the bare targets."""
    signals = build(gr.METHODS[name], {}).signals()
    return measured(case, signals) if signals else find_targets(CASES[case].model())


def planned(name: str, budget: Any = "uniform:2", case: str = "llama", **options: Any) -> gr.Plan:
    return gr.allocate(material(name, case), name, budget, options=options)


# --- what it says of itself --------------------------------------------------------------------


def test_it_is_described(name: str) -> None:
    made = gr.METHODS[name]
    assert made.name == name
    assert len(made.summary) > 10
    assert made.source
    assert made.__doc__
    method = build(made, {})
    assert isinstance(method, Method)
    assert dataclasses.is_dataclass(method)
    assert made.__dataclass_params__.frozen


def test_its_options_are_described_and_built_from_text(name: str) -> None:
    made = gr.METHODS[name]
    rows = describe_options(made)
    assert [row["name"] for row in rows] == [field.name for field in dataclasses.fields(made)]
    for row in rows:
        assert row["help"], f"option '{row['name']}' has no help text"
        assert row["type"]
        value = str(row["default"])
        assert build(made, {row["name"]: value}) == build(made, {}), row["name"]
        assert build(made, {row["name"]: row["default"]}) == build(made, {})
    json.dumps(rows)


def test_an_unknown_option_names_method_and_option(name: str) -> None:
    with pytest.raises(gr.OptionError, match=rf"'{name}' has no option 'r_maxx'"):
        build(gr.METHODS[name], {"r_maxx": 3})


def test_a_wrong_type_names_method_and_option(name: str) -> None:
    made = gr.METHODS[name]
    for row in describe_options(made):
        for wrong in ([1], {"a": 1}, object(), "no such value", float("nan"), -7):
            if row["type"] == "str" and wrong == "no such value":
                assert row["help"]
            if _takes(row["type"], wrong):
                continue
            with pytest.raises(gr.OptionError) as caught:
                build(made, {row["name"]: wrong})
            assert f"'{row['name']}'" in str(caught.value)
            assert f"'{name}'" in str(caught.value)


def _takes(kind: str, value: Any) -> bool:
    """Whether a seed or the like may really have this value."""
    return kind == "int" and value == -7


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("r_min", [-1]),
        ("r_max", [0, -3]),
        ("energy", [0, -0.5, 1.5]),
        ("sketch_dim", [0, 10**6]),
        ("directions", [0, 10**6]),
        ("estimator", ["densely"]),
        ("solver", ["magic"]),
        ("of", ["nothing", "permuted", "reversed"]),
        ("first", [-1, float("inf")]),
        ("last", [-1]),
    ],
)
def test_out_of_range_values_name_method_and_option(
    name: str, option: str, values: list[Any]
) -> None:
    made = gr.METHODS[name]
    if option not in {row["name"] for row in describe_options(made)}:
        with pytest.raises(gr.OptionError, match="no option"):
            build(made, {option: values[0]})
        return
    for value in values:
        with pytest.raises(gr.OptionError, match=rf"'({option}|last)' of method '{name}'"):
            build(made, {option: value})


# --- what it decides ---------------------------------------------------------------------------


def test_it_is_deterministic(name: str) -> None:
    first, again = planned(name), planned(name)
    assert first == again


def test_the_order_of_targets_does_not_matter(name: str) -> None:
    forward = material(name)
    if isinstance(forward, Measurement):
        backward: Any = dataclasses.replace(forward, targets=forward.targets[::-1])
    else:
        backward = forward[::-1]
    for budget in ("uniform:1", "uniform:3", 3333):
        a, b = (gr.allocate(given, name, budget) for given in (forward, backward))
        assert a.ranks == b.ranks
        assert a.scores == pytest.approx(b.scores)
        assert list(b.ranks) == list(a.ranks)[::-1]


@pytest.mark.parametrize("case", list(CASES))
def test_the_budget_is_kept_and_spent(name: str, case: str) -> None:
    given = material(name, case)
    method = build(gr.METHODS[name], {})
    whole = sum(target.cost for target in find_targets(CASES[case].model()))
    for budget in (whole, whole + 1, 2 * whole - 1, 2 * whole, 3 * whole + 17, 5 * whole):
        plan = gr.allocate(given, name, budget)
        assert 0 < plan.parameters <= budget
        known = given if isinstance(given, Measurement) else None
        assessment = method.assess([p.target for p in plan.targets], known)
        most = first_rank(method, [p.target for p in plan.targets], budget)
        below = (p for p in plan.targets if p.rank < most)
        steps = [cost for p in below for cost in next_step(p, assessment)]
        assert plan.slack < min(steps, default=plan.slack + 1), f"{name} left {plan.slack}"


def next_step(planned_target: gr.PlannedTarget, assessment: gr.Assessment) -> list[int]:
    """What the next rank costs that would gain something, if there is one.

    Of a partition: the next rank of its dominant rows, which other rows do not pay for.
    """
    target, split = planned_target.target, planned_target.partition
    if split is None:
        return [target.cost] if planned_target.rank < highest(planned_target, assessment) else []
    mine = next(s for s in assessment.splits[target.name] if s.bits == split.bits)
    return [target.d_in + split.dominant_rows] if any(mine.upper[split.rank :]) else []


def highest(planned_target: gr.PlannedTarget, assessment: gr.Assessment) -> int:
    """The largest rank that a target may get: none without score, no direction without gain."""
    target = planned_target.target
    if not assessment.scores[target.name]:
        return 0
    if assessment.gains is None:
        return target.max_rank
    gains = list(assessment.gains[target.name])
    while gains and not gains[-1]:
        gains.pop()
    return min(len(gains), target.max_rank)


def first_rank(method: Any, targets: list[gr.Target], budget: int) -> int:
    """The rank that a plan does not exceed: of two stages that of the first one, else none."""
    if not isinstance(method, gr.PiLora):
        return max(target.max_rank for target in targets)
    return method.first_rank(targets, budget)


def test_a_larger_budget_never_spends_less(name: str) -> None:
    spent = [planned(name, f"uniform:{rank}").parameters for rank in range(1, 9)]
    assert spent == sorted(spent)
    assert spent[0] < spent[-1]


@pytest.mark.parametrize("bounds", [(1, 3), (0, 2), (2, 2)])
def test_rank_bounds_are_kept(name: str, bounds: tuple[int, int]) -> None:
    options = {row["name"] for row in describe_options(gr.METHODS[name])}
    low, high = bounds
    if isinstance(build(gr.METHODS[name], {}), PruningOptions):
        # Their plan is uniform; what they take away while training is examined in
        # test_dynamic_contract.py.
        assert min(planned(name, "uniform:2", r_min=low).ranks.values()) >= low
        return
    if name == "pilora":
        assert set(planned(name, "uniform:3", rank=high).ranks.values()) <= set(range(1, high + 1))
        return
    if not {"r_min", "r_max"} <= options:
        assert name in {"uniform", "subset", "reversed", "permuted"}
        return
    if low == 0 and isinstance(build(gr.METHODS[name], {}), DynamicMethod):
        # A target without an adapter has nowhere to grow from.
        with pytest.raises(gr.OptionError, match=r"'r_min'.*1 or more"):
            planned(name, "uniform:2", r_min=low, r_max=high)
        return
    plan = planned(name, "uniform:2", r_min=low, r_max=high)
    assert all(low <= rank <= high for rank in plan.ranks.values())


def test_impossible_budgets_name_the_floor_or_the_ceiling(name: str) -> None:
    with pytest.raises(gr.BudgetError, match="floor"):
        planned(name, 1)
    if name == "pilora":
        # What a rule does not ask for is not spent, so that there is no budget too large for it.
        assert set(planned(name, 10**12, rank=2).ranks.values()) == {2}
    else:
        with pytest.raises(gr.BudgetError, match="ceiling"):
            planned(name, 10**12)
    options = {row["name"] for row in describe_options(gr.METHODS[name])}
    if "r_min" in options:
        with pytest.raises(gr.BudgetError, match="floor"):
            planned(name, "uniform:2", r_min=3)


def test_scores_are_finite_and_belong_to_the_targets(name: str) -> None:
    given = material(name)
    targets = given.targets if isinstance(given, Measurement) else given
    known = given if isinstance(given, Measurement) else None
    assessment = build(gr.METHODS[name], {}).assess(targets, known)
    assert set(assessment.scores) == {target.name for target in targets}
    assert all(0 <= score < float("inf") for score in assessment.scores.values())
    assert set(assessment.details) <= set(assessment.scores)
    json.dumps({key: dict(row) for key, row in assessment.details.items()}, allow_nan=False)


def test_methods_that_measure_refuse_to_guess(name: str) -> None:
    method = build(gr.METHODS[name], {})
    targets = find_targets(CASES["llama"].model())
    if not method.signals():
        assert gr.allocate(targets, method).reliability is None
        return
    with pytest.raises(gr.MeasurementError, match=name):
        gr.allocate(targets, method)
    with pytest.raises(gr.MeasurementError):
        method.assess(targets, None)


def test_the_wrong_measurement_is_refused_by_signal(name: str) -> None:
    signals = build(gr.METHODS[name], {}).signals()
    kinds = {type(signal) for signal in signals}
    for signal in (gr.Spectrum(), gr.MeanGradient()):
        if not kinds or type(signal) in kinds:
            continue
        with pytest.raises(gr.MeasurementError, match=r"no '(spectrum|mean-gradient)' signal"):
            gr.allocate(measured("llama", (signal,)), name)


def test_its_plan_survives_json(name: str, tmp_path: Path) -> None:
    plan = planned(name)
    plan.save(tmp_path / "plan.json")
    again = gr.Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.method == name
    assert build(gr.METHODS[name], again.options) == build(gr.METHODS[name], {})


# --- what it does to a model -------------------------------------------------------------------


@pytest.mark.parametrize("case", list(CASES))
def test_plan_apply_and_one_step_on_every_architecture(name: str, case: str) -> None:
    made = CASES[case]
    model, data = made.model().train(), batches(made, 3)
    before = [(n, p.requires_grad, p.sum().item()) for n, p in model.named_parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    plan = gr.plan(model, data, name, "uniform:2", num_batches=3)
    assert [(n, p.requires_grad, p.sum().item()) for n, p in model.named_parameters()] == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(module.training for module in model.modules())
    facts = model_facts(model)
    assert {key: plan.provenance[key] for key in facts} == facts
    wrapped = gr.apply(plan, model)
    assert count_trainable(wrapped) == {"adapter": plan.parameters, "other": 0}
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    old = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    wrapped(**data[0]).loss.backward()
    optimizer.step()
    moved = {n for n, p in trained.items() if not torch.equal(p, old[n])}
    assert any(".lora_B." in n for n in moved)


# --- the registry ------------------------------------------------------------------------------


def test_every_file_is_registered_and_every_line_has_a_file() -> None:
    folder = Path(registry.__file__).parent
    shared = {"__init__", "method", "registry", "course", "pruning", "importance", "hits"}
    files = {path.stem for path in folder.glob("*.py")} - shared
    registered = {path.partition(":")[0].rpartition(".")[2] for path in registry._PATHS.values()}
    assert registered == files


def test_every_method_has_tests_of_its_own(name: str) -> None:
    module = registry._PATHS[name].partition(":")[0].rpartition(".")[2]
    file = Path(__file__).parents[1] / "methods" / f"test_{module}.py"
    assert file.is_file()
    assert "def test_" in file.read_text()


def test_unknown_methods_suggest_the_nearest() -> None:
    with pytest.raises(gr.OptionError, match=r"'gardd' is unknown. Did you mean 'gard'"):
        gr.METHODS["gardd"]
    assert "gard" in gr.METHODS
    assert "gardd" not in gr.METHODS
    assert len(gr.METHODS) == len(NAMES)


class Greedy:
    """A method that breaks the one promise that the session itself checks."""

    name, summary, source = "greedy", "takes all", "test"

    def signals(self) -> tuple[Any, ...]:
        return ()

    def assess(self, targets: Any, measurement: Any) -> gr.Assessment:
        return gr.Assessment({target.name: 1.0 for target in targets})

    def ranks(self, targets: Any, assessment: Any, budget: int) -> Any:
        return {target.name: target.max_rank for target in targets}


def test_the_exam_catches_a_method_that_overspends() -> None:
    targets = find_targets(CASES["llama"].model())
    with pytest.raises(gr.BudgetError, match="'greedy' spent"):
        gr.allocate(targets, Greedy(), "uniform:1")
