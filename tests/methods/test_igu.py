"""IGU-LoRA: options, smoothed importance against loops, pruning, and whole runs."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradrank as gr
from dynamic_cases import adapted
from gradrank.methods.course import DirectionCourse
from gradrank.methods.importance import ElementImportance
from gradrank.methods.method import build
from gradrank.signals.sensitivity import Observation, PathGradient, RandomScale
from methods.importance_cases import (
    RANKS,
    TARGETS,
    element_scores,
    lams,
    observations,
    without,
)
from oracles import igu as oracle
from pruning_cases import BUDGET, DUE, STEPS, method, run, started, step, timeless, weights
from pruning_cases import data as tokens

# --- options -------------------------------------------------------------------------------------

REFUSED: list[tuple[str, list[Any], str]] = [
    ("initial_rank", [0, -2], "1 or more, or none"),
    ("r_min", [-1], "0 or more"),
    ("interval", [0, -5], "1 or more"),
    ("warmup", [-1], "0 or more, or none"),
    ("final", [0, -1], "1 or more, or none"),
    ("orthogonality", [-0.1, float("inf"), float("nan")], "0 or more"),
    ("after", ["stop", ""], "'continue' or 'restart'"),
    ("init", ["lora", "zero"], "'svd' or 'keep'"),
]
OWN: list[tuple[str, list[Any], str]] = [
    ("estimator", ["simpson", "as_code"], "one of grid, stochastic, unbiased, as-code"),
    ("segments", [0, 1, -3], "1 or more, and 2 or more where"),
    ("score_every", [0, -1], "1 or more"),
    ("aggregate", [0], "1 or more"),
    ("micro_batches", [0], "1 or more"),
    ("rows", [0.0, -0.5, 1.5, float("nan")], r"in \(0, 1\]"),
    ("endpoints", ["never"], "'drawn' or 'always'"),
    ("beta1", [-0.1, 1.0, float("nan")], r"in \[0, 1\)"),
    ("beta2", [-0.1, 1.0, float("nan")], r"in \[0, 1\)"),
    ("combine", ["sum"], "'ratio' or 'product'"),
    ("eps", [0.0, -1e-9, 1.0, float("nan")], r"in \(0, 1\)"),
]


@pytest.mark.parametrize(("option", "values", "rule"), REFUSED + OWN)
def test_values_out_of_range_are_refused_with_their_rule(
    option: str, values: list[Any], rule: str
) -> None:
    for value in values:
        with pytest.raises(gr.OptionError, match=rf"'{option}' of method 'igu' is .*{rule}"):
            gr.Igu(**{option: value})


def test_every_option_that_has_a_range_is_tested_above() -> None:
    tested = {option for option, *_ in REFUSED + OWN}
    assert {field.name for field in dataclasses.fields(gr.Igu)} - tested == {"signed"}


def test_segments_and_score_every_depend_on_the_estimator() -> None:
    for estimator in ("grid", "as-code"):
        assert gr.Igu(estimator=estimator, segments=1).segments == 1
    for estimator in ("stochastic", "unbiased"):
        assert gr.Igu(estimator=estimator, segments=2).segments == 2
        with pytest.raises(gr.OptionError, match="'segments'"):
            gr.Igu(estimator=estimator, segments=1)
    assert gr.Igu(estimator="as-code", score_every=1).score_every == 1
    with pytest.raises(gr.OptionError, match="as-code: 1, it looks at every step"):
        gr.Igu(estimator="as-code", score_every=2)


def course(budget: int = 40, steps: int = 100, **options: Any) -> Any:
    return gr.Igu(**{"initial_rank": 4} | options).course(TARGETS, budget, steps)


def test_defaults_are_the_papers_where_it_has_any() -> None:
    made = gr.Igu()
    assert (made.beta1, made.beta2, made.combine) == (0.85, 0.85, "ratio")
    found = course()
    assert isinstance(found, DirectionCourse)
    assert found.sensitivity == PathGradient("unbiased", 8, "drawn", 1)
    for options in ({"endpoints": "always"}, {"estimator": "stochastic"}, {"estimator": "grid"}):
        assert course(**options).sensitivity.segments == 20
    assert (found.schedule.score_every, found.schedule.warmup, found.schedule.final) == (10, 10, 30)
    assert found.whole_penalty
    assert not found.restarts
    code = course(estimator="as-code")
    assert code.sensitivity == RandomScale(20)
    assert code.schedule.score_every == 1
    assert not code.whole_penalty
    assert course(after="restart").restarts
    assert course(init="keep").init == "keep"
    assert not course(init="keep").whole_penalty, "LoRA's directions are not of unit length"


def test_the_start_is_twice_the_uniform_rank_or_what_is_asked_for() -> None:
    targets = [gr.Target("q", 32, 32), gr.Target("k", 32, 3)]
    one = 64 + 35
    assert gr.Igu().start(targets, 4 * one) == {"q": 8, "k": 3}, "no more than its width"
    assert gr.Igu().start(targets, one // 2) == {"q": 2, "k": 2}
    assert gr.Igu(initial_rank=32).start(targets, 16 * one) == {"q": 32, "k": 3}
    with pytest.raises(gr.OptionError, match=r"begin with rank 2, 198 .*within the budget of 198"):
        gr.Igu(initial_rank=2).start(targets, 2 * one)
    with pytest.raises(gr.BudgetError, match=r"below the floor of 297 .*r_min = 3"):
        gr.Igu(initial_rank=8, r_min=3).course(targets, 296, 100)


def test_its_plan_is_uniform() -> None:
    plan = gr.allocate(TARGETS, gr.Igu(), "uniform:2")
    assert plan.ranks == {"q": 2, "k": 2}
    assert plan.method == "igu"
    assert gr.Igu().signals() == ()


# --- what is remembered of the gradients ---------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("aggregate", [1, 3])
@pytest.mark.parametrize("how", ["ratio", "product", "as-code"])
def test_direction_scores_equal_loops_over_elements(how: str, aggregate: int, signed: bool) -> None:
    code = how == "as-code"
    scoring = oracle.Scoring(
        0.8, 0.7, "ratio" if code else how, 1e-6 if code else 1e-3, in_both=code
    )
    made = ElementImportance(0.8, 0.7, scoring.how, scoring.eps, code, not code, aggregate, signed)
    looks, lam = observations(6), lams()
    for look in looks:
        made.take(look)
    found = made.scores(TARGETS, lam)
    for name in RANKS:
        history = element_scores(looks, name, aggregate, signed)
        size = None if code else lam[name]
        want = oracle.direction_scores(history, scoring, size)
        assert found[name].tolist() == pytest.approx(want, rel=1e-4)
        broken = oracle.direction_scores(history, scoring, size, broken=True)
        assert found[name].tolist() != pytest.approx(broken, rel=1e-2)


def test_the_published_codes_ratio_is_pinned() -> None:
    """One element, one look: s = 0.15 |w g|, U = 0.15 |s' - s|; 1e-6 stands in both terms."""
    made = ElementImportance(0.85, 0.85, "ratio", 1e-6, in_both=True)
    (look,) = observations(1)
    look.gradients["q"]["A"].fill_(2e-6)
    look.weights["q"]["A"].fill_(-1.0)
    made.take(look)
    mean, deviation = 0.15 * 2e-6, 0.15 * 0.85 * 2e-6
    state = made.state()
    assert state["mean/A/q"][0, 0].item() == pytest.approx(mean)
    assert state["deviation/A/q"][0, 0].item() == pytest.approx(deviation)
    of_q = float((mean + 1e-6) / (deviation + 1e-6))
    for factor in ("B", "lam"):
        state[f"mean/{factor}/q"].zero_()
        state[f"deviation/{factor}/q"].zero_()
    made.restore(state)
    found = made.scores(TARGETS, lams())["q"]
    assert found.tolist() == pytest.approx([of_q + 2.0] * 4, rel=1e-4), "0/0 counts as 1"


def test_the_magnitude_is_of_the_mean_and_not_the_mean_of_magnitudes() -> None:
    made = ElementImportance(0.0, 0.0, "ratio", 1e-3, lam_by_size=True, aggregate=2)
    one, other = observations(2)
    for factor in ("A", "B", "lam"):
        other.weights["q"][factor].copy_(one.weights["q"][factor])
        other.gradients["q"][factor].copy_(-one.gradients["q"][factor])
    made.take(one)
    made.take(other)
    assert made.state()["mean/A/q"].abs().max() < 1e-6
    assert made.state()["mean/A/k"].abs().max() > 0.1


def test_scores_do_not_depend_on_the_order_of_targets_and_wait_for_none_that_is_gone() -> None:
    made = ElementImportance(0.85, 0.85, "ratio", 1e-9, lam_by_size=True)
    for look in observations(3):
        made.take(look)
    forward, backward = (made.scores(ts, lams()) for ts in (TARGETS, TARGETS[::-1]))
    assert list(backward) == ["k", "q"]
    assert all(torch.equal(forward[name], backward[name]) for name in RANKS)
    found = made.scores(TARGETS, {"q": lams()["q"]})
    assert found["k"].numel() == 0
    assert torch.equal(found["q"], forward["q"])


def test_an_incomplete_average_serves_where_there_is_nothing_else() -> None:
    made = ElementImportance(0.85, 0.85, "ratio", 1e-9, lam_by_size=True, aggregate=10)
    with pytest.raises(gr.MeasurementError, match="no mini-batch with finite gradients"):
        made.scores(TARGETS, lams())
    for look in observations(2):
        made.take(look)
    assert not [key for key in made.state() if key.startswith("mean/")]
    found = made.scores(TARGETS, lams())
    want = oracle.direction_scores(
        element_scores(observations(2), "q", 2), oracle.Scoring(eps=1e-9), lams()["q"]
    )
    assert found["q"].tolist() == pytest.approx(want, rel=1e-4)


def states(made: ElementImportance) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in made.state().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@given(st.integers(0, 7))
def test_a_state_in_the_middle_of_an_average_goes_on_as_if_nothing_had_happened(cut: int) -> None:
    looks = observations(8)
    whole = ElementImportance(0.8, 0.7, "ratio", 1e-6, aggregate=3)
    first = ElementImportance(0.8, 0.7, "ratio", 1e-6, aggregate=3)
    for look in looks:
        whole.take(look)
    for look in looks[:cut]:
        first.take(look)
    saved = states(first)
    for look in looks[cut:]:
        first.take(look)  # what is saved must not follow
    second = ElementImportance(0.8, 0.7, "ratio", 1e-6, aggregate=3)
    second.take(looks[0])
    second.restore(saved)
    assert same(states(second), saved)
    for look in looks[cut:]:
        second.take(look)
    assert same(states(second), states(whole))
    assert same(states(first), states(whole))
    assert second.facts() == {"passes": 8.0}


def test_a_damaged_state_is_refused_by_name() -> None:
    made = ElementImportance(0.8, 0.7, "ratio", 1e-6)
    made.take(observations(1)[0])
    for damage in ("missing", "shape"):
        state = states(made)
        if damage == "missing":
            del state["deviation/B/k"]
        else:
            state["deviation/B/k"] = torch.zeros(1)
        with pytest.raises(gr.OptionError, match=r"means without deviations .* damaged"):
            ElementImportance(0.8, 0.7, "ratio", 1e-6).restore(state)


@pytest.mark.parametrize("aggregate", [1, 3])
def test_what_stays_is_remembered_as_if_the_rest_had_never_been(aggregate: int) -> None:
    looks = observations(7)
    keep: dict[str, tuple[int, ...]] = {"q": (0, 2, 3), "k": ()}
    made = ElementImportance(0.8, 0.7, "ratio", 1e-6, aggregate=aggregate)
    for look in looks[:4]:
        made.take(look)
    made.follow(keep)
    twin = ElementImportance(0.8, 0.7, "ratio", 1e-6, aggregate=aggregate)
    for look in without(looks[:4], keep):
        twin.take(look)
    assert same(states(made), states(twin))
    assert not any(key.endswith("/k") for key in made.state())
    for look in without(looks[4:], keep):
        made.take(look)
        twin.take(look)
    assert same(states(made), states(twin))


# --- decisions -----------------------------------------------------------------------------------


def test_a_decision_keeps_the_best_directions_and_says_what_they_are_worth() -> None:
    made = course()
    for look in observations(3, passes=2):
        made.take(look)
    lam = lams()
    scores = made._importance.scores(TARGETS, lam)
    listed = {name: found.tolist() for name, found in scores.items()}
    for allowed in (75, 60, 40, 12, 9):
        decision = made.choose(allowed, lam)
        assert decision.keep == oracle.keep_one_by_one(TARGETS, listed, allowed)
        assert decision.ranks == {name: len(kept) for name, kept in decision.keep.items()}
        worth = decision.details["importance"]
        for name, kept in decision.keep.items():
            assert worth[name] == pytest.approx(sum(listed[name][i] for i in kept))
        assert decision.facts == {"passes": 6.0}
    assert made.choose(40, lam) == course_after(observations(3, passes=2)).choose(40, lam)


def course_after(looks: list[Any], **options: Any) -> Any:
    made = course(**options)
    for look in looks:
        made.take(look)
    return made


def test_nan_importance_is_an_error_that_names_a_target() -> None:
    looks = observations(2)
    looks[1].gradients["k"]["B"][0, 0] = float("nan")
    with pytest.raises(gr.MeasurementError, match=r"1 target\(s\) \('k', ...\) is NaN"):
        course_after(looks).choose(40, lams())


def test_r_min_is_kept() -> None:
    looks = observations(3)
    for look in looks:
        for grad in look.gradients["k"].values():
            grad.zero_()
    lam = lams() | {"k": torch.zeros(3)}
    assert course_after(looks).choose(48, lam).ranks == {"q": 4, "k": 0}
    assert course_after(looks, r_min=1).choose(48, lam).ranks == {"q": 3, "k": 1}


def test_a_courses_state_is_its_importance() -> None:
    made = course_after(observations(3))
    other = course()
    other.restore(made.state())
    assert other.choose(40, lams()) == made.choose(40, lams())


# --- whole runs ----------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "grid": {"estimator": "grid"},
    "stochastic": {"estimator": "stochastic"},
    "drawn": {},
    "always": {"endpoints": "always", "aggregate": 2},
    "as-code": {"estimator": "as-code", "score_every": None},
    "product": {"combine": "product"},
    "signed": {"signed": True},
    "restart": {"after": "restart"},
    "keep": {"init": "keep"},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_prunes_to_the_budget(variant: str) -> None:
    _, controller = run(method("igu", **VARIANTS[variant]))
    entries = controller.run.decisions
    assert [entry["step"] for entry in entries] == DUE
    assert all(entry["parameters"] <= entry["budget"] for entry in entries)
    falling = [entry["parameters"] for entry in entries]
    assert falling == sorted(falling, reverse=True)
    assert entries[-1]["budget"] == controller.run.budget
    assert len(set(controller.ranks.values())) > 1, "not uniform"


def test_variants_decide_differently() -> None:
    """Else a test of one would be a test of none."""
    found = {
        variant: run(method("igu", **VARIANTS[variant]))[1].ranks
        for variant in ("grid", "stochastic", "as-code", "product")
    }
    for one, other in itertools.combinations(found, 2):
        assert found[one] != found[other], (one, other)


@pytest.mark.parametrize("variant", ["grid", "always", "drawn"])
def test_scoring_does_not_touch_training_before_the_first_pruning(variant: str) -> None:
    """Up to the first decision the weights are those of a run that is never looked at."""
    made = method("igu", **VARIANTS[variant])
    rare = dataclasses.replace(made, score_every=4)
    often = dataclasses.replace(made, score_every=1, micro_batches=2)
    found = []
    for one in (rare, often):
        model, optimizer, controller = started(one, lora_dropout=0.2)
        torch.manual_seed(5)
        for batch in tokens()[:3]:
            step(model, optimizer, controller, batch)
        controller.close()
        found.append((weights(model), torch.get_rng_state()))
    assert same(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_the_penalty_pulls_directions_apart_and_can_be_switched_off(weight: float) -> None:
    """One step of plain gradient descent: what the penalty adds to it, and nothing else."""

    def after_one(made: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = adapted(rank=2)
        gr.reserve(model, made, BUDGET)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.add_(0.1)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
        controller = gr.Controller(model, optimizer, made, BUDGET, STEPS)
        before = weights(model)
        step(model, optimizer, controller, tokens()[0])
        controller.close()
        return before, weights(model)

    before, bare = after_one(method("igu", orthogonality=0.0))
    _, pulled = after_one(method("igu", orthogonality=weight))
    for key, tensor in before.items():
        moved = bare[key] - pulled[key]
        if key.endswith("/lam"):
            assert not moved.any()
            continue
        vectors = tensor if key.endswith("/A") else tensor.T
        gram = vectors @ vectors.T - torch.eye(len(vectors))
        want = weight * 4 * gram @ vectors
        assert torch.allclose(moved, want if key.endswith("/A") else want.T, atol=1e-6)
        assert bool(moved.any()) == bool(weight)


def test_restart_leaves_a_zero_update_of_the_ranks_that_were_found() -> None:
    made = method("igu", after="restart")
    model, optimizer, controller = started(made)
    for batch in tokens()[: DUE[-1]]:
        step(model, optimizer, controller, batch)
    assert sum(controller.ranks.values()) > 0
    for key, tensor in weights(model).items():
        if key.endswith("/lam"):
            assert not tensor.any()
        else:
            vectors = tensor if key.endswith("/A") else tensor.T
            assert torch.allclose(vectors @ vectors.T, torch.eye(len(vectors)), atol=1e-5)
    for batch in tokens()[DUE[-1] :]:
        step(model, optimizer, controller, batch)
    assert any(t.any() for key, t in weights(model).items() if key.endswith("/lam"))


def test_a_budget_in_parameters_may_lie_between_two_uniform_ranks() -> None:
    budget = gr.Budget.parameters(1234)
    _, controller = run(method("igu"), budget=budget)
    used = controller.run.parameters
    assert used <= 1234
    assert [entry["budget"] for entry in controller.run.decisions][-1] == 1234


def test_options_as_text_make_the_same_run() -> None:
    text = {"initial_rank": "4", "interval": "2", "warmup": "2", "final": "3"}
    text |= {"segments": "3", "score_every": "2"}
    assert build(gr.Igu, text) == method("igu")
    one, other = run(method("igu"))[1], run(build(gr.Igu, text))[1]
    assert timeless(one) == timeless(other)


def test_a_score_averages_a_whole_round_where_single_points_are_drawn() -> None:
    grads = {
        t.name: {"A": torch.ones(2, t.d_in), "B": torch.ones(t.d_out, 2), "lam": torch.ones(2)}
        for t in TARGETS
    }
    for options, looks in (({}, 8), ({"aggregate": 3}, 3), ({"estimator": "grid"}, 1)):
        found = course(**options)
        for _ in range(looks):
            assert not any(key.startswith("mean/") for key in found.state())
            found.take(Observation(grads, grads))
        assert any(key.startswith("mean/") for key in found.state())
