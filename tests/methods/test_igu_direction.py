"""Integrated gradients per direction: completeness on real models, smoothing, the gap, runs."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gradrank as gr
from cases import CASES, batches
from gradrank.methods.igu_direction import Attributions
from gradrank.ops.quadrature import trapezoid
from gradrank.signals.path import at_point
from gradrank.signals.scoring import scorer_for
from gradrank.signals.sensitivity import Observation, PathGradient
from methods.importance_cases import RANKS, TARGETS, lams, observations
from oracles import igu as oracle
from pruning_cases import DUE, method, run, started, step
from pruning_cases import data as tokens
from signals.path_cases import branches, in_float64, of_case, scalings, updates, used

# --- options -------------------------------------------------------------------------------------

REFUSED: list[tuple[str, list[Any], str]] = [
    ("estimator", ["stochastic", "as-code"], "'grid' or 'unbiased'"),
    ("segments", [0, -1], "1 or more, and 2 or more"),
    ("score_every", [0], "1 or more"),
    ("micro_batches", [0], "1 or more"),
    ("endpoints", ["never"], "'drawn' or 'always'"),
    ("rows", [0.0, -0.5, 1.5, float("nan")], r"in \(0, 1\]"),
    ("beta", [-0.1, 1.0, float("nan")], r"in \[0, 1\)"),
    ("tolerance", [0.0, -1.0, float("nan")], "above 0"),
    ("initial_rank", [0], "1 or more, or none"),
    ("r_min", [-1], "0 or more"),
    ("interval", [0], "1 or more"),
    ("warmup", [-1], "0 or more, or none"),
    ("final", [0], "1 or more, or none"),
    ("orthogonality", [-1.0], "0 or more"),
    ("init", ["zeros"], "'svd' or 'keep'"),
    ("after", ["stop"], "'continue' or 'restart'"),
]


@pytest.mark.parametrize(("option", "values", "rule"), REFUSED)
def test_values_out_of_range_are_refused_with_their_rule(
    option: str, values: list[Any], rule: str
) -> None:
    for value in values:
        named = rf"'{option}' of method 'igu-direction' is .*{rule}"
        with pytest.raises(gr.OptionError, match=named):
            gr.IguDirection(**{option: value})


def test_every_option_is_tested_above() -> None:
    tested = {option for option, *_ in REFUSED}
    assert {field.name for field in dataclasses.fields(gr.IguDirection)} == tested


def test_segments_depend_on_the_estimator() -> None:
    assert gr.IguDirection(segments=1).segments == 1
    with pytest.raises(gr.OptionError, match="'segments'"):
        gr.IguDirection(estimator="unbiased", segments=1)


def test_it_asks_for_lambda_alone_and_for_the_losses() -> None:
    made = gr.IguDirection(initial_rank=4).course(TARGETS, 40, 100)
    assert made.sensitivity == PathGradient("grid", 4, factors=("lam",), losses=True)
    assert made.schedule.score_every == 20


# --- completeness on real models -----------------------------------------------------------------


def attributed(model: Any, batch: dict[str, Tensor], segments: int, **more: Any) -> Observation:
    signal = PathGradient("grid", segments, factors=("lam",), losses=True, **more)
    scorer = scorer_for(signal, model, lambda: branches(model), 0)
    scorer.before_step()
    model(**batch)["loss"].backward()
    found = scorer.before_update()
    model.zero_grad()
    assert found is not None
    return found


def total(found: Observation) -> float:
    return sum(
        float((found.weights[n]["lam"].double() * fs["lam"].double()).sum())
        for n, fs in found.gradients.items()
    )


def change(model: Any, batch: dict[str, Tensor]) -> float:
    losses = []
    for alpha in (1.0, 0.0):
        with at_point(branches(model), alpha), torch.no_grad():
            losses.append(float(model(**batch)["loss"]))
    return losses[0] - losses[1]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_attributions_of_all_targets_together_add_up_to_the_change_of_the_loss(name: str) -> None:
    # A larger update has a bend close to the pre-trained model, since tiny models' states are tiny.
    model, _ = of_case(name, scale=0.1, lora_dropout=0.2 if name == "bert" else 0.0)
    batch = in_float64(batches(CASES[name], 1)[0])
    gaps = []
    for segments in (2, 8, 32):
        torch.manual_seed(3)
        found = attributed(model, batch, segments)
        assert found.loss_change is not None
        gaps.append(abs(total(found) - found.loss_change) / abs(found.loss_change))
    if name != "bert":
        assert found.loss_change == pytest.approx(change(model, batch), rel=1e-5)
    # The trapezoid's error falls with the square of the segments, down to float32's rounding.
    assert gaps[1] < 0.2 * gaps[0]
    assert gaps[2] < 0.2 * gaps[1]
    assert gaps[2] < 1e-3


def test_one_target_at_a_time_would_not_be_complete() -> None:
    """The broken twin: every target on a path of its own, the others at their end."""
    model, _ = of_case("bert")
    batch = batches(CASES["bert"], 1)[0]
    rule, alone = trapezoid(32), 0.0
    for branch in branches(model):
        for alpha, weight in zip(rule.points, rule.weights, strict=True):
            with at_point([branch], alpha):
                (grad,) = torch.autograd.grad(model(**batch)["loss"], [branch.learned["lam"]])
            alone += weight * float((grad * branch.learned["lam"].detach()).sum())
    together = total(attributed(model, batch, 32))
    assert together == pytest.approx(change(model, batch), rel=1e-2)
    assert abs(alone - change(model, batch)) > 0.1 * abs(change(model, batch))


def test_an_attribution_is_that_of_the_written_formula() -> None:
    """``λ_i ∫ p_iᵀ G(α ΔW) q_i dα`` from dense gradients of copies without adapter."""
    model, bare = of_case("bert")
    batch = batches(CASES["bert"], 1)[0]
    found, rule = attributed(model, batch, 3), trapezoid(3)
    scale, want = scalings(model), {b.name: torch.zeros(3).double() for b in branches(model)}
    for alpha, weight in zip(rule.points, rule.weights, strict=True):
        _, dense = oracle.at_dense_weights(
            bare, updates(model), alpha, lambda copied: copied(**batch)["loss"]
        )
        for branch in branches(model):
            factors = used(branch)
            for i in range(3):
                p, q = factors["B"][:, i], factors["A"][i]
                along = float(p @ dense[branch.name] @ q) * scale[branch.name]
                want[branch.name][i] += weight * float(factors["lam"][i]) * along
    for name, expected in want.items():
        got = found.gradients[name]["lam"] * found.weights[name]["lam"]
        assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-8)


# --- what is remembered --------------------------------------------------------------------------


def attributions(look: Observation, name: str) -> list[float]:
    lam, grad = look.weights[name]["lam"], look.gradients[name]["lam"]
    return [float(a) * float(b) for a, b in zip(lam, grad, strict=True)]


def test_attributions_are_smoothed_from_the_first_on_and_signed() -> None:
    looks, made = observations(4), Attributions(0.7, 1e9)
    for look in looks:
        made.take(look)
    scores = made.scores(TARGETS, lams())
    for target in TARGETS:
        for i in range(RANKS[target.name]):
            mean = attributions(looks[0], target.name)[i]
            for look in looks[1:]:
                mean = 0.7 * mean + 0.3 * attributions(look, target.name)[i]
            worth = -mean / (target.d_in + target.d_out)
            assert float(scores[target.name][i]) == pytest.approx(worth, rel=1e-4)
    assert any((s < 0).any() for s in scores.values()), "raising the loss is worth less than none"


def test_before_any_look_it_refuses_to_guess() -> None:
    with pytest.raises(gr.MeasurementError, match="no mini-batch with finite gradients"):
        Attributions(0.85, 0.1).scores(TARGETS, lams())


def test_the_gap_is_of_all_looks_since_the_last_decision() -> None:
    made, looks = Attributions(0.85, 1e9), observations(3, passes=4)
    for look in looks[:2]:
        made.take(look)
    sums = [sum(sum(attributions(look, name)) for name in RANKS) for look in looks]
    changes = [look.loss_change for look in looks]
    facts = made.facts()
    assert facts["passes"] == 8.0
    assert facts["attributed"] == pytest.approx(sum(sums[:2]) / 2, rel=1e-4)
    assert facts["loss_change"] == pytest.approx(sum(changes[:2]) / 2)
    gap = abs(sum(sums[:2]) - sum(changes[:2])) / abs(sum(changes[:2]))
    assert facts["gap"] == pytest.approx(gap, rel=1e-4)
    assert made.facts() == {"passes": 8.0}, "nothing since"
    made.take(looks[2])
    assert made.facts()["attributed"] == pytest.approx(sums[2], rel=1e-4)


def look_with(attribution: float, loss_change: float) -> Observation:
    one = {"q": {"lam": torch.tensor([1.0])}}
    return Observation(one, {"q": {"lam": torch.tensor([attribution])}}, 1, loss_change)


def test_a_large_gap_is_a_warning_with_its_numbers() -> None:
    made = Attributions(0.85, 0.1)
    made.take(look_with(-1.2, -1.0))
    with pytest.warns(RuntimeWarning, match=r"-1\.2.*changed by -1:.*gap is 20%, above 10%"):
        facts = made.facts()
    assert facts["gap"] == pytest.approx(0.2)
    made.take(look_with(-1.05, -1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.facts()["gap"] == pytest.approx(0.05)


def test_a_loss_that_did_not_change_gives_a_finite_gap() -> None:
    made = Attributions(0.85, 1e9)
    made.take(look_with(0.0, 0.0))
    assert made.facts()["gap"] == 0.0
    made.take(look_with(0.5, 0.0))
    assert made.facts()["gap"] == 1e6


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@given(st.integers(0, 5))
def test_a_state_between_two_decisions_goes_on_as_if_nothing_had_happened(cut: int) -> None:
    looks = observations(5)
    whole, first, second = (Attributions(0.85, 1e9) for _ in range(3))
    for look in looks:
        whole.take(look)
    for look in looks[:cut]:
        first.take(look)
    saved = {key: tensor.clone() for key, tensor in first.state().items()}
    second.take(looks[0])
    second.restore(saved)
    assert same(second.state(), saved)
    for look in looks[cut:]:
        second.take(look)
    assert same(second.state(), whole.state())
    assert second.facts() == whole.facts()


def test_what_is_gone_is_forgotten() -> None:
    made, looks = Attributions(0.85, 1e9), observations(2)
    for look in looks:
        made.take(look)
    lam = lams()
    before = made.scores(TARGETS, lam)
    made.follow({"q": (1, 3), "k": ()})
    after = made.scores(TARGETS, {"q": lam["q"][[1, 3]]})
    assert torch.equal(after["q"], before["q"][[1, 3]])
    assert after["k"].numel() == 0
    assert "mean/lam/k" not in made.state()


# --- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["grid", "unbiased"])
def test_a_run_prunes_to_the_budget_and_records_the_gap(estimator: str) -> None:
    _, controller = run(method("igu-direction", estimator=estimator))
    entries = controller.run.decisions
    assert [entry["step"] for entry in entries] == DUE
    assert entries[-1]["parameters"] <= controller.run.budget
    looked = [entry for entry in entries if "gap" in entry]
    assert looked
    for entry in looked:
        miss = abs(entry["attributed"] - entry["loss_change"])
        assert entry["gap"] == pytest.approx(miss / abs(entry["loss_change"]), rel=1e-6)


def test_a_fine_grid_is_complete_in_a_run_and_a_coarse_one_warns() -> None:
    def gaps(segments: int, tolerance: float) -> list[float]:
        made = method("igu-direction", segments=segments, score_every=1, tolerance=tolerance)
        model, optimizer, controller = started(made)
        for batch in tokens()[: DUE[0]]:
            step(model, optimizer, controller, batch)
        controller.close()
        return [entry["gap"] for entry in controller.run.decisions]

    assert gaps(24, 1e9)[0] < 0.02
    with pytest.warns(RuntimeWarning, match="completeness gap is"):
        gaps(1, 1e-6)


def test_directions_that_raise_the_loss_go_first() -> None:
    made = method("igu-direction").course(TARGETS, 40, 100)
    lam = lams()
    look = observations(1)[0]
    for name, rank in RANKS.items():
        look.gradients[name]["lam"].fill_(-1.0)
        look.weights[name]["lam"].fill_(1.0)
        look.weights[name]["lam"][rank - 1] = -1.0
    made.take(look)
    everything = sum(RANKS[t.name] * t.cost for t in TARGETS)
    keep = made.choose(everything - 12 - 9, lam).keep
    assert keep == {"q": (0, 1, 2), "k": (0, 1)}
