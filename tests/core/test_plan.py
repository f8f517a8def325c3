"""Plans: exact arithmetic, JSON both ways, and what hand edits may and may not do."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradrank as gr

SHAPES = {"h.0.q": (4, 6), "h.0.v": (4, 2), "h.1.q": (8, 8)}


def a_plan(ranks: tuple[int, ...] = (2, 0, 2), budget: Any = "uniform:2", **extra: Any) -> gr.Plan:
    targets = [gr.Target(name, *shape) for name, shape in SHAPES.items()]
    budget = gr.Budget.parse(budget)
    planned = tuple(
        gr.PlannedTarget(target, rank, score=rank / 8, details={"effective_rank": rank})
        for target, rank in zip(targets, ranks, strict=True)
    )
    extra = {"options": {"energy": 0.9}, "provenance": {"seed": 3}, **extra}
    return gr.Plan("gard", budget=budget, budget_parameters=budget.resolve(targets, 10_000),
                   targets=planned, **extra)  # fmt: skip


def edited(change: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(a_plan().to_dict()))
    change(data)
    return data


def test_a_plan_counts_its_parameters() -> None:
    plan = a_plan()
    assert plan.ranks == {"h.0.q": 2, "h.0.v": 0, "h.1.q": 2}
    assert plan.scores == {"h.0.q": 0.25, "h.0.v": 0.0, "h.1.q": 0.25}
    assert plan.parameters == 2 * 10 + 2 * 16
    assert plan.budget_parameters == 2 * (10 + 6 + 16)
    assert plan.slack == 12


def test_json_round_trip(tmp_path: Path) -> None:
    for plan in (a_plan(), a_plan(budget=70), a_plan(budget="1%", reliability={"split_half": 0.5})):
        path = tmp_path / f"{plan.budget.kind}.json"
        plan.save(path)
        assert gr.Plan.load(path) == plan
        assert gr.Plan.load(path).to_dict() == plan.to_dict()
        with pytest.raises(gr.OutputError, match="exists already"):
            plan.save(path)
        plan.save(path, overwrite=True)


def test_the_file_has_the_published_schema() -> None:
    data = a_plan().to_dict()
    assert list(data) == [
        "schema", "method", "budget", "parameters", "targets", "reliability", "provenance",
    ]  # fmt: skip
    assert data["schema"] == "gradrank.plan/1"
    assert data["method"] == {"name": "gard", "options": {"energy": 0.9}}
    assert data["budget"] == {"kind": "uniform", "value": 2, "parameters": 64}
    assert data["targets"]["h.1.q"] == {
        "rank": 2, "d_in": 8, "d_out": 8, "kind": "linear", "parameters": 32, "score": 0.25,
        "effective_rank": 2,
    }  # fmt: skip


@given(ranks=st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 8)))
def test_any_plan_within_budget_survives_its_json(ranks: tuple[int, int, int]) -> None:
    plan = a_plan(ranks, budget=10_000)
    again = gr.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.parameters == sum(r * c for r, c in zip(ranks, (10, 6, 16), strict=True))


def test_a_rank_edited_by_hand_is_counted_again() -> None:
    data = edited(lambda d: d["targets"]["h.1.q"].update(rank=1, parameters=999))
    data["parameters"] = 12345
    plan = gr.Plan.from_dict(data)
    assert plan.ranks["h.1.q"] == 1
    assert plan.parameters == 2 * 10 + 16
    assert plan.to_dict()["targets"]["h.1.q"]["parameters"] == 16


def q(**fields: Any) -> Any:
    return lambda data: data["targets"]["h.0.q"].update(fields)


def drop(*path: str) -> Any:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (q(rank=4), "spends .* more than its budget of 64"),
        (q(rank=-1), "'h.0.q' has rank -1"),
        (q(rank=5), r"rank 5, above min\(d_in, d_out\) = 4"),
        (q(rank=1.5), "targets.h.0.q.rank is 1.5"),
        (q(rank=True), "rank is True"),
        (q(rank="2"), "rank is '2'"),
        (q(rank=None), "rank is None"),
        (q(d_in=0), "impossible shape 6 x 0"),
        (q(d_out=-6), "impossible shape -6 x 4"),
        (q(d_in="4"), "d_in is '4'"),
        (q(score="high"), "malformed"),
        (q(score=float("nan")), "no finite number"),
        (q(score=True), "no finite number"),
        (q(score=10**400), "malformed"),
        (drop("targets", "h.0.q", "rank"), "'rank' is missing"),
        (drop("targets", "h.0.q", "d_in"), "'d_in' is missing"),
        (drop("targets"), "'targets' is missing"),
        (drop("budget"), "'budget' is missing"),
        (drop("budget", "parameters"), "'parameters' is missing"),
        (drop("method"), "'method' is missing"),
        (drop("method", "name"), "'name' is missing"),
        (drop("schema"), "no plan"),
        (lambda d: d.update(schema="gradrank.plan/2"), "found 'gradrank.plan/2'"),
        (lambda d: d.update(targets=[1]), "malformed"),
        (lambda d: d.update(targets={"a": 3}), "malformed"),
        (lambda d: d.update(method="gard"), "malformed"),
        (lambda d: d.update(reliability="good"), "reliability is a str"),
        (lambda d: d.update(provenance=3), "malformed"),
        (lambda d: d["budget"].update(kind="money"), "kind 'money' is unknown. Known: fraction"),
        (lambda d: d["budget"].update(value=-2), "malformed: budget 'uniform:-2'"),
        (lambda d: d["budget"].update(value=float("inf")), "malformed"),
        (lambda d: d["budget"].update(value="x"), "malformed"),
        (lambda d: d["budget"].update(parameters=64.5), "budget.parameters is 64.5"),
        (lambda d: d["budget"].update(parameters="64"), "budget.parameters is '64'"),
    ],
)
def test_a_malformed_plan_names_its_fault(change: Any, says: str) -> None:
    with pytest.raises(gr.PlanError, match=says):
        gr.Plan.from_dict(edited(change))


@pytest.mark.parametrize("data", [None, 3, "x", [], {}, {"schema": 1}])
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(gr.PlanError, match="no plan"):
        gr.Plan.from_dict(data)


def test_a_target_may_not_stand_twice(tmp_path: Path) -> None:
    plan = a_plan()
    with pytest.raises(gr.PlanError, match="twice"):
        gr.Plan("gard", {}, plan.budget, 1000, plan.targets + plan.targets[:1])
    path = tmp_path / "plan.json"
    text = json.dumps(plan.to_dict())
    path.write_text(text.replace('"h.0.v":', '"h.0.q":'))
    with pytest.raises(gr.DataError, match=r"'h.0.q' stands twice"):
        gr.Plan.load(path)


def test_differences_between_plans() -> None:
    plan, other = a_plan((2, 0, 2)), a_plan((1, 0, 3), budget=1000)
    assert plan.diff(plan) == {}
    assert plan.diff(other) == {"h.0.q": (2, 1), "h.1.q": (2, 3)}
    smaller = gr.Plan("x", {}, plan.budget, 64, plan.targets[1:])
    assert plan.diff(smaller) == {"h.0.q": (2, 0)}
    assert smaller.diff(plan) == {"h.0.q": (0, 2)}


def test_a_plan_prints_its_essence() -> None:
    text = "Plan(gard: 52 of 64 parameters, 2 of 3 targets, ranks 2..2)"
    assert str(a_plan((2, 0, 2))) == text
    assert "ranks none" in str(a_plan((0, 0, 0)))


def test_the_reference_rank_is_that_of_uniform_lora() -> None:
    assert a_plan((1, 1, 1), budget="uniform:3").reference_rank == 3
    assert a_plan((1, 0, 1), budget=64).reference_rank == 2
    assert a_plan((1, 0, 1), budget=79).reference_rank == 2
    assert a_plan((1, 0, 1), budget=81).reference_rank == 3
    assert a_plan((0, 1, 0), budget=6).reference_rank == 1
    assert gr.Plan("x", {}, gr.Budget.parameters(5), 5, ()).reference_rank == 1


def test_details_may_not_shadow_the_fields_of_a_target() -> None:
    target = gr.PlannedTarget(gr.Target("a", 2, 2), 1, 0.5, {"rank": 7, "note": "kept"})
    plan = gr.Plan("x", {}, gr.Budget.parameters(9), 9, (target,))
    row = plan.to_dict()["targets"]["a"]
    assert row["rank"] == 1
    assert row["note"] == "kept"


def test_plans_are_immutable_and_copied_whole() -> None:
    plan = a_plan()
    with pytest.raises(AttributeError):
        plan.method = "other"  # type: ignore[misc]
    data = plan.to_dict()
    data["provenance"]["seed"] = 9
    assert plan.provenance["seed"] == 3
    assert copy.deepcopy(plan) == plan
