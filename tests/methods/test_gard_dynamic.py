"""Dynamic GARD: what it decides, against a twin in exact fractions and plain loops."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradrank as gr
from gradrank.methods.gard_dynamic import GardCourse
from gradrank.signals.measurement import Measurement
from gradrank.signals.spectrum import SpectrumStatistic
from oracles import dynamic as oracle
from oracles.allocation import parameters

SHAPES = [(6, 6), (9, 4), (4, 16), (12, 12), (2, 7), (30, 20)]
ENERGIES = [Fraction(1, 2), Fraction(9, 10), Fraction(3, 4), Fraction(1)]
BETAS = [Fraction(0), Fraction(1, 2), Fraction(3, 4)]
TOTAL = 1000


def window(values: Mapping[str, Sequence[int]], targets: Sequence[gr.Target]) -> Measurement:
    """A measurement whose Gram matrices have exactly these eigenvalues."""
    gram = {name: torch.diag(torch.tensor(v, dtype=torch.float64)) for name, v in values.items()}
    return Measurement(tuple(targets), SpectrumStatistic(gram), None, {})


def build(settings: oracle.Settings, **options: Any) -> gr.DynamicGard:
    return gr.DynamicGard(
        energy=float(settings.energy),
        beta=float(settings.beta),
        r_min=settings.r_min,
        r_max=settings.r_max,
        max_delta=settings.max_delta,
        spend_leftover=settings.spend_leftover,
        **options,
    )


@dataclasses.dataclass
class Run:
    targets: list[gr.Target]
    start: dict[str, int]
    windows: list[dict[str, list[int]]]
    settings: oracle.Settings


def draw_run(draw: random.Random, zeros: bool = True) -> Run:
    """Targets, ranks to begin with, spectra of a few windows, options and a budget that holds."""
    numbers = draw.sample(range(30), draw.randint(1, 6))
    targets = [gr.Target(f"layers.{i}.m", *draw.choice(SHAPES)) for i in numbers]
    r_min = draw.choice([1, 1, 2])
    r_max = draw.choice([3, 5, 9])
    start = {t.name: draw.randint(min(r_min, t.max_rank), min(r_max, t.max_rank)) for t in targets}
    used = parameters(start, targets)
    settings = oracle.Settings(
        budget=used + draw.choice([0, 0, 7, 40]),
        energy=draw.choice(ENERGIES),
        beta=draw.choice(BETAS),
        r_min=r_min,
        r_max=r_max,
        max_delta=draw.choice([1, 2, 5]),
        spend_leftover=draw.random() < 0.8,
    )
    kinds = [[5, 0, 0, 0, 0, 0], [1] * 6, [9, 3, 1, 0, 0, 0], [2, 2, 2, 1, 0, 0]]
    kinds += [[0] * 6] if zeros else []
    windows = [{t.name: draw.choice(kinds) for t in targets} for _ in range(draw.randint(1, 4))]
    return Run(targets, start, windows, settings)


def play(run: Run, method: gr.DynamicGard | None = None) -> list[dict[str, int]]:
    """Ranks after each decision."""
    made = method or build(run.settings)
    course = made.course(run.targets, run.settings.budget, TOTAL)
    ranks, taken = run.start, []
    for values in run.windows:
        ranks = dict(course.decide(ranks, window(values, run.targets)).ranks)
        taken.append(ranks)
    return taken


def twin(run: Run, settings: oracle.Settings | None = None) -> list[dict[str, int]]:
    return oracle.course(run.targets, run.start, run.windows, settings or run.settings)


# --- the twin ----------------------------------------------------------------------------------


def test_every_decision_equals_the_twin() -> None:
    draw = random.Random(0)
    moved = 0
    for _ in range(200):
        run = draw_run(draw)
        found = play(run)
        assert found == twin(run)
        moved += found[-1] != run.start
    assert moved > 100


def swapped_beta(run: Run) -> list[dict[str, int]]:
    return twin(run, dataclasses.replace(run.settings, beta=1 - run.settings.beta))


def unbounded(run: Run) -> list[dict[str, int]]:
    return twin(run, dataclasses.replace(run.settings, max_delta=100))


def from_the_start(run: Run) -> list[dict[str, int]]:
    """Every decision is bounded by the first ranks instead of those in use."""
    last = [
        oracle.course(run.targets, run.start, run.windows[: i + 1], run.settings)
        for i in range(len(run.windows))
    ]
    history = [
        {n: oracle.effective_rank(v, run.settings.energy) for n, v in w.items()}
        for w in run.windows
    ]
    found = []
    for i in range(len(last)):
        ema = oracle.smoothed(history[: i + 1], run.settings.beta)
        total = sum(ema.values())
        if not total:
            return last[-1]
        scores = {name: value / total for name, value in ema.items()}
        found.append(oracle.allocate(run.targets, scores, run.start, run.settings))
    return found


def clipped_afterwards(run: Run) -> list[dict[str, int]]:
    """The static rule first, the bound on moves after it: what the budget does not survive."""
    ranks, found = dict(run.start), []
    for wished in unbounded(run):
        delta = run.settings.max_delta
        ranks = {n: max(ranks[n] - delta, min(ranks[n] + delta, wished[n])) for n in ranks}
        found.append(dict(ranks))
    return found


@pytest.mark.parametrize(
    "broken",
    [swapped_beta, unbounded, from_the_start, clipped_afterwards],
    ids=lambda f: f.__name__,
)
def test_the_twin_tells_a_broken_method_apart(broken: Any) -> None:
    draw = random.Random(1)
    runs = [draw_run(draw, zeros=False) for _ in range(60)]
    assert sum(broken(run) != twin(run) for run in runs) > 3


def test_clipping_afterwards_would_overspend_where_this_does_not() -> None:
    draw = random.Random(2)
    over = 0
    for _ in range(150):
        run = draw_run(draw, zeros=False)
        over += any(
            parameters(r, run.targets) > run.settings.budget for r in clipped_afterwards(run)
        )
    assert over > 0


# --- what always holds -------------------------------------------------------------------------


@st.composite
def any_run(draw: st.DrawFn) -> Run:
    return draw_run(draw(st.randoms(use_true_random=False)))


@given(any_run())
def test_budget_bounds_and_largest_move_hold_at_every_decision(run: Run) -> None:
    before, settings = run.start, run.settings
    for ranks in play(run):
        assert parameters(ranks, run.targets) <= settings.budget
        for target in run.targets:
            rank = ranks[target.name]
            assert abs(rank - before[target.name]) <= settings.max_delta
            assert min(settings.r_min, target.max_rank) <= rank
            assert rank <= min(settings.r_max, target.max_rank)
        before = ranks


@given(any_run(), st.randoms(use_true_random=False))
def test_the_order_of_targets_does_not_matter(run: Run, randomness: random.Random) -> None:
    order = randomness.sample(range(len(run.targets)), len(run.targets))
    shuffled = dataclasses.replace(run, targets=[run.targets[i] for i in order])
    shuffled.windows = [
        {t.name: values[t.name] for t in shuffled.targets} for values in run.windows
    ]
    assert play(shuffled) == play(run)


@given(any_run(), st.integers(1, 5))
def test_an_equal_signal_changes_nothing_of_a_uniform_start(run: Run, flat: int) -> None:
    settings = dataclasses.replace(run.settings, r_min=1)
    method = build(settings)
    equal = method.assess(run.targets, None)
    budget = min(
        settings.budget, sum(t.cost * min(settings.r_max, t.max_rank) for t in run.targets)
    )
    start = method.ranks(run.targets, equal, budget)
    values = {t.name: [1] * flat + [0] * (6 - flat) for t in run.targets}
    again = Run(run.targets, start, [values] * 3, dataclasses.replace(settings, budget=budget))
    assert play(again, method) == [start] * 3


@given(any_run())
def test_a_foreign_start_comes_within_its_bounds_without_overspending(run: Run) -> None:
    # Ranks above r_max and below r_min, as an adapter made elsewhere may have.
    draw = random.Random(len(run.targets))
    run.start = {t.name: draw.randint(1, t.max_rank) for t in run.targets}
    run.settings = dataclasses.replace(
        run.settings, r_min=3, r_max=4, budget=parameters(run.start, run.targets)
    )
    before = run.start
    for ranks in play(run):
        assert parameters(ranks, run.targets) <= run.settings.budget
        for name, rank in ranks.items():
            assert abs(rank - before[name]) <= run.settings.max_delta
            assert rank >= min(3, before[name])
        before = ranks


def test_a_rank_below_r_min_that_cannot_be_paid_for_waits_instead_of_failing() -> None:
    targets = [gr.Target("wide", 50, 50), gr.Target("thin", 5, 5)]
    start = {"wide": 1, "thin": 5}
    settings = oracle.Settings(budget=parameters(start, targets), r_min=4)
    run = Run(targets, start, [{"wide": [1, 1], "thin": [1, 1]}], settings)
    assert play(run) == [{"wide": 1, "thin": 5}]
    paid = dataclasses.replace(settings, budget=400)
    assert play(dataclasses.replace(run, settings=paid)) == [{"wide": 3, "thin": 5}]


# --- the formula -------------------------------------------------------------------------------

PAIR = [gr.Target("a", 16, 16), gr.Target("b", 16, 16)]


def directions(a: int, b: int, of: int = 8) -> Measurement:
    """Windows whose effective ranks at energy 1 are a and b."""
    flat = {"a": [1] * a + [0] * (of - a), "b": [1] * b + [0] * (of - b)}
    return window(flat, PAIR)


def test_effective_ranks_are_smoothed_by_the_papers_formula() -> None:
    course = gr.DynamicGard(energy=1.0, beta=0.75).course(PAIR, 8 * 32, TOTAL)
    ranks = {"a": 4, "b": 4}
    expected = {"a": 2.0, "b": 6.0}
    for a, b in ((2, 6), (8, 1), (8, 1)):
        decision = course.decide(ranks, directions(a, b))
        if (a, b) != (2, 6):
            expected = {"a": 0.75 * expected["a"] + 2.0, "b": 0.75 * expected["b"] + 0.25}
        assert decision.details["smoothed"] == expected
        assert decision.details["effective_rank"] == {"a": a, "b": b}
        assert decision.details["energy"] == {"a": a, "b": b}
        ranks = dict(decision.ranks)


def test_fractions_are_smoothed_while_the_record_keeps_whole_effective_ranks() -> None:
    method = gr.DynamicGard(energy=0.9, beta=0.75, fractional=True)
    course = method.course(PAIR, 8 * 32, TOTAL)
    course.decide({"a": 4, "b": 4}, directions(2, 6))
    details = course.decide({"a": 4, "b": 4}, directions(4, 1)).details
    # Flat spectra of n directions reach 0.9 of their energy at 0.9 n.
    assert details["smoothed"] == pytest.approx(
        {"a": 0.9 * (0.75 * 2 + 0.25 * 4), "b": 0.9 * (0.75 * 6 + 0.25 * 1)}
    )
    assert details["effective_rank"] == {"a": 4, "b": 1}


def test_ranks_move_towards_the_effective_ranks_step_by_step() -> None:
    course = gr.DynamicGard(energy=1.0, beta=0.0, max_delta=1).course(PAIR, 8 * 32, TOTAL)
    ranks, seen = {"a": 4, "b": 4}, []
    for _ in range(5):
        ranks = dict(course.decide(ranks, directions(7, 1)).ranks)
        seen.append((ranks["a"], ranks["b"]))
    # In the end 1 + c * 7/8 and 1 + c / 8 with c = 6, rounded.
    assert seen == [(5, 3), (6, 2), (6, 2), (6, 2), (6, 2)]


def test_beta_holds_back_a_single_odd_window() -> None:
    def after(beta: float) -> dict[str, int]:
        course = gr.DynamicGard(energy=1.0, beta=beta).course(PAIR, 8 * 32, TOTAL)
        ranks = dict(course.decide({"a": 4, "b": 4}, directions(4, 4)).ranks)
        return dict(course.decide(ranks, directions(8, 1)).ranks)

    assert after(0.0) == {"a": 6, "b": 2}
    assert after(0.9) == {"a": 4, "b": 4}


def test_without_any_gradient_the_ranks_stay() -> None:
    course = gr.DynamicGard().course(PAIR, 8 * 32, TOTAL)
    decision = course.decide({"a": 5, "b": 2}, directions(0, 0))
    assert decision.ranks == {"a": 5, "b": 2}
    assert decision.details["smoothed"] == {"a": 0.0, "b": 0.0}


def test_a_target_without_gradient_gives_its_ranks_away() -> None:
    course = gr.DynamicGard(energy=1.0).course(PAIR, 8 * 32, TOTAL)
    assert course.decide({"a": 4, "b": 4}, directions(0, 3)).ranks == {"a": 2, "b": 6}


def test_centring_leaves_the_common_direction_out() -> None:
    # Batches that share one gradient but for a sign: centred, all that is left.
    gram = {"a": torch.ones(4, 4, dtype=torch.float64), "b": torch.eye(4, dtype=torch.float64)}
    measurement = Measurement(tuple(PAIR), SpectrumStatistic(gram), None, {})
    course = gr.DynamicGard(energy=1.0, centring=True).course(PAIR, 8 * 32, TOTAL)
    details = course.decide({"a": 4, "b": 4}, measurement).details
    assert details["effective_rank"] == {"a": 0, "b": 3}


# --- schedule, bounds, start -------------------------------------------------------------------


def test_freezing_is_the_papers_early_dynamic_variant() -> None:
    def due(**options: Any) -> tuple[int, ...]:
        return gr.DynamicGard(**options).course(PAIR, 64, 400).schedule.decisions

    assert due(interval=50) == (50, 100, 150, 200, 250, 300, 350)
    assert due(interval=50, freeze_after=120) == (50, 100)
    assert due(interval=50, warmup=100, freeze_after=220) == (150, 200)


def test_options_reach_schedule_and_signal() -> None:
    method = gr.DynamicGard(interval=7, window=5, warmup=3, freeze_after=40, sketch_dim=16)
    schedule = method.course(PAIR, 64, 100).schedule
    assert (schedule.interval, schedule.window, schedule.warmup) == (7, 5, 3)
    assert (schedule.freeze_after, schedule.total_steps) == (40, 100)
    assert method.course(PAIR, 64, 100).signal == gr.Spectrum("sketch", 16)
    made = gr.DynamicGard(estimator="dense", shrink="norm", grow="gradient").course(PAIR, 64, 100)
    assert (made.signal.estimator, made.shrink, made.grow) == ("dense", "norm", "gradient")


def test_ceilings_are_twice_the_uniform_rank_unless_told() -> None:
    targets = [*PAIR, gr.Target("thin", 3, 40)]
    budget = 4 * sum(t.cost for t in targets)
    assert gr.DynamicGard().course(targets, budget, 100).ceilings == {"a": 8, "b": 8, "thin": 3}
    capped = gr.DynamicGard(r_max=5).course(targets, budget, 100)
    assert capped.ceilings == {"a": 5, "b": 5, "thin": 3}
    small = gr.DynamicGard(r_min=6).course(PAIR, 64, 100)
    assert small.ceilings == {"a": 6, "b": 6}


def test_the_start_is_uniform_unless_measured() -> None:
    assert gr.DynamicGard().signals() == ()
    assert gr.allocate(PAIR, "gard-dynamic", "uniform:4").ranks == {"a": 4, "b": 4}
    measured = gr.DynamicGard(start="measured", energy=1.0)
    assert measured.signals() == (gr.Spectrum("sketch", 128),)
    plan = gr.allocate(directions(6, 2), measured, "uniform:4")
    assert plan.ranks == {"a": 6, "b": 2}
    assert plan.targets[0].details == {"effective_rank": 6, "saturation": 6 / 8}
    static = gr.allocate(directions(6, 2), gr.Gard(energy=1.0, r_min=1, r_max=8), "uniform:4")
    assert plan.ranks == static.ranks


def test_a_measured_start_without_measurement_or_gradient_is_refused() -> None:
    method = gr.DynamicGard(start="measured")
    with pytest.raises(gr.MeasurementError, match=r"gard-dynamic.*needs a measurement"):
        method.assess(PAIR, None)
    with pytest.raises(gr.MeasurementError, match="all 2 targets have a zero gradient"):
        method.assess(PAIR, directions(0, 0))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r_min", 0),
        ("r_max", 0),
        ("interval", 0),
        ("window", 1),
        ("beta", 1.0),
        ("beta", -0.1),
        ("max_delta", 0),
        ("warmup", -1),
        ("freeze_after", 0),
        ("start", "zero"),
        ("shrink", "random"),
        ("grow", "svd"),
        ("energy", 0.0),
        ("estimator", "exact"),
        ("sketch_dim", 0),
    ],
)
def test_impossible_options_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(gr.OptionError, match=rf"'{option}' of method 'gard-dynamic'"):
        gr.DynamicGard(**{option: value})


# --- memory ------------------------------------------------------------------------------------


def test_a_course_restored_between_two_decisions_goes_on_as_if_nothing_had_happened() -> None:
    draw = random.Random(3)
    for _ in range(30):
        run = draw_run(draw)
        whole, method = play(run), build(run.settings)
        ranks: Mapping[str, int] = run.start
        state: dict[str, torch.Tensor] = {}
        for values, expected in zip(run.windows, whole, strict=True):
            course = GardCourse(method, run.targets, run.settings.budget, TOTAL)
            course.restore(state)
            ranks = course.decide(ranks, window(values, run.targets)).ranks
            assert ranks == expected
            state = {key: tensor.clone() for key, tensor in course.state().items()}


def test_a_state_of_another_run_or_a_damaged_one_is_refused() -> None:
    course = gr.DynamicGard().course(PAIR, 64, 100)
    assert course.state() == {}
    with pytest.raises(gr.OptionError, match="has 3 targets, this run 2"):
        course.restore({"smoothed": torch.ones(3, dtype=torch.float64)})
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(gr.OptionError, match="negative or not finite"):
            course.restore({"smoothed": torch.tensor([1.0, wrong], dtype=torch.float64)})
